# What is said where something is wrong with the installation, or with the torch at hand. Part of run.sh.

# refuses WORDS CMAKE_ARGUMENT...: configuring fails, and says these words, however the lines are broken.
refuses() {
    local words=$1 said
    shift
    rm -rf "$WORK/build-mistake"
    ! configure mistake "$@" || fail "no error, but expected: $words"
    said=$(tr -s ' \n' '  ' <"$WORK/mistake.log")
    grep -qF -- "$words" <<<"$said" || { cat "$WORK/mistake.log" >&2; fail "the error does not say: $words"; }
}

# links FROM TO NAME: a copy of a directory made of links, but for the directory or file NAME in it.
links() {
    mkdir -p "$2"
    find "$1/" -mindepth 1 -maxdepth 1 ! -name "$3" -exec ln -s -t "$2" {} +
}

# A libtorch that says it is of another version: the real one but for the header with the number.
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
    local found="but the torch at hand is torch 2.5."
    local remedy="LIBTORCH=DIR make install"
    refuses "was built for torch $built with C++ ABI 1 ($prefix/lib/libsafetensors_torch.so), $found" \
        "-DCMAKE_PREFIX_PATH=$prefix" "-DLIBTORCH=$other"
    refuses "($other). Name a libtorch ${built%.*} with -DLIBTORCH=DIR" \
        "-DCMAKE_PREFIX_PATH=$prefix" "-DLIBTORCH=$other"
    refuses "$remedy" "-DCMAKE_PREFIX_PATH=$prefix;$other"
    refuses "$found" "-DCMAKE_PREFIX_PATH=$prefix;$other/share/cmake" -DCONSUMER_FINDS_TORCH=ON
    refuses "with C++ ABI 0 ($torch)" "-DCMAKE_PREFIX_PATH=$prefix" "-DLIBTORCH=$torch" -DLIBTORCH_CXX11_ABI=0
    pass "built for another torch: both are named"
    refuses "needs torch 2.6 or later, and the torch at $other is 2.5." \
        "-DCMAKE_PREFIX_PATH=$package" "-DLIBTORCH=$other"
    pass "a torch too old for the Python package"

    refuses "libtorch was not found. Name a libtorch with -DLIBTORCH=DIR" "-DCMAKE_PREFIX_PATH=$prefix"
    refuses "LIBTORCH is /nowhere, but there is no libtorch in /nowhere" "-DCMAKE_PREFIX_PATH=$prefix" -DLIBTORCH=/nowhere
    refuses "has no C++ in it" "-DCMAKE_PREFIX_PATH=$WORK/prefix-c" "-DLIBTORCH=$torch"
    pass "no libtorch, here or in the installation"

    refuses "version \"9.1\"" "-DCMAKE_PREFIX_PATH=$prefix;$torch" -DCONSUMER_VERSION=9.1
    refuses "$version" "-DCMAKE_PREFIX_PATH=$prefix;$torch" -DCONSUMER_VERSION=9.1
    refuses "no component fortran: there are c and cpp" "-DCMAKE_PREFIX_PATH=$prefix" "-DCONSUMER_COMPONENTS=c;fortran"
    pass "a version that does not fit, a component that is not there"

    local file
    for file in lib/libsafetensors_torch.so lib/libsafetensors_torch.a include/safetensors_torch.h; do
        mv "$prefix/$file" "$WORK/missing"
        # The version is read from the header.
        if [ "$file" != include/safetensors_torch.h ]; then
            refuses "the installation is not complete: $prefix/$file is missing" "-DCMAKE_PREFIX_PATH=$prefix;$torch"
        else
            refuses "safetensors_torch.h" "-DCMAKE_PREFIX_PATH=$prefix;$torch"
        fi
        mv "$WORK/missing" "$prefix/$file"
    done
    mv "$package/bridge" "$WORK/missing"
    refuses "the installation is not complete: $package/bridge/bridge.rs.cc is missing" "-DCMAKE_PREFIX_PATH=$package"
    mv "$WORK/missing" "$package/bridge"
    pass "an installation that is not complete"
}
