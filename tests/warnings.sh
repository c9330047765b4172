#!/usr/bin/env bash
# Compiles our own C++ with -Wall -Wextra -Werror and throws the result away. Torch's headers are not ours.
# Takes the generated bridge from the release build, which `make lint` makes first.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=$(.venv/bin/python -c 'import os, torch; print(os.path.dirname(torch.__file__))')
bridge=$(ls -dt target/release/build/safetensors-torch-*/out/cxxbridge/include | head -n 1)

check() {
    g++ -std=c++17 -fsyntax-only -Wall -Wextra -Wpedantic -Werror -I. -Iinclude -isystem "$bridge" \
        -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" "$@"
}

# Each by itself, so that each includes what it uses; layer.cpp has them all.
for source in $(find cpp -name "*.cpp"); do
    [ "$source" = cpp/layer.cpp ] || check "$source"
done
[ "$(grep -c '^#include' cpp/layer.cpp)" = "$(($(find cpp -name "*.cpp" | wc -l) - 1))" ] || {
    echo "cpp/layer.cpp does not include every other file of cpp/" >&2
    exit 1
}
check -x c++ - <<<'#include "safetensors_torch.hpp"'
echo "no warnings in cpp/ and include/"
