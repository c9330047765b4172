#!/usr/bin/env bash
# Builds and runs the C and C++ tests under sanitizers:
#
#     tests/sanitizers/run.sh build address && tests/sanitizers/run.sh test address
#     tests/sanitizers/run.sh build thread && tests/sanitizers/run.sh test thread
#
# `address` is AddressSanitizer, with its search for leaks, and UndefinedBehaviorSanitizer; `thread` is ThreadSanitizer.
# The core, cpp/, the bridge, the headers and the tests are instrumented; libtorch and Rust's standard library, which
# are precompiled, are not. `build` needs the tree that `make` installs in out/prefix.
#
# RUSTC_BOOTSTRAP enables the sanitizers of the stable Rust compiler, which links no runtime into a library: the program
# links it. `address` uses gcc's runtime, which has the functions that rustc calls. `thread` uses rustc's: gcc 12's
# lacks __tsan_memcpy, and does not start if the kernel randomizes addresses over 32 bits, as many do.
set -euo pipefail
cd "$(dirname "$0")/../.."
[[ $# == 2 && $1 =~ ^(build|test)$ && $2 =~ ^(address|thread)$ ]] || {
    echo "usage: $0 build|test address|thread" >&2
    exit 2
}
# Unset the flags of an outer make, which cargo and cmake would use.
unset MAKEFLAGS MFLAGS
kind=$2
out=$PWD/out/sanitizers/$kind
target=$(rustc -vV | sed -n 's/^host: //p')
library=target/$kind/$target/release
mkdir -p "$out"

skip() {
    echo "skipped: $1"
    exit 0
}

runtime_of_rust() {
    local found=("$(rustc --print sysroot)/lib/rustlib/$target/lib/"librustc*_rt."$1".a)
    [[ -e ${found[0]} ]] || return 1
    echo "${found[0]}"
}

# Succeeds if the C compiler accepts these flags for a program or, with -c, for an object.
compiles_with() {
    echo 'int main(void) { return 0; }' | ${CC:-cc} "$@" -x c - -o "$out/probe" 2>/dev/null
}

case $kind in
address)
    runtime_of_rust asan >/dev/null || skip "this Rust compiler comes without AddressSanitizer"
    SANITIZE="-fsanitize=address,undefined -fno-sanitize-recover=all"
    # shellcheck disable=SC2086 # flags are words
    compiles_with $SANITIZE || skip "this C compiler comes without AddressSanitizer or UndefinedBehaviorSanitizer"
    SANITIZE_LINK=$SANITIZE
    cfg=
    ;;
thread)
    runtime=$(runtime_of_rust tsan) || skip "this Rust compiler comes without ThreadSanitizer"
    SANITIZE="-fsanitize=thread"
    # The library finds the runtime's functions in the program, which must export all of them.
    SANITIZE_LINK="-fno-sanitize=thread -rdynamic -Wl,--whole-archive $runtime -Wl,--no-whole-archive -lpthread -lm -ldl -lrt"
    # shellcheck disable=SC2086 # as above
    compiles_with $SANITIZE -c || skip "this C compiler comes without ThreadSanitizer"
    cfg="--cfg tsan"
    ;;
esac
export SANITIZE SANITIZE_LINK
flags="-g1 -fno-omit-frame-pointer $SANITIZE"

# build_library DIRECTORY FEATURE... builds the library there: with little optimization, without LTO (which takes
# minutes for instrumented code), and with the checks of a debug build, including those of unsafe code.
build_library() {
    local directory=$1
    shift
    env RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=$kind -Cunsafe-allow-abi-mismatch=sanitizer $cfg" CXXFLAGS="$flags" \
        CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        CARGO_PROFILE_RELEASE_DEBUG=line-tables-only CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true \
        CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true \
        cargo build --quiet --release --locked --target "$target" --target-dir "$directory" "$@"
}

build() {
    build_library "target/$kind/core"
    build_library "target/$kind" --features torch
    # The installed tree of make, except for the library.
    rm -rf "$out/prefix"
    cp -a out/prefix "$out/prefix"
    cp "$library/libsafetensors_torch.so" "$(readlink -f "$out/prefix/lib/libsafetensors_torch.so")"
    torch=$(.venv/bin/python -c 'import torch; print(torch.utils.cmake_prefix_path)')
    # No build type: its flags would follow these.
    cmake -S tests/cpp -B "$out/cpp" -DCMAKE_BUILD_TYPE=Sanitized -DCMAKE_CXX_FLAGS="$flags" \
        -DCMAKE_EXE_LINKER_FLAGS="$SANITIZE_LINK" -DCMAKE_PREFIX_PATH="$out/prefix;$torch" >/dev/null
    cmake --build "$out/cpp"
    touch "$out.stamp"
}

run_tests() {
    export ASAN_OPTIONS="detect_leaks=1:detect_stack_use_after_return=1"
    export UBSAN_OPTIONS="print_stacktrace=1"
    cat tests/rust/tsan.suppressions tests/sanitizers/thread.suppressions >"$out/suppressions"
    export TSAN_OPTIONS="suppressions=$out/suppressions"
    echo "C, $kind:"
    tests/c/run.sh "target/$kind/core/$target/release"
    echo "C++, $kind:"
    if [[ $kind == thread ]]; then
        # torch's threads synchronize in libgomp, which is not instrumented. With one thread, torch works on the
        # caller's.
        export OMP_NUM_THREADS=1
    fi
    "$out/cpp/cpp_tests"
}

if [[ $1 == build ]]; then build; else run_tests; fi
