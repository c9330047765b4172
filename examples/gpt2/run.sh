#!/usr/bin/env bash
# From Python to C++ and back: makes a model, runs and writes it in C++, and checks the result.
#
# Run:  PREFIX=... WORK=... [PYTHON=python3] [CMAKE=cmake] examples/gpt2/run.sh
#
# PREFIX: the prefix of `make install`. WORK: a directory for the files (2.5 GB) and the C++ build. PYTHON: has torch and
# safetensors_torch; the C++ program links its libtorch.
set -euo pipefail
: "${PREFIX:?set it to the prefix of make install}"
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
        # -U: an earlier run may have cached another prefix.
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

# Numbers the steps: lines that begin in the first column. Other lines belong to the previous step.
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
