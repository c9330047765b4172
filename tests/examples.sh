#!/usr/bin/env bash
# Builds and runs every example but the demo, each the way its first lines say, against an installed tree.
# Environment: PYTHON, PREFIX (the installed tree), WORK (a folder for what is built and written).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:?}" "${PREFIX:?}" "${WORK:?}"
mkdir -p "$WORK"
torch_dir=$("$PYTHON" -c 'import torch; print(torch.utils.cmake_prefix_path)')
sample="$WORK/sample.safetensors"

"$PYTHON" examples/python/quickstart.py "$sample"

cmake -S examples/cpp -B "$WORK/cpp" -DCMAKE_BUILD_TYPE=Release "-DCMAKE_PREFIX_PATH=$PREFIX;$torch_dir" >/dev/null
cmake --build "$WORK/cpp" >/dev/null
