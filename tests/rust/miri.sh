#!/usr/bin/env bash
# The core under Miri, which sees undefined behaviour that leaves no trace: uninitialized bytes that are read,
# references that must not exist, pointers that lost what they point into.
#
#     rustup component add --toolchain nightly miri rust-src
#     tests/rust/miri.sh
#
# Only nightly compilers have Miri. It runs what needs nothing of the kernel but plain files: the unit tests, those of
# the format, and the corpus of the fuzz targets that work in memory, the C functions among them, with the shared
# vectors. It has neither mappings of files nor files without a name, nor the calls that ask for or advise on pages.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo "skipped: no nightly compiler with Miri, see $0"
    exit 0
fi
# The directory for temporary files, and the time, are there.
export MIRIFLAGS="-Zmiri-disable-isolation"
export PROPTEST_CASES=16
miri=(cargo +nightly miri test --quiet --locked --no-default-features --target-dir target/miri)
lacking=(--skip edit:: --skip lock:: --skip page_cache:: --skip prefault:: --skip write::
    --skip the_machine_has_memory --skip a_page_is_resident_after_a_write --skip too_large_a_size_is_an_error)
"${miri[@]}" --lib -- "${lacking[@]}"
# Not those of headers of many megabytes, which would take hours.
"${miri[@]}" --test format -- --skip time_is_about_linear --skip alignment_of_the_data \
    --skip what_is_not_written
RUSTFLAGS="--cfg fuzzing" "${miri[@]}" --manifest-path fuzz/Cargo.toml --test replay -- capi header index slice writer
echo "Miri: nothing found"
