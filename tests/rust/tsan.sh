#!/usr/bin/env bash
# The threads of the core under ThreadSanitizer: its unit tests, and those of the prefetcher and the incremental writer.
#
# The stable compiler has the sanitizer's runtime, but asks to be told that its user knows it may change. Its standard
# library is not instrumented: what that orders, the sanitizer knows (threads begin and end in libpthread), or
# src/sys/mutex.rs announces, or tsan.suppressions says that it is well.
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
cargo test --quiet --locked --no-default-features --target "$target" --target-dir target/tsan --lib --test prefetch \
    --test incremental_writer -- \
    --test-threads=1
