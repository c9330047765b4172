#!/usr/bin/env bash
# Builds and runs every example except the demo, as its first lines describe, and the code in README.md, against installed
# trees.
# Environment: PYTHON, PREFIX (an installed tree), C_PREFIX (one without torch), WORK (a build directory).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:?}" "${PREFIX:?}" "${C_PREFIX:?}" "${WORK:?}"
mkdir -p "$WORK"
root=$PWD
libtorch=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
sample="$WORK/sample.safetensors"

# expect PATTERN: fails unless a line of standard input matches.
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

# An unpacked libtorch: these three directories, without Python's files.
unpacked="$WORK/libtorch"
mkdir -p "$unpacked"
for part in include lib share; do
    ln -sfn "$libtorch/$part" "$unpacked/$part"
done

# configure SOURCE NAME ARGUMENT...: the example in $WORK/SOURCE/NAME.
configure() {
    cmake -S "examples/cpp/$2" -B "$WORK/$1/$2" "${@:3}" >/dev/null
}

build() {
    cmake --build "$WORK/$1/$2" >/dev/null
}

# Debian has curl-config and the headers in one package.
s3=
if command -v curl-config >/dev/null; then
    s3=s3
fi
# shellcheck disable=SC2086 # no word, or one
for example in aoti convert finetune inference torchscript $s3; do
    configure pypi "$example" "-DCMAKE_PREFIX_PATH=$PREFIX;$libtorch/share/cmake"
    configure unpacked "$example" "-DCMAKE_PREFIX_PATH=$PREFIX" "-DLIBTORCH=$unpacked"
done
cmake -S tests/cpp -B "$WORK/tests-cpp" "-DCMAKE_PREFIX_PATH=$PREFIX;$libtorch/share/cmake" >/dev/null
# Two at a time: most of the time is spent on parsing torch's headers. The unpacked libtorch has the same headers and
# libraries as the package, so one program shows that it is found.
(build pypi convert && build pypi torchscript && build unpacked inference) &
first=$!
build pypi aoti
cmake --build "$WORK/tests-cpp" --target aoti_tests >/dev/null
build pypi finetune
build pypi inference
if [ -n "$s3" ]; then
    build pypi s3
fi
wait "$first"
AOTI="$WORK/pypi/aoti/aoti" AOTI_TESTS="$WORK/tests-cpp/aoti_tests" pytest aoti
CONVERT="$WORK/pypi/convert/convert" pytest convert
FINETUNE="$WORK/pypi/finetune/finetune" pytest finetune
INFERENCE="$WORK/pypi/inference/inference" pytest inference
INFERENCE="$WORK/unpacked/inference/inference" pytest inference
ldd "$WORK/unpacked/inference/inference" | expect "=> $unpacked/lib/libtorch_cpu.so "
if [ -n "$s3" ]; then
    S3="$WORK/pypi/s3/s3" pytest s3
else
    echo "libcurl is missing: examples/cpp/s3 is not tested" >&2
fi
"$PYTHON" examples/cpp/torchscript/make_module.py "$WORK/scripted"
"$WORK/pypi/torchscript/torchscript" "$WORK/scripted" | expect '^second: equal to Python'

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
    # The commands of README.md, with the directory of this installation. The environment names no library.
    commands=$(grep -A 1 '^cc ' "$root/README.md" | sed "s|/opt/safetensors-c|$C_PREFIX|g")
    [ "$(wc -l <<<"$commands")" = 2 ] || { echo "README.md: expected the two commands that build and run C, found: $commands"; exit 1; }
    rm -f app
    (unset LD_LIBRARY_PATH; eval "$commands") | expect '^-?[0-9]+\.[0-9]+$'
    cmake -B build "-DCMAKE_PREFIX_PATH=$PREFIX" "-DLIBTORCH=$libtorch" >/dev/null
    cmake --build build >/dev/null
    build/app | expect '^weight \[3, 4\]$'
)
echo "examples and README: all passed"
