#!/bin/bash
# with-server.sh moto|radosgw COMMAND...: runs a command with an S3 server on loopback, whose bucket is s3://snapshots;
# the environment names the server. Installs it if need be; ends it, by its id, when the command ends.
set -euo pipefail
cd "$(dirname "$0")/../.."
fail() {
    echo "with-server.sh: $1" >&2
    exit 1
}
kind=${1:?usage: with-server.sh moto|radosgw COMMAND...}
shift
state=$(mktemp -d)
server=
trap '[ -z "$server" ] || { kill -TERM $server 2>/dev/null || true; wait $server 2>/dev/null || true; }; rm -rf "$state"' EXIT
trap 'exit 1' TERM INT
# free_port: one that is free now.
free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
case $kind in
moto)
    tests/servers/install.sh
    port=$(free_port)
    target/servers/moto/bin/python tests/servers/s3_mock.py "$port" >"$state/moto.out" 2>&1 &
    ;;
radosgw)
    tests/servers/install.sh radosgw ceph-mon ceph-osd
    port=$(free_port)
    tests/servers/radosgw.sh "$state" "$port" &
    ;;
*) fail "there is no server $kind" ;;
esac
server=$!
# What radosgw.sh does itself, when it is ready.
make_bucket() {
    python3 - "$port" 2>"$state/bucket.out" <<'PYTHON'
import sys, urllib.request
request = urllib.request.Request("http://127.0.0.1:" + sys.argv[1] + "/snapshots", method="PUT")
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5)
PYTHON
}
is_ready() {
    case $kind in
    moto) make_bucket ;;
    radosgw) [ -e "$state/ready" ] ;;
    esac
}
for _ in $(seq 600); do
    if is_ready; then break; fi
    kill -0 $server 2>/dev/null || fail "the server ended: $(tail -n 3 "$state"/*.out "$state"/log/*.out 2>/dev/null)"
    sleep 0.2
done
is_ready || fail "the server is not ready after two minutes"

export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret
export AWS_REGION=us-east-1 NO_PROXY=127.0.0.1 REAP_TEST_S3_SERVER=$server
[ ! -e "$state/radosgw.pid" ] || REAP_TEST_S3_SERVER=$(cat "$state/radosgw.pid")
"$@"
