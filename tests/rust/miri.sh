#!/usr/bin/env bash
# Runs the core under Miri, which detects undefined behaviour without symptoms: reads of uninitialized bytes, aliasing
# references, pointers without provenance.
#
#     rustup component add --toolchain nightly miri rust-src
#     tests/rust/miri.sh
#
# Only nightly compilers have Miri. It runs the unit tests, the tests of the format, and the corpora of the fuzz targets
# that work in memory, including the C functions. It supports plain files only: no file mappings, no unnamed files, and
# no mincore or madvise.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo "skipped: no nightly compiler with Miri, see $0"
    exit 0
fi
# The tests need temporary files and the time.
export MIRIFLAGS="-Zmiri-disable-isolation"
export PROPTEST_CASES=16
miri=(cargo +nightly miri test --quiet --locked --target-dir target/miri)
unsupported=(--skip edit:: --skip lock:: --skip page_cache:: --skip prefault:: --skip write::
    --skip the_machine_has_memory --skip a_page_is_resident_after_a_write --skip too_large_a_size_is_an_error)
"${miri[@]}" --lib -- "${unsupported[@]}"
# Tests with headers of many megabytes would take hours.
"${miri[@]}" --test format -- --skip time_is_about_linear --skip alignment_of_the_data \
    --skip unwritable_files_are_refused
RUSTFLAGS="--cfg fuzzing" "${miri[@]}" --manifest-path fuzz/Cargo.toml --test replay -- capi header index slice writer
echo "Miri: nothing found"
