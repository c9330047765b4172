#!/usr/bin/env bash
# Builds and runs every example but the demo, each the way its first lines say, and the code in README.md, against
# installed trees.
# Environment: PYTHON, PREFIX (an installed tree), C_PREFIX (one without torch), WORK (a folder for what is built).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:?}" "${PREFIX:?}" "${C_PREFIX:?}" "${WORK:?}"
mkdir -p "$WORK"
libtorch=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
sample="$WORK/sample.safetensors"

# Stops unless the text on standard input has a line that matches.
expect() {
    local output
    output=$(cat)
    grep -Eq "$1" <<<"$output" || { echo "no line matches '$1' in:"; echo "$output"; exit 1; }
}

pytest() {
    "$PYTHON" -m pytest -q "tests/examples/test_$1.py"
}

"$PYTHON" examples/python/quickstart.py "$sample" | expect '^weight +torch.float32 +\(3, 4\)'

make -s -C examples/c/inspect clean
make -s -C examples/c/inspect PREFIX="$C_PREFIX"
examples/c/inspect/inspect "$sample" | expect '^  F32 +48  weight \[3, 4\]$'
INSPECT=examples/c/inspect/inspect pytest inspect
make -s -C examples/c/inspect clean

builds=()
for example in convert finetune inference torchscript; do
    {
        cmake -S "examples/cpp/$example" -B "$WORK/$example" "-DCMAKE_PREFIX_PATH=$PREFIX" "-DLIBTORCH=$libtorch"
        cmake --build "$WORK/$example"
    } >/dev/null &
    builds+=($!)
done
for build in "${builds[@]}"; do
    wait "$build"
done
CONVERT="$WORK/convert/convert" pytest convert
FINETUNE="$WORK/finetune/finetune" pytest finetune
INFERENCE="$WORK/inference/inference" pytest inference
"$PYTHON" examples/cpp/torchscript/make_module.py "$WORK/scripted"
"$WORK/torchscript/torchscript" "$WORK/scripted" | expect '^second: equal to Python'

readme="$WORK/readme"
mkdir -p "$readme"
for block in python:use.py cpp:app.cpp cmake:link.cmake c:app.c; do
    "$PYTHON" tests/readme_block.py "${block%%:*}" >"$readme/${block#*:}"
done
cat >"$readme/CMakeLists.txt" <<'CMAKE'
cmake_minimum_required(VERSION 3.18)
project(app LANGUAGES CXX)
add_executable(app app.cpp)
include(link.cmake)
CMAKE
(
    cd "$readme"
    "$PYTHON" use.py
    cc -std=c11 app.c -I"$C_PREFIX/include" -L"$C_PREFIX/lib" -Wl,-rpath,"$C_PREFIX/lib" -lsafetensors_torch -o app-c
    ./app-c | expect '^-?[0-9]+\.[0-9]+$'
    cmake -B build "-DCMAKE_PREFIX_PATH=$PREFIX" "-DLIBTORCH=$libtorch" >/dev/null
    cmake --build build >/dev/null
    build/app | expect '^weight \[3, 4\]$'
)
echo "examples and README: 9 passed, 0 failed"
