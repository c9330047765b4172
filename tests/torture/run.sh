#!/bin/sh
# Hard tests of saving and loading, with the shared library in the directory that is given:
#
#     cargo build --release --target-dir target/core
#     tests/torture/run.sh target/core/release [PROGRAM...]
#
# PROGRAM is "kills", "order", "manners", "changes", "leaks", "soak", "attacks" or "power", "quick" for those that take
# seconds alone, or nothing for all. KILLS (500) and SOAK (600 seconds) say how much; with PYTHON, the leaks of the Python
# package are looked for too. Each prints a line with its figures. "power" waits most of its time, so it runs beside the
# others.
set -eu
library=$(cd "${1:?usage: $0 DIRECTORY_OF_THE_LIBRARY [PROGRAM...]}" && pwd)
shift
here=$(cd "$(dirname "$0")" && pwd)
case ${*:-all} in
    all) set -- power order manners changes attacks leaks kills soak ;;
    quick) set -- power order manners changes attacks ;;
esac
work=$(mktemp -d)
# In memory, where there is such a filesystem: images of disks.
images=$(mktemp -d -p /dev/shm 2>/dev/null || mktemp -d)
power=
trap '[ -z "$power" ] || { kill "$power" || :; wait "$power" || :; }; rm -rf "$work" "$images"' EXIT
soname=$(objdump -p "$library/libsafetensors_torch.so" | awk '$1 == "SONAME" { print $2 }')
ln -s "$library/libsafetensors_torch.so" "$work/$soname"
ln -s "$soname" "$work/libsafetensors_torch.so"
failed=
for program in "$@"; do
    set -- "$here/$program.c" "$here/common.c"
    [ "$program" != manners ] || set -- "$@" "$here/disk.c" "$here/filesystem.c"
    # -rdynamic: some have definitions of system calls that the library is to find.
    ${CC:-cc} -std=c11 -D_GNU_SOURCE -g -O2 -Wall -Wextra -Werror -rdynamic "$@" \
        -I"$here/../../include" -L"$work" -lsafetensors_torch -lpthread -ldl -Wl,-rpath,"$work" -o "$work/$program"
    if [ "$program" = power ]; then
        "$work/power" "$images" >"$work/power.txt" 2>&1 &
        power=$!
        continue
    fi
    mkdir "$work/files"
    case $program in
        kills) amount=${KILLS:-500} ;;
        soak) amount=${SOAK:-600} ;;
        *) amount= ;;
    esac
    # One that fails keeps none of the others from running.
    "$work/$program" "$work/files" ${amount:+"$amount"} || failed="$failed $program"
    if [ "$program" = leaks ] && [ -n "${PYTHON:-}" ]; then
        "$PYTHON" "$here/leaks.py" "$work/files" || failed="$failed leaks.py"
    fi
    rm -rf "$work/files"
done
if [ -n "$power" ]; then
    wait "$power" || failed="$failed power"
    power=
    cat "$work/power.txt"
fi
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
