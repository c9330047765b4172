#!/usr/bin/env bash
# Compiles and runs every program in docs/cpp.md against an installed tree, in the order in which they stand
# there, in one folder, and compares what they print with what is shown.
# Environment: PYTHON, PREFIX (an installed tree), WORK (a folder for what is built).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:?}" "${PREFIX:?}" "${WORK:?}"
libtorch=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
tests=$PWD/tests
passed=0

# Begins a new folder with the programs of a page.
begin() {
    rm -rf "$WORK/$1"
    mkdir -p "$WORK/$1/run"
    names=$("$PYTHON" tests/readme_block.py --programs "docs/$1.md" "$WORK/$1")
    cd "$WORK/$1"
}

# Runs a program, whose page shows what it prints in the file that is named first.
check() {
    local expected=$PWD/$1 output
    output=$(cd run && "${@:2}") || { echo "$1: the program failed, and printed: $output" >&2; exit 1; }
    diff -u --label "$1" "$expected" --label printed <(printf '%s\n' "$output") >&2 || exit 1
    passed=$((passed + 1))
}

begin cpp
sources=$(grep '\.cpp$' <<<"$names")
# shellcheck disable=SC2086 # names without spaces
"$PYTHON" "$tests/one_program.py" $sources >all.cpp
g++ -std=c++17 -Wall -Wextra -Werror all.cpp -I"$PREFIX/include" -isystem "$libtorch/include" \
    -isystem "$libtorch/include/torch/csrc/api/include" -L"$PREFIX/lib" -Wl,--as-needed -lsafetensors_torch \
    -L"$libtorch/lib" -ltorch_cpu -lc10 -pthread -Wl,-rpath,"$PREFIX/lib:$libtorch/lib" -o all
for source in $sources; do
    check "$source.expected" "$PWD/all" "${source%.cpp}"
done
cd - >/dev/null

echo "programs in docs/cpp.md: $passed passed, 0 failed"
