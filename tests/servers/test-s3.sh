#!/bin/bash
# The tests that need an S3 server, and the store's own suite over it; ends with a line that counts them, like
# run.sh. Run by with-server.sh; for the mock (`moto`) only the suite: `cargo test` starts one for the others.
set -uo pipefail
cd "$(dirname "$0")/../.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
run() {
    cargo test --release --workspace --locked "$@" 2>&1 | tee -a "$log"
    [ "${PIPESTATUS[0]}" = 0 ] || status=1
}
# About files of a local store, or too many requests (for the mock, which answers one at a time, even more so).
skipped=(--skip damage_anywhere --skip wrong_input_is_refused --skip verify_levels --skip pages_in_condemned_packs)
[ "${1:-}" != moto ] || skipped+=(--skip packers_and_collectors_at_the_same_time)
REAP_TEST_S3_STORE=s3://snapshots/suite run --test store -- "${skipped[@]}"
if [ "${1:-}" != moto ]; then
    for test in through_s3 s3_away; do
        REAP_TEST_S3_STORE=s3://snapshots/$test run --test end_to_end -- --exact "remote::$test"
    done
fi
count() {
    sed -n "s/^test result: .* \([0-9]*\) $1.*/\1/p" "$log" | awk '{ sum += $1 } END { print sum + 0 }'
}
echo "over S3: $(count passed) passed, $(count failed) failed"
exit $status
