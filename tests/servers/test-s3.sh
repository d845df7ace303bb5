#!/bin/bash
# `make test-s3`: the tests over S3's protocol against a real server, Ceph's radosgw, which is installed if need be.
set -euo pipefail
cd "$(dirname "$0")/../.."
fail() {
    echo "test-s3.sh: $1" >&2
    exit 1
}
tests/servers/install.sh radosgw ceph-mon ceph-osd

state=$(mktemp -d)
port=7480
tests/servers/radosgw.sh "$state" $port &
server=$!
trap 'kill -TERM $server 2>/dev/null || true; wait $server 2>/dev/null || true; rm -rf "$state"' EXIT
for _ in $(seq 600); do
    [ ! -e "$state/ready" ] || break
    kill -0 $server 2>/dev/null || fail "the server ended: $(tail -n 3 "$state"/log/*.out 2>/dev/null)"
    sleep 0.2
done
[ -e "$state/ready" ] || fail "the server is not ready after two minutes"

export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret
export AWS_REGION=us-east-1 NO_PROXY=127.0.0.1 REAP_TEST_S3_SERVER
REAP_TEST_S3_SERVER=$(cat "$state/radosgw.pid")
failed=0
for test in through_s3 s3_away; do
    REAP_TEST_S3_STORE=s3://snapshots/$test cargo test --release --locked -p reap-tests \
        --test end_to_end -- --exact "remote::$test" || failed=$((failed + 1))
done
echo "$((2 - failed)) passed, $failed failed"
[ $failed = 0 ]
