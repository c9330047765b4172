#!/usr/bin/env bash
# Compiles and runs every program in docs/cpp.md, docs/c.md and tests/guesses/cpp against installed trees, and runs those in
# docs/python.md.
# The programs of a page run in their order, in one directory; their output must be the one on the page. Also runs the
# pages' build commands.
# Environment: PYTHON, PREFIX (an installed tree), C_PREFIX (one without torch), WORK (a build directory).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:?}" "${PREFIX:?}" "${C_PREFIX:?}" "${WORK:?}"
libtorch=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
tests=$PWD/tests
passed=0

# begin PAGE: writes the programs of the page to a new directory, and enters it.
begin() {
    rm -rf "$WORK/$1/run" "$WORK/$1/"*.expected
    mkdir -p "$WORK/$1/run"
    page=$PWD/docs/$1.md
    names=$("$PYTHON" tests/readme_block.py --programs "docs/$1.md" "$WORK/$1")
    cd "$WORK/$1"
}

# check EXPECTED COMMAND...: runs the program, and compares its output with the file EXPECTED.
check() {
    local expected=$PWD/$1 output
    output=$(cd run && "${@:2}") || { echo "$1: the program failed; its output: $output" >&2; exit 1; }
    diff -u --label "$1" "$expected" --label printed <([ -z "$output" ] || printf '%s\n' "$output") >&2 || exit 1
    passed=$((passed + 1))
}

begin cpp
sources=$(grep '\.cpp$' <<<"$names")
# shellcheck disable=SC2086 # names without spaces
"$PYTHON" "$tests/one_program.py" $sources "$tests"/guesses/cpp/*.cpp >new.cpp
# Compiled again only if the page or the installed tree has changed.
if ! cmp -s new.cpp all.cpp || [ -n "$(find "$PREFIX/" -newer all 2>&1 | head -n 1)" ]; then
    g++ -std=c++17 -Wall -Wextra -Wconversion -Wshadow -Werror new.cpp -I"$PREFIX/include" -isystem "$libtorch/include" \
        -isystem "$libtorch/include/torch/csrc/api/include" -L"$PREFIX/lib" -Wl,--as-needed -lsafetensors_torch \
        -L"$libtorch/lib" -ltorch_cpu -lc10 -pthread -Wl,-rpath,"$PREFIX/lib:$libtorch/lib" -o all
    mv new.cpp all.cpp
fi
for source in $sources; do
    check "$source.expected" "$PWD/all" "${source%.cpp}"
done
for source in $(grep '\.py$' <<<"$names"); do
    check "$source.expected" "$PYTHON" "$PWD/$source"
done
# Programs as people write them who know torch and safetensors. They check their results themselves.
mkdir run/guesses
for guess in "$tests"/guesses/cpp/*.cpp; do
    name=$(basename "$guess" .cpp)
    output=$(cd run/guesses && "$PWD/../../all" "$name" 2>&1) ||
        { echo "tests/guesses/cpp/$name.cpp failed; its output: $output" >&2; exit 1; }
    passed=$((passed + 1))
done
cp load.cpp app.cpp
cmake -B build "-DCMAKE_PREFIX_PATH=$PREFIX;$libtorch" >/dev/null # the examples compile it
cd - >/dev/null

begin c
for source in $(grep '\.c$' <<<"$names"); do
    cc -std=c11 -Wall -Wextra -Wpedantic -Werror "$source" -I"$C_PREFIX/include" -L"$C_PREFIX/lib" \
        -lsafetensors_torch_c -pthread -Wl,-rpath,"$C_PREFIX/lib" -o "${source%.c}"
    check "$source.expected" "$PWD/${source%.c}"
done
cp map.c app.c
cmake -B build "-DCMAKE_PREFIX_PATH=$C_PREFIX" >/dev/null
cmake --build build >/dev/null
check map.c.expected "$PWD/build/app"
# The commands of the page, with the prefix of this installation.
export PKG_CONFIG_PATH=$C_PREFIX/lib/pkgconfig
commands=$(grep -o '`cc -std=c11 app.c [^`]*`' "$page" | tr -d '`' | sed "s|/opt/safetensors-c|$C_PREFIX|g")
test "$(wc -l <<<"$commands")" = 3 || { echo "docs/c.md: expected three build commands, found: $commands" >&2; exit 1; }
while read -r command; do
    rm -f app
    eval "$command"
    check map.c.expected "$PWD/app"
done <<<"$commands"
cd - >/dev/null

begin python
for source in $names; do
    touch "$source.expected" # some programs print nothing
    check "$source.expected" "$PYTHON" "$PWD/$source"
done
cd - >/dev/null
echo "programs in docs/cpp.md, docs/c.md, docs/python.md and tests/guesses/cpp: $passed passed, 0 failed"
