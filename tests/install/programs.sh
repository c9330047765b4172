# Builds and runs programs that use the installed library. Part of run.sh.

# configure NAME ARGUMENT...: configures the consumer in a build directory of that name. An unknown build type has no
# compiler options, which is fast.
configure() {
    local name=$1
    shift
    cmake -S tests/install/consumer -B "$WORK/build-$name" -DCMAKE_BUILD_TYPE=Plain "$@" >"$WORK/$name.log" 2>&1
}

# consumer NAME ARGUMENT...: configures, builds and runs the consumer.
consumer() {
    local name=$1 program
    configure "$@" && cmake --build "$WORK/build-$name" --parallel 2 >>"$WORK/$name.log" 2>&1 || {
        cat "$WORK/$name.log" >&2
        fail "$name: does not build"
    }
    for program in use_c use_cpp; do
        if [ -e "$WORK/build-$name/$program" ]; then
            "$WORK/build-$name/$program" "$WORK/build-$name/$program.safetensors" >>"$WORK/$name.log" 2>&1 || {
                cat "$WORK/$name.log" >&2
                fail "$name: $program fails"
            }
        fi
    done
}

# installs NAME: installs the C++ program of that build directory with its library, and runs it.
installs() {
    local prefix=$WORK/build-$1/installed
    cmake --install "$WORK/build-$1" --prefix "$prefix" >>"$WORK/$1.log" 2>&1 || {
        cat "$WORK/$1.log" >&2
        fail "$1: cannot be installed"
    }
    grep -qF "=> $prefix/bin/../lib/libsafetensors_torch" <<<"$(ldd "$prefix/bin/use_cpp")" ||
        fail "$1: the library is not installed"
    "$prefix/bin/use_cpp" "$prefix/file" >>"$WORK/$1.log" || fail "$1: the installed program fails"
}

# loads PROGRAM LIBRARY: checks that the program loads this library.
loads() {
    local program=$1 library=$2 loaded
    loaded=$(ldd "$program")
    grep -qF " => $library " <<<"$loaded" || fail "$program does not load $library but $loaded"
}

# needs_no_torch PROGRAM: checks that the program does not load torch.
needs_no_torch() {
    local loaded
    loaded=$(ldd "$1")
    ! grep -q 'torch_cpu\|libc10\|not found' <<<"$loaded" || fail "$1 needs $loaded"
}

pkg_config() {
    PKG_CONFIG_PATH=$WORK/$1/lib/pkgconfig "$PKG_CONFIG" "${@:2}"
}

compile_cpp_with_pkg_config() {
    local flags
    flags=$(pkg_config prefix --define-variable=torchdir="$torch" --cflags --libs safetensors_torch)
    # shellcheck disable=SC2086
    c++ -std=c++17 -O0 tests/install/consumer/use_cpp.cpp $flags -Wl,-rpath,"$WORK/prefix/lib:$torch/lib" \
        -o "$WORK/pkg_cpp" >"$WORK/pkg_cpp.log" 2>&1 || { cat "$WORK/pkg_cpp.log" >&2; fail "pkg-config, C++"; }
    "$WORK/pkg_cpp" "$WORK/pkg_cpp.safetensors" >>"$WORK/pkg_cpp.log"
}

# compile_c_with_pkg_config PREFIX: builds and runs a C program without torch.
compile_c_with_pkg_config() {
    local flags
    flags=$(pkg_config "$1" --cflags --libs safetensors_torch-c)
    # shellcheck disable=SC2086
    cc -std=c11 tests/install/consumer/use_c.c $flags -Wl,-rpath,"$WORK/$1/lib" -o "$WORK/pkg_c_$1"
    needs_no_torch "$WORK/pkg_c_$1"
    "$WORK/pkg_c_$1" "$WORK/pkg_c_$1.safetensors" >/dev/null
}

