# The errors for a broken installation and for a torch that does not fit. Part of run.sh.

# refuses WORDS CMAKE_ARGUMENT...: checks that configuring fails and prints these words, whatever the line breaks.
refuses() {
    local words=$1 said
    shift
    rm -rf "$WORK/build-mistake"
    ! configure mistake "$@" || fail "no error; expected: $words"
    said=$(tr -s ' \n' '  ' <"$WORK/mistake.log")
    grep -qF -- "$words" <<<"$said" || { cat "$WORK/mistake.log" >&2; fail "the error does not contain: $words"; }
}

# links FROM TO NAME: fills TO with links to everything in FROM except NAME.
links() {
    mkdir -p "$2"
    find "$1/" -mindepth 1 -maxdepth 1 ! -name "$3" -exec ln -s -t "$2" {} +
}

# Makes a libtorch of another version: the real one, except for the header with the number.
make_other_libtorch() {
    local other=$1 path=include part
    links "$torch" "$other" include
    for part in torch headeronly version.h; do
        links "$torch/$path" "$other/$path" "$part"
        path=$path/$part
    done
    sed 's/^\(#define TORCH_VERSION_MINOR\) .*/\1 5/' "$torch/$path" >"$other/$path"
}

check_mistakes() {
    local prefix=$WORK/prefix built other=$WORK/other-libtorch
    built=$(sed -n 's/^torch_version=//p' "$prefix/lib/pkgconfig/safetensors_torch.pc")

    make_other_libtorch "$other"
    local found="but the project uses torch 2.5."
    local remedy="LIBTORCH=DIR make install"
    refuses "was built for torch $built with C++ ABI 1 ($prefix/lib/libsafetensors_torch.so), $found" \
        "-DCMAKE_PREFIX_PATH=$prefix" "-DLIBTORCH=$other"
    refuses "($other); pass a libtorch ${built%.*} with -DLIBTORCH=DIR" \
        "-DCMAKE_PREFIX_PATH=$prefix" "-DLIBTORCH=$other"
    refuses "$remedy" "-DCMAKE_PREFIX_PATH=$prefix;$other"
    refuses "$found" "-DCMAKE_PREFIX_PATH=$prefix;$other/share/cmake" -DCONSUMER_FINDS_TORCH=ON
    refuses "with C++ ABI 0 ($torch)" "-DCMAKE_PREFIX_PATH=$prefix" "-DLIBTORCH=$torch" -DLIBTORCH_CXX11_ABI=0
    pass "built for another torch: the error names both"
    refuses "the torch at $other is 2.5." \
        "-DCMAKE_PREFIX_PATH=$package" "-DLIBTORCH=$other"
    pass "a torch too old for the Python package"

    refuses "libtorch was not found; pass -DLIBTORCH=DIR" "-DCMAKE_PREFIX_PATH=$prefix"
    refuses "LIBTORCH is /nowhere, but /nowhere contains no libtorch" "-DCMAKE_PREFIX_PATH=$prefix" -DLIBTORCH=/nowhere
    refuses "contains only the C library" "-DCMAKE_PREFIX_PATH=$WORK/prefix-c" "-DLIBTORCH=$torch"
    pass "no libtorch, in the project or in the installation"

    local sources=("-DCONSUMER_FETCHES=$PWD" "-DFETCHCONTENT_SOURCE_DIR_SAFETENSORSTORCH=$PWD")
    refuses "libtorch was not found; pass -DLIBTORCH=DIR" "${sources[@]}"
    refuses "cargo was not found; install Rust with rustup" "${sources[@]}" "-DLIBTORCH=$torch" \
        "-DCMAKE_IGNORE_PATH=$(dirname "$(command -v cargo)");$HOME/.cargo/bin"
    pass "sources without libtorch or cargo"

    refuses "version \"9.1\"" "-DCMAKE_PREFIX_PATH=$prefix;$torch" -DCONSUMER_VERSION=9.1
    refuses "$version" "-DCMAKE_PREFIX_PATH=$prefix;$torch" -DCONSUMER_VERSION=9.1
    refuses "unknown component fortran; the components are c and cpp" "-DCMAKE_PREFIX_PATH=$prefix" "-DCONSUMER_COMPONENTS=c;fortran"
    pass "a wrong version, an unknown component"

    local file
    for file in lib/libsafetensors_torch.so lib/libsafetensors_torch_c.so lib/libsafetensors_torch_c.a include/safetensors_torch.h; do
        mv "$prefix/$file" "$WORK/missing"
        # The version is read from the header.
        if [ "$file" != include/safetensors_torch.h ]; then
            refuses "the installation is incomplete: $prefix/$file is missing" "-DCMAKE_PREFIX_PATH=$prefix;$torch"
        else
            refuses "safetensors_torch.h" "-DCMAKE_PREFIX_PATH=$prefix;$torch"
        fi
        mv "$WORK/missing" "$prefix/$file"
    done
    mv "$package/bridge" "$WORK/missing"
    refuses "the installation is incomplete: $package/bridge/bridge.rs.cc is missing" "-DCMAKE_PREFIX_PATH=$package"
    mv "$WORK/missing" "$package/bridge"
    pass "an incomplete installation"
}
