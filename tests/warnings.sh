#!/usr/bin/env bash
# Compiles our own C++ with -Wall -Wextra -Werror and discards the result. Torch's headers are not checked. The public
# header gets more flags, because projects with these include it; tests/packaging/header_warnings.py checks it with
# other compilers and standards.
#
#     tests/warnings.sh SOURCE STAMP    one file, or - for the standard input; touches STAMP, and writes beside it what
#                                       it depends on, for make
#     tests/warnings.sh                 every file of cpp/, and the public header
#
# Needs the bridge that the release build generates.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=$(.venv/bin/python -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
bridge=$(ls -dt target/release/build/safetensors-torch-*/out/cxxbridge/include | head -n 1)

of_header=(-Wconversion -Wshadow)

check() {
    g++ -std=c++17 -fsyntax-only -Wall -Wextra -Wpedantic -Werror -I. -Iinclude -isystem "$bridge" \
        -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" "$@"
}

if [ $# -gt 0 ]; then
    mkdir -p "$(dirname "$2")"
    flags=()
    [ "$1" != - ] || flags=("${of_header[@]}")
    check "${flags[@]}" -MMD -MP -MF "${2%.stamp}.d" -MT "$2" -x c++ "$1"
    touch "$2"
    exit
fi
# Each by itself, so that each includes what it uses.
find cpp -name '*.cpp' ! -name layer.cpp | while read -r source; do
    check "$source"
done
check "${of_header[@]}" -x c++ - <<<'#include "safetensors_torch.hpp"'
echo "no warnings in cpp/ and include/"
