#!/bin/bash
# Makes a golden store: a small store as this version writes it, and what must come out of it for ever.
# Run once for each new version of the format, as root, after `make build`; what it made before is never made again.
#   tests/data/make-golden.sh v1
set -euo pipefail
cd "$(dirname "$0")"
programs=$(realpath ../../target/release)
out=$PWD/${1:?usage: make-golden.sh VERSION}
[ ! -e "$out" ] || { echo "make-golden.sh: $out is there already; golden stores are never changed" >&2; exit 1; }
scratch=$(mktemp -d)
daemon=
stop() {
    [ -z "$daemon" ] || { kill -TERM "$daemon"; wait "$daemon" || true; }
    daemon=
}
trap 'stop; rm -rf "$scratch"' EXIT
mkdir -p "$out"
export REAP_STORE=file://$out/store

# page NUMBER KIND: 4096 bytes
page() {
    case $2 in
    zero) head -c 4096 /dev/zero ;;
    same) yes "the same everywhere" | head -c 4096 || true ;;
    text) seq -f "page $1 line %g of a guest's memory" 1 200 | head -c 4096 || true ;;
    esac
}
set +o pipefail
kinds=(text zero same text text zero zero same text text text zero same text zero text)
for number in $(seq 0 47); do page "$number" "${kinds[$((number % 16))]}"; done >"$scratch/memory"
seq 1 300 >"$scratch/state"
seq 1 900 | tac >"$scratch/root"
{ head -c $((40 * 4096)) "$scratch/memory"; for number in $(seq 100 107); do page "$number" text; done; } >"$scratch/memory2"
set -o pipefail

"$programs/reap-pack" init
"$programs/reap-pack" pack --name golden:v1 --memory "$scratch/memory" --state "$scratch/state" \
    --disk root="$scratch/root" --label base=golden --vmm firecracker --vmm-version 1.12.0
"$programs/reap-pack" pack --name golden:v2 --parent golden:v1 --memory "$scratch/memory2"
"$programs/reap-pack" pack --name gone --memory "$scratch/root"
"$programs/reap-pack" tag golden:v1 latest
"$programs/reap-pack" tag golden:v2 latest
"$programs/reap-pack" rm gone
"$programs/reap-pack" gc --yes

"$programs/reapd" run --cache "$scratch/cache" --mount "$scratch/mnt" --run-dir "$scratch/run" \
    --store "$REAP_STORE" --settle 1 --prepare golden:v1 2>"$scratch/log" &
daemon=$!
until [ -e "$scratch/run/ready" ]; do sleep 0.1; done
printf '%s\n' 3 4 0 1 2 9 5 30 31 >"$scratch/trace"
"$programs/reap-bench" touch "$scratch/memory" "$scratch/trace" socket "$scratch/run/uffd/golden:v1.sock"
until "$programs/reap-pack" ws export golden:v1 "$out/trace" 2>/dev/null; do sleep 0.2; done
stop
(cd "$scratch" && sha256sum memory state root >"$out/golden:v1.sha256")
(cd "$scratch" && mv memory2 memory && sha256sum memory >"$out/golden:v2.sha256")
cp "$out/golden:v2.sha256" "$out/latest.sha256"
du -sb "$out"
