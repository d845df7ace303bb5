#!/bin/bash
# A real S3 server on loopback: Ceph's radosgw over one monitor and one object daemon in memory, with all state
# in DIR. Stays in the foreground; ends its own processes when it ends. Writes DIR/ready when the bucket
# "snapshots" is there, and DIR/radosgw.pid.
set -euo pipefail
directory=$(realpath -m "${1:?usage: radosgw.sh DIR PORT}")
port=${2:?usage: radosgw.sh DIR PORT}
python=$(dirname "$(realpath "$0")")/../../target/servers/moto/bin/python
mkdir -p "$directory"/{mon,osd,rgw,run,log}
cd "$directory"
children=()
stop() {
    for child in "${children[@]}"; do kill -9 "$child" 2>/dev/null || true; done
    wait
}
trap "stop 2>/dev/null" EXIT
trap 'exit 0' TERM INT

cluster=$(cat /proc/sys/kernel/random/uuid)
monitors='[v2:127.0.0.1:3300,v1:127.0.0.1:6789]'
cat >ceph.conf <<CONF
[global]
fsid = $cluster
mon initial members = a
mon host = $monitors
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $directory/admin.keyring
ms bind ipv6 = false
run dir = $directory/run
pid file = $directory/run/\$name.pid
admin socket = $directory/run/\$name.asok
log file = $directory/log/\$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 2000
[mon]
mon data = $directory/mon
[osd]
osd data = $directory/osd
keyring = $directory/osd/keyring
osd objectstore = memstore
memstore device bytes = 4294967296
[client.admin]
rgw data = $directory/rgw
CONF
export CEPH_CONF=$directory/ceph.conf

# run NAME COMMAND...: in the background, with its output in log/.
run() {
    local name=$1
    shift
    "$@" >"log/$name.out" 2>&1 &
    children+=($!)
}
# until_true SECONDS COMMAND...
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { echo "radosgw.sh: gave up on: $*" >&2; exit 1; }
        sleep 0.2
    done
}

ceph-authtool --create-keyring mon.keyring --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool --create-keyring admin.keyring --gen-key -n client.admin \
    --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
ceph-authtool mon.keyring --import-keyring admin.keyring >/dev/null
monmaptool --create --addv a "$monitors" --fsid "$cluster" --clobber monmap >/dev/null
ceph-mon -i a --mkfs --monmap monmap --keyring mon.keyring
run mon ceph-mon -i a -f
until_true 60 timeout 5 ceph -s

osd=$(cat /proc/sys/kernel/random/uuid)
ceph osd new "$osd" 0 >/dev/null
ceph auth get-or-create osd.0 mon 'allow profile osd' osd 'allow *' -o osd/keyring
ceph-osd -i 0 --mkfs --osd-uuid "$osd" >log/osd-mkfs.out 2>&1
run osd ceph-osd -i 0 -f
ceph osd crush add osd.0 1.0 root=default host=here >/dev/null 2>&1 || true
is_up() { ceph osd stat | grep -q '1 up'; }
until_true 60 is_up

# Without tcp_nodelay small answers wait 40 ms for an acknowledgement on loopback.
run radosgw radosgw -n client.admin -f --rgw-frontends="beast endpoint=127.0.0.1:$port tcp_nodelay=1"
echo "${children[-1]}" >radosgw.pid
answers() { (exec 3<>"/dev/tcp/127.0.0.1/$port"); }
until_true 120 answers
radosgw-admin user create --uid=tests --display-name=tests --access-key=key --secret=secret >/dev/null 2>&1
NO_PROXY=127.0.0.1 "$python" - "$port" <<'PYTHON'
import sys, boto3
boto3.client("s3", endpoint_url="http://127.0.0.1:" + sys.argv[1], region_name="us-east-1",
             aws_access_key_id="key", aws_secret_access_key="secret").create_bucket(Bucket="snapshots")
PYTHON
touch ready
wait
