#!/bin/sh
# Has every system call of a save fail in turn, then every allocation, with the shared library in the directory that is given:
#
#     cargo build --release --target-dir target/core
#     tests/faults/run.sh target/core/release
set -eu
library=$(cd "${1:?usage: $0 DIRECTORY_OF_THE_LIBRARY}" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
# In memory, where there is such a filesystem: thousands of files are made and removed.
files=$(mktemp -d -p /dev/shm 2>/dev/null || mktemp -d)
trap 'rm -rf "$work" "$files"' EXIT
soname=$(objdump -p "$library/libsafetensors_torch.so" | awk '$1 == "SONAME" { print $2 }')
ln -s "$library/libsafetensors_torch.so" "$work/$soname"
ln -s "$soname" "$work/libsafetensors_torch.so"
# Definitions of open, malloc and so on of their own are for the library to find.
build() {
    name=$1
    shift
    ${CC:-cc} -std=c11 -D_GNU_SOURCE -g -O1 -Wall -Wextra -Werror -rdynamic "$@" -I"$here/../../include" -I"$here/../torture" \
        -L"$work" -lsafetensors_torch -ldl -Wl,-rpath,"$work" -o "$work/$name"
    mkdir "$files/$name"
    "$work/$name" "$files/$name"
}
build faults "$here/faults.c" "$here/scenarios.c" "$here/inject.c" "$here/../torture/common.c"
build memory "$here/memory.c"
