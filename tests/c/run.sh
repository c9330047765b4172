#!/bin/sh
# Builds and runs the tests of the C interface with sanitizers, with the shared and with the static library in the given
# directory:
#
#     cargo build --release --target-dir target/core
#     tests/c/run.sh target/core/release
#
# Uses $CC, $CXX and $CFLAGS if they are set. $SANITIZE replaces the flags of the sanitizers (address and undefined),
# and $SANITIZE_LINK those of linking.
set -eu

library=$(cd "${1:-${SFT_LIBRARY_DIR:?usage: $0 DIRECTORY_OF_THE_LIBRARY}}" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
header=$here/../../include/safetensors_torch.h
sanitize=${SANITIZE:--fsanitize=address,undefined -fno-sanitize-recover=all}
sanitize_link=${SANITIZE_LINK:-$sanitize}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The header compiles on its own, as C and as C++.
${CC:-cc} -std=c11 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -x c "$header"
${CXX:-g++} -std=c++17 -Wall -Wextra -Wpedantic -Werror -fsyntax-only -x c++ "$header"

# Every function and every error of the header has a test.
names=$(grep -o 'sft_[a-z0-9_]*(' "$header" | tr -d '(' | grep -v _error_message | sort -u)
names="$names sft_last_error_get_message $(grep -o 'SFT_ERROR_[A-Z0-9_]* =' "$header" | tr -d ' =')"
for name in $names; do
    grep -qw "$name" "$here"/*.c || { echo "tests/c has no test of $name" >&2; exit 1; }
done

# The dynamic linker looks for the soname, which is not a file of the build directory.
soname=$(objdump -p "$library/libsafetensors_torch.so" | awk '$1 == "SONAME" { print $2 }')
ln -s "$library/libsafetensors_torch.so" "$work/$soname"

for source in "$here"/*.c; do
    # shellcheck disable=SC2086 # flags are words
    ${CC:-cc} -std=c11 -D_DEFAULT_SOURCE -g -O1 -fno-omit-frame-pointer -Wall -Wextra -Werror ${CFLAGS:-} $sanitize \
        -DVECTORS="\"$here/../vectors\"" -I"$here/../../include" -c "$source" -o "$work/$(basename "$source" .c).o"
done

# run NAME LIBRARY...
run() {
    program=$work/$1
    printf '%s library: ' "$1"
    shift
    # shellcheck disable=SC2086 # as above
    ${CC:-cc} ${CFLAGS:-} "$work"/*.o -o "$program" $sanitize_link "$@"
    mkdir "$work/files"
    ASAN_OPTIONS=detect_leaks=1:${ASAN_OPTIONS:-} "$program" "$work/files"
    rm -rf "$work/files"
}

run shared -L"$library" -lsafetensors_torch -lpthread -Wl,-rpath,"$work"
run static "$library/libsafetensors_torch.a" -lgcc_s -lutil -lrt -lpthread -lm -ldl

# Load and unload the library while its threads run.
# shellcheck disable=SC2086 # as above
${CC:-cc} -std=c11 -D_DEFAULT_SOURCE -g -O1 -Wall -Wextra -Werror ${CFLAGS:-} $sanitize -I"$here/../../include" \
    -c "$here/unload/unload.c" -o "$work/unload.o"
# shellcheck disable=SC2086 # as above
${CC:-cc} ${CFLAGS:-} "$work/unload.o" -o "$work/unload" $sanitize_link -lpthread -ldl
mkdir "$work/files"
"$work/unload" "$library/libsafetensors_torch.so" "$work/files"
