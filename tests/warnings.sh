#!/usr/bin/env bash
# Compiles our own C++ with -Wall -Wextra -Werror and discards the result. Torch's headers are not checked. The public
# headers get more flags, because projects with these include them; tests/packaging/header_warnings.py checks them with
# other compilers and standards.
#
#     tests/warnings.sh SOURCE STAMP    one file, or - for the public headers; touches STAMP, and writes beside it what
#                                       it depends on, for make
#     tests/warnings.sh                 every file of cpp/, and the public headers
#
# Needs the bridge that the release build generates.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=$(.venv/bin/python -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
bridge=$(ls -dt target/release/build/safetensors-torch-*/out/cxxbridge/include | head -n 1)

of_headers=(-Wconversion -Wshadow)
headers=(safetensors_torch.hpp safetensors_torch/aoti.hpp safetensors_torch/optimizer.hpp)

check() {
    g++ -std=c++17 -fsyntax-only -Wall -Wextra -Wpedantic -Werror -I. -Iinclude -isystem "$bridge" \
        -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" "$@"
}

if [ $# -gt 0 ]; then
    mkdir -p "$(dirname "$2")"
    depend=(-MMD -MP -MF "${2%.stamp}.d" -MT "$2")
    if [ "$1" = - ]; then
        printf '#include "%s"\n' "${headers[@]}" | check "${of_headers[@]}" "${depend[@]}" -x c++ -
    else
        check "${depend[@]}" "$1"
    fi
    touch "$2"
    exit
fi
# Each by itself, so that each includes what it uses.
find cpp -name '*.cpp' ! -name layer.cpp | while read -r source; do
    check "$source"
done
printf '#include "%s"\n' "${headers[@]}" | check "${of_headers[@]}" -x c++ -
echo "no warnings in cpp/ and include/"
