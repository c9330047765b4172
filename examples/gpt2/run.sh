#!/usr/bin/env bash
# From Python to C++ and back: makes a model, runs it in C++, writes it there, and checks what was written.
#
# Run:  PREFIX=... WORK=... [PYTHON=python3] [CMAKE=cmake] examples/gpt2/run.sh
#
# PREFIX: where `make install PREFIX=` put the library. WORK: a directory for the files (2.5 GB) and for the C++ build.
# PYTHON: one with torch and safetensors_torch; its libtorch is the one that the C++ program links.
set -euo pipefail
: "${PREFIX:?set it to the directory that make install wrote to}"
: "${WORK:?set it to a directory for the files of the demo}"
PYTHON=${PYTHON:-python3}
CMAKE=${CMAKE:-cmake}
PREFIX=$(realpath "$PREFIX")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

build() {
    local start torch log=$WORK/build.log
    start=$(date +%s%N)
    torch=$("$PYTHON" -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
    if ! {
        # -U: an earlier run may have found the library elsewhere, and the cache would stay with it.
        "$CMAKE" -S "$here" -B "$WORK/build" -U SafetensorsTorch_DIR \
            -DCMAKE_PREFIX_PATH="$PREFIX" -DLIBTORCH="$torch" &&
            "$CMAKE" --build "$WORK/build"
    } >"$log" 2>&1; then
        cat "$log" >&2
        return 1
    fi
    awk -v ns=$(($(date +%s%N) - start)) 'BEGIN {
        time = ns < 1e9 ? sprintf("%d ms", ns / 1e6) : sprintf("%.2f s", ns / 1e9)
        printf "%-8s%-14s%-62s%9s%9s\n", "CMake", "build", "forward.cpp, with the installed header and library", "", time
    }'
}

steps() {
    "$PYTHON" "$here/make_model.py" "$WORK"
    build
    "$WORK/build/forward" "$WORK"
    "$PYTHON" "$here/check.py" "$WORK"
}

# Lines that begin in the first column are steps; the others belong to the one before.
number() {
    awk '/^[^ ]/ { printf "%3d  ", ++step } { print; fflush() }'
}

mkdir -p "$WORK"
start=$(date +%s)
echo "GPT-2 small from Python to C++ and back, in $WORK"
echo
steps | number
echo
echo "Everything agrees. $(($(date +%s) - start)) s in all."