build_programs() {
    local prefix=$WORK/prefix cmake_prefix installed jobs=()
    installed=$("$PYTHON" -c 'import safetensors_torch; print(safetensors_torch.cmake_prefix_path)')
    cmake_prefix=$("$PYTHON" -c 'import torch; print(torch.utils.cmake_prefix_path)')
    # Two at a time: compiling torch's headers takes most of the time.
    {
        consumer pypi "-DCMAKE_PREFIX_PATH=$prefix;$cmake_prefix"
        consumer found-before "-DCMAKE_PREFIX_PATH=$prefix;$cmake_prefix" -DCONSUMER_FINDS_TORCH=ON
        consumer compiled-layer "-DCMAKE_PREFIX_PATH=$installed"
        compile_cpp_with_pkg_config
    } &
    jobs+=($!)
    {
        consumer as-needed "-DCMAKE_PREFIX_PATH=$prefix" "-DLIBTORCH=$WORK/libtorch" \
            -DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed
        consumer package "-DCMAKE_PREFIX_PATH=$package"
    } &
    jobs+=($!)
    local job
    for job in "${jobs[@]}"; do
        wait "$job" || exit 1
    done

    loads "$WORK/build-pypi/use_cpp" "$prefix/lib/libsafetensors_torch.so.$major"
    pass "C++ and C with the torch of Python, by CMAKE_PREFIX_PATH"
    pass "C++ and C with a torch that the project found before"
    loads "$WORK/build-as-needed/use_cpp" "$prefix/lib/libsafetensors_torch.so.$major"
    loads "$WORK/build-as-needed/use_cpp" "$WORK/libtorch/lib/libtorch_cpu.so"
    pass "C++ and C with an unpacked libtorch, linked --as-needed"
    loads "$WORK/build-package/use_cpp" "$WORK/build-package/libsafetensors_torch.so.$major"
    grep -q 'compiling the libtorch layer' "$WORK/package.log" || fail "the Python package does not report that it compiles"
    check_exports "$WORK/build-package/libsafetensors_torch.so" "$package/include/safetensors_torch.h"
    pass "C++ and C from the Python package"
    grep -q "using the compiled libtorch layer $installed/lib/" "$WORK/compiled-layer.log" ||
        { cat "$WORK/compiled-layer.log" >&2; fail "the Python package's layer for exactly this torch is not used"; }
    loads "$WORK/build-compiled-layer/use_cpp" "$installed/lib/$(basename "$installed"/lib/*-torch*.so)"
    pass "C++ and C with the compiled layer of the Python package"
    check_choice_of_layer
    pass "a compiled layer for the minor version: for releases of the same C++ ABI"
    installs pypi
    installs package
    installs compiled-layer
    pass "a program that is installed with the library"
    pass "C++ with pkg-config"

    # Without libtorch and without a C++ compiler.
    consumer c-both "-DCMAKE_PREFIX_PATH=$prefix" -DCONSUMER_COMPONENTS=c
    consumer c-alone "-DCMAKE_PREFIX_PATH=$WORK/prefix-c" -DCONSUMER_COMPONENTS=c
    consumer c-package "-DCMAKE_PREFIX_PATH=$package" -DCONSUMER_COMPONENTS=c
    loads "$WORK/build-c-both/use_c" "$prefix/lib/libsafetensors_torch_c.so.$major"
    loads "$WORK/build-c-alone/use_c" "$WORK/prefix-c/lib/libsafetensors_torch_c.so.$major"
    local name
    for name in c-both c-alone c-package; do
        needs_no_torch "$WORK/build-$name/use_c"
    done
    check_fetched
    compile_c_with_pkg_config prefix
    compile_c_with_pkg_config prefix-c
    pass "C without torch: both installations, the Python package, the sources; pkg-config"

    if cargo cinstall --version >/dev/null 2>&1; then
        check_cargo_c
        pass "C with what cargo cinstall installs"
    fi
}

