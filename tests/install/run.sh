#!/usr/bin/env bash
# Installs the library with `make install`, and with cargo-c if it exists, and uses it as its users do: from CMake with every
# kind of libtorch, with pkg-config, and from the Python package. Then checks the errors of a wrong use.
#
# Environment: PYTHON (with torch and pip), WORK (a build directory).
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${PYTHON:?}" "${WORK:?}"
MAKE=${MAKE:-make}
PKG_CONFIG=${PKG_CONFIG:-pkg-config}
rm -rf "$WORK"
mkdir -p "$WORK"
WORK=$(cd "$WORK" && pwd)
torch=$("$PYTHON" -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
major=${version%%.*}
passed=0
unset LIBTORCH CMAKE_PREFIX_PATH PKG_CONFIG_PATH LD_LIBRARY_PATH Torch_DIR CMAKE_GENERATOR

fail() {
    echo "tests/install: $*" >&2
    exit 1
}

pass() {
    passed=$((passed + 1))
    echo "  $*"
}

source tests/install/trees.sh
source tests/install/programs.sh
source tests/install/mistakes.sh

install_trees
check_trees
build_programs
check_mistakes
echo "install: $passed passed, 0 failed"
