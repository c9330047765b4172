#!/usr/bin/env bash
# Runs the tests of the core that use threads under ThreadSanitizer: unit tests, prefetcher, prefetch loader and
# incremental writer.
#
# The stable compiler has the runtime of the sanitizer, but enables it only with RUSTC_BOOTSTRAP. The standard library
# is not instrumented. The sanitizer intercepts libpthread itself, src/sys/mutex.rs announces its locks, and
# tsan.suppressions lists the rest.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$(rustc -vV | sed -n 's/^host: //p')
if ! ls "$(rustc --print sysroot)/lib/rustlib/$target/lib/"*tsan* >/dev/null 2>&1; then
    echo "skipped: this compiler comes without ThreadSanitizer"
    exit 0
fi
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer --cfg tsan"
export TSAN_OPTIONS="suppressions=$PWD/tests/rust/tsan.suppressions"
cargo test --quiet --locked --target "$target" --target-dir target/tsan --lib --test prefetch --test prefetch_loader \
    --test incremental_writer -- \
    --test-threads=1