# says WORDS: checks that the consumer, configured with the Python package and the unpacked libtorch, prints these words.
says() {
    configure choice "-DCMAKE_PREFIX_PATH=$package" "-DLIBTORCH=$WORK/libtorch" "${@:2}" &&
        grep -qF -- "$1" "$WORK/choice.log" || { cat "$WORK/choice.log" >&2; fail "CMake does not say: $1"; }
}

# Checks which releases of torch take a package's layer for their minor version. Configuring does not read the layer.
check_choice_of_layer() {
    local minor layer release stated=$WORK/libtorch/build-version
    minor=$("$PYTHON" -c 'import torch; print(*torch.__version__.split(".")[:2], sep=".")')
    layer=$package/lib/libsafetensors_torch-torch$minor-cxx11.so
    says "compiling the libtorch layer with this project, for torch $minor"
    touch "$layer"
    says "neither version.py nor build-version in $WORK/libtorch says whether that torch is a release"
    for release in "$minor.0.dev20260102+cpu" "$minor.0a0+git1234567"; do
        echo "$release" >"$stated"
        says "the package has none for torch $release with C++ ABI 1"
    done
    echo "$minor.7+cpu" >"$stated"
    says "using the compiled libtorch layer $layer"
    says "the package has none for torch $minor.7+cpu or $minor with C++ ABI 0" -DLIBTORCH_CXX11_ABI=0
    rm "$layer" "$stated"
}

# Checks a project that builds the sources. Only configures it for C++: compiling takes minutes.
check_fetched() {
    local sources=("-DCONSUMER_FETCHES=$PWD" "-DFETCHCONTENT_SOURCE_DIR_SAFETENSORSTORCH=$PWD")
    local output=$WORK/build-fetched-c/_deps/safetensorstorch-build
    mkdir -p "$output"
    # cargo finds there that the C library has been built already.
    ln -s "$PWD/target/core" "$output/safetensors_torch_cargo_c"
    consumer fetched-c "${sources[@]}" -DCONSUMER_COMPONENTS=c
    needs_no_torch "$WORK/build-fetched-c/use_c"
    local torch_options
    for torch_options in "-DLIBTORCH=$torch" "-DCMAKE_PREFIX_PATH=$torch -DCONSUMER_FINDS_TORCH=ON"; do
        rm -rf "$WORK/build-fetched-cpp"
        # shellcheck disable=SC2086
        configure fetched-cpp "${sources[@]}" $torch_options &&
            grep -rqF "LIBTORCH_LIB=$torch/lib " "$WORK/build-fetched-cpp/_deps/safetensorstorch-build" ||
            { cat "$WORK/fetched-cpp.log" >&2; fail "sources are not built for the torch of $torch_options"; }
    done
}

# Checks what cargo-c installs: the C library, its links, header and pkg-config file, and no CMake package.
check_cargo_c() {
    cargo cinstall --locked --release --target-dir target/capi \
        --prefix /opt/somewhere --libdir lib --destdir "$WORK/stage" >"$WORK/cargo-c.log" 2>&1 ||
        { cat "$WORK/cargo-c.log" >&2; fail "cargo cinstall"; }
    mv "$WORK/stage/opt/somewhere" "$WORK/prefix-cargo"
    rm -r "$WORK/stage"
    # Here both links lead to the file; after make install one leads to the other.
    diff <(expected_c | grep -v cmake/ | sed "s/\(\.so -> .*\.so\)\.$major\$/\1.$version/" | LC_ALL=C sort) \
        <(listing "$WORK/prefix-cargo") || fail "cargo cinstall: another list of files"
    check_library "$WORK/prefix-cargo/lib/libsafetensors_torch_c.so" "$WORK/prefix-cargo/include/safetensors_torch.h"
    sed -i "s|^prefix=.*|prefix=$WORK/prefix-cargo|" "$WORK/prefix-cargo/lib/pkgconfig/safetensors_torch-c.pc"
    compile_c_with_pkg_config prefix-cargo
}
