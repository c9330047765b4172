# Checks the installed files, their contents, and that they can be moved. Part of run.sh.

# install_one NAME OPTION...: runs `make install`, then moves the tree, so that nothing can depend on its path.
install_one() {
    local name=$1
    shift
    "$MAKE" --no-print-directory -s install DESTDIR="$WORK/stage" PREFIX=/opt/somewhere "$@" >/dev/null
    mv "$WORK/stage/opt/somewhere" "$WORK/$name"
    [ -z "$(find "$WORK/stage" -type f)" ] || fail "make install wrote outside PREFIX"
    rm -r "$WORK/stage"
}

install_trees() {
    install_one prefix TORCH=1
    install_one prefix-c TORCH=0
    # The Python package without a compiled libtorch layer, beside torch as in site-packages.
    SAFETENSORS_TORCH_AOT=0 "$PYTHON" -m pip install --quiet --disable-pip-version-check \
        --no-build-isolation --no-deps --target "$WORK/site-packages" .
    ln -s "$torch" "$WORK/site-packages/torch"
    package=$WORK/site-packages/safetensors_torch/native
    # An unpacked libtorch.
    mkdir "$WORK/libtorch"
    ln -s "$torch/include" "$torch/lib" "$torch/share" "$WORK/libtorch"
}

# listing TREE: prints its files and links.
listing() {
    (cd "$1" && find . \( -type f -printf '%P\n' -o -type l -printf '%P -> %l\n' \) | LC_ALL=C sort)
}

expected_c() {
    cat <<LIST
include/safetensors_torch.h
lib/cmake/SafetensorsTorch/SafetensorsTorchConfig.cmake
lib/cmake/SafetensorsTorch/SafetensorsTorchConfigVersion.cmake
lib/cmake/SafetensorsTorch/SafetensorsTorchLibtorch.cmake
lib/libsafetensors_torch_c.a
lib/libsafetensors_torch_c.so -> libsafetensors_torch_c.so.$major
lib/libsafetensors_torch_c.so.$major -> libsafetensors_torch_c.so.$version
lib/libsafetensors_torch_c.so.$version
lib/pkgconfig/safetensors_torch-c.pc
LIST
}

expected_cpp() {
    expected_c
    expected_c | sed -n 's/torch_c\.so/torch.so/gp'
    (cd include && find . -name '*.hpp' -printf 'include/%P\n')
    echo lib/pkgconfig/safetensors_torch.pc
}

# check_exports LIBRARY HEADER: the dynamic symbols are exactly the functions of the C header; the SONAME is the file's name
# with the major version.
check_exports() {
    local library=$1 header=$2
    diff <(grep -v '^ \*\|^/\*' "$header" | grep -o '\bsft_[a-z0-9_]*(' | tr -d '(' | LC_ALL=C sort -u) \
        <(nm -D --defined-only "$library" | awk '{ print $3 }' | LC_ALL=C sort -u) >"$WORK/symbols" ||
        { cat "$WORK/symbols" >&2; fail "$library must export what $header declares (<), and nothing else (>)"; }
    LC_ALL=C readelf --wide --dynamic "$library" | grep "(SONAME).*\[${library##*/}.$major\]" >/dev/null ||
        fail "$library: SONAME"
}

# check_library LIBRARY HEADER: the same, and no search path of this machine.
check_library() {
    check_exports "$@"
    ! LC_ALL=C readelf --wide --dynamic "$1" | grep -E '\((RPATH|RUNPATH)\)' >&2 || fail "$1 has a search path"
}

# check_paths TREE: no file contains a path of this machine.
check_paths() {
    local tree=$1 directory found
    for directory in "$PWD" "$(pwd -P)" "$torch" "$(realpath "$torch")" "${CARGO_HOME:-$HOME/.cargo}" /opt/somewhere; do
        found=$(grep -rlaF -- "$directory/" "$tree" || true)
        [ -z "$found" ] || fail "$found contains the path $directory"
    done
}

check_trees() {
    diff <(expected_cpp | LC_ALL=C sort) <(listing "$WORK/prefix") || fail "make install: another list of files"
    diff <(expected_c | LC_ALL=C sort) <(listing "$WORK/prefix-c") || fail "make install TORCH=0: another list of files"
    pass "the files of make install, with torch and without"
    local library
    for library in prefix/lib/libsafetensors_torch.so prefix{,-c}/lib/libsafetensors_torch_c.so; do
        check_library "$WORK/$library" include/safetensors_torch.h
    done
    check_paths "$WORK/prefix"
    check_paths "$WORK/prefix-c"
    ! LC_ALL=C readelf --dynamic "$WORK"/prefix{,-c}/lib/libsafetensors_torch_c.so | grep torch_cpu >&2 ||
        fail "the C library needs libtorch"
    pass "exported symbols, SONAME, no search path, no path of this machine"
    ! LC_ALL=C readelf --wide --sections "$WORK/prefix-c/lib/libsafetensors_torch_c.a" | grep '\.debug_' >"$WORK/debug" ||
        fail "the static library contains debug information: $(head -n 1 "$WORK/debug")"
    pass "no debug information in the static library"
    cp -a "$WORK/prefix" "$WORK/uninstalled"
    touch "$WORK/uninstalled/lib/other.so"
    "$MAKE" --no-print-directory -s uninstall PREFIX="$WORK/uninstalled" DESTDIR=
    [ "$(listing "$WORK/uninstalled")" = lib/other.so ] || fail "make uninstall leaves $(listing "$WORK/uninstalled")"
    pass "make uninstall"
    diff <(cd include && find . -type f | sort) <(cd "$package/include" && find . -type f | sort) ||
        fail "the Python package has other headers"
    check_paths "$package"
    pass "the headers of the Python package, no path of this machine"
    grep -qx "torch_version=$("$PYTHON" -c 'import torch; print(torch.__version__.partition("+")[0])')" \
        "$WORK/prefix/lib/pkgconfig/safetensors_torch.pc" || fail "safetensors_torch.pc does not name its torch"
}
