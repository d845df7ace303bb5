#!/bin/bash
# Runs all tests and ends with one line that counts them. Fails when a test failed, when one was
# ignored, or when something is left mounted.
set -uo pipefail
cd "$(dirname "$0")/.."

for device in /dev/fuse /dev/userfaultfd; do
    if [ ! -e $device ]; then
        echo "run.sh: there is no $device: the tests that need it cannot run here" >&2
        exit 1
    fi
done
[ -e /dev/kvm ] || echo "run.sh: there is no /dev/kvm: no guest code is run on a vCPU" >&2
mounts() { grep -c ' - fuse[^ ]* reap ' /proc/self/mountinfo; }
before=$(mounts)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

status=0
cargo fmt --all --check || status=1
cargo clippy --release --workspace --all-targets --features reap-fuzz/libfuzzer --locked -- -D warnings || status=1
cargo test --release --workspace --locked --no-fail-fast 2>&1 | tee "$log"
[ "${PIPESTATUS[0]}" = 0 ] || status=1
./fuzz/run.sh short || status=1
# The store's own suite once more, over S3's protocol.
tests/servers/with-server.sh moto tests/servers/test-s3.sh moto 2>&1 | tee -a "$log"
[ "${PIPESTATUS[0]}" = 0 ] || status=1

count() {
    sed -n "s/^test result: .* \([0-9]*\) $1.*/\1/p" "$log" | awk '{ sum += $1 } END { print sum + 0 }'
}
passed=$(count passed) failed=$(count failed) ignored=$(count ignored)
if [ "$(mounts)" -gt "$before" ]; then
    echo "run.sh: a test left something mounted" >&2
    status=1
fi
if [ "$ignored" -gt 0 ]; then
    echo "run.sh: $ignored tests were ignored" >&2
    status=1
fi
if [ "$status" != 0 ] && [ "$failed" = 0 ]; then
    echo "run.sh: the tests passed, but not everything else did: see above" >&2
fi
echo "$passed passed, $failed failed"
exit $status
