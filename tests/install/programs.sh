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
    local prefix=$WORK/prefix cmake_prefix jobs=()
    cmake_prefix=$("$PYTHON" -c 'import torch; print(torch.utils.cmake_prefix_path)')
    # Two at a time: compiling torch's headers takes most of the time.
    {
        consumer pypi "-DCMAKE_PREFIX_PATH=$prefix;$cmake_prefix"
        consumer found-before "-DCMAKE_PREFIX_PATH=$prefix;$cmake_prefix" -DCONSUMER_FINDS_TORCH=ON
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
    compile_c_with_pkg_config prefix
    compile_c_with_pkg_config prefix-c
    pass "C without torch: both installations and the Python package; pkg-config"

    if cargo cinstall --version >/dev/null 2>&1; then
        check_cargo_c
        pass "C with what cargo cinstall installs"
    fi
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
