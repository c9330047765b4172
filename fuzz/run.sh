#!/usr/bin/env bash
# Runs each fuzz target for a number of seconds, and prints executions, coverage and findings:
#
#     fuzz/run.sh SECONDS [TARGET...]
#
# Works with the stable compiler: coverage is an LLVM pass, the crate libfuzzer-sys contains libFuzzer, and rustc
# AddressSanitizer's runtime. FUZZ_SANITIZER=none disables AddressSanitizer, and is several times faster. Findings are
# written to target/fuzz/findings/TARGET, new inputs to target/fuzz/corpus/TARGET.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:?"fuzz/run.sh SECONDS [TARGET...]"}
shift
targets=("$@")
if test ${#targets[@]} = 0; then
    targets=(capi differential edit header incremental_writer index slice writer)
fi
host=$(rustc -vV | sed -n 's/^host: //p')
sanitizer=${FUZZ_SANITIZER:-address}
if ! ls "$(rustc --print sysroot)/lib/rustlib/$host/lib/"*.asan.a >/dev/null 2>&1; then
    sanitizer=none
fi

# The flags of cargo-fuzz.
flags=(--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module)
for flag in sanitizer-coverage-level=4 sanitizer-coverage-inline-8bit-counters sanitizer-coverage-pc-table \
    sanitizer-coverage-trace-compares simplifycfg-branch-fold-threshold=0; do
    flags+=("-Cllvm-args=-$flag")
done
if test "$sanitizer" != none; then
    flags+=("-Zsanitizer=$sanitizer")
fi
bins=("${targets[@]/#/--bin=}")
# AddressSanitizer is an unstable option of the compiler, which RUSTC_BOOTSTRAP enables.
RUSTC_BOOTSTRAP=1 RUSTFLAGS="${flags[*]}" cargo build --quiet --release --locked --manifest-path fuzz/Cargo.toml \
    --target "$host" --target-dir target/fuzz "${bins[@]}"

# The targets create and remove many files, and leave some when they end.
if test -z "${TMPDIR:-}" && test -w /dev/shm; then
    export TMPDIR=/dev/shm
fi
TMPDIR=$(mktemp -d)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
failed=0
table=$(printf '%-18s %8s %12s %9s %9s %9s' target seconds executions coverage features findings)
for target in "${targets[@]}"; do
    learned=target/fuzz/corpus/$target
    findings=target/fuzz/findings/$target
    log=target/fuzz/$target.log
    mkdir -p "$learned" "$findings"
    seeds=("fuzz/corpus/$target")
    options=()
    case $target in
    header | differential)
        seeds+=(tests/vectors/malformed)
        options+=(-dict=fuzz/header.dict)
        ;;
    capi | edit | index) options+=(-dict=fuzz/header.dict) ;;
    esac
    before=$(find "$findings" -type f | wc -l)
    begin=$(date +%s)
    if ! "target/fuzz/$host/release/$target" "$learned" "${seeds[@]}" "${options[@]}" -max_total_time="$seconds" \
        -max_len=4096 -timeout=20 -rss_limit_mb=3000 -print_final_stats=1 -artifact_prefix="$findings/" >"$log" 2>&1; then
        failed=1
        grep -E -A 3 'panicked at|ERROR:|SUMMARY:|Test unit written' "$log" >&2 || tail -n 30 "$log" >&2
    fi
    took=$(($(date +%s) - begin))
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    # Absent if a seed is a finding.
    coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    features=$(sed -n 's/.* ft: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    found=$(($(find "$findings" -type f | wc -l) - before))
    table+=$(printf '\n%-18s %8s %12s %9s %9s %9s' "$target" "$took" "${executions:-?}" "${coverage:-?}" "${features:-?}" "$found")
done
echo "sanitizer: $sanitizer"
echo "$table"
exit $failed
