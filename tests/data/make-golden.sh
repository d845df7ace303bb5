#!/bin/bash
# Makes a golden store: a small store as this version writes it, and what must come out of it for ever.
# Run once for each new version of the format, as root, after `make build`; what it made before is never made again.
#   tests/data/make-golden.sh v1        parents, names that moved, a removed snapshot, a working set
#   tests/data/make-golden.sh v1-diff   diff snapshots over each other, a frame that is not compressed, two disks
# PROGRAMS=DIR takes the programs from there.
set -euo pipefail
cd "$(dirname "$0")"
programs=$(realpath "${PROGRAMS:-../../target/release}")
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
    noise) openssl enc -aes-128-ctr -K 00 -iv "$(printf %032x "$1")" -in /dev/zero 2>/dev/null | head -c 4096 || true ;;
    text) seq -f "page $1 line %g of a guest's memory" 1 200 | head -c 4096 || true ;;
    esac
}
set +o pipefail
kinds=(text zero same text text zero zero same text text text zero same text zero text)
case $out in *-diff) kinds=(text zero same zero text zero text zero) ;; esac
for number in $(seq 0 47); do page "$number" "${kinds[$((number % ${#kinds[@]}))]}"; done >"$scratch/memory"
seq 1 300 >"$scratch/state"
seq 1 900 | tac >"$scratch/root"
set -o pipefail
"$programs/reap-pack" init

# diff NUMBER PAGE KIND...: a file as long as memory, with these pages and holes
diff() {
    truncate -s $((48 * 4096)) "$scratch/diff$1"
    for ((at = 2; at < $#; at += 2)); do
        set +o pipefail
        page $((1000 * $1 + ${!at})) "${@:at+1:1}" |
            dd of="$scratch/diff$1" bs=4096 seek="${!at}" conv=notrunc status=none
        set -o pipefail
    done
}
make_diffs() {
    "$programs/reap-pack" pack --name golden:v1 --memory "$scratch/memory" --state "$scratch/state" \
        --disk root="$scratch/root" --disk data="$scratch/state" --label base=golden
    diff 2 0 text 3 text 8 zero 9 same 40 zero
    diff 3 1 noise 9 zero 47 zero
    "$programs/reap-pack" pack --name golden:v2 --diff --parent golden:v1 --memory "$scratch/diff2"
    "$programs/reap-pack" pack --name golden:v3 --diff --parent golden:v2 --parent golden:v1 --memory "$scratch/diff3"
    # What must come out: each over the one before.
    local before=memory
    for number in 2 3; do
        cp "$scratch/$before" "$scratch/memory$number"
        for page in $(seq 0 47); do
            if written "$number" "$page"; then
                dd if="$scratch/diff$number" of="$scratch/memory$number" bs=4096 skip="$page" seek="$page" count=1 conv=notrunc status=none
            fi
        done
        before=memory$number
    done
}
# Whether a diff has the page.
written() {
    case $1 in
    2) [[ " 0 3 8 9 40 " == *" $2 "* ]] ;;
    3) [[ " 1 9 47 " == *" $2 "* ]] ;;
    esac
}
make_versions() {
    set +o pipefail
    { head -c $((40 * 4096)) "$scratch/memory"; for number in $(seq 100 107); do page "$number" text; done; } >"$scratch/memory2"
    set -o pipefail
    "$programs/reap-pack" pack --name golden:v1 --memory "$scratch/memory" --state "$scratch/state" \
        --disk root="$scratch/root" --label base=golden --vmm firecracker --vmm-version 1.12.0
    "$programs/reap-pack" pack --name golden:v2 --parent golden:v1 --memory "$scratch/memory2"
    "$programs/reap-pack" pack --name gone --memory "$scratch/root"
    "$programs/reap-pack" tag golden:v1 latest
    "$programs/reap-pack" tag golden:v2 latest
    "$programs/reap-pack" rm gone
    "$programs/reap-pack" gc --yes
}
case $out in *-diff) make_diffs ;; *) make_versions ;; esac

"$programs/reapd" run --cache "$scratch/cache" --mount "$scratch/mnt" --run-dir "$scratch/run" \
    --store "$REAP_STORE" --settle 1 --prepare golden:v1 2>"$scratch/log" &
daemon=$!
until [ -e "$scratch/run/ready" ]; do sleep 0.1; done
printf '%s\n' 3 4 0 1 2 9 5 30 31 >"$scratch/trace"
"$programs/reap-bench" touch "$scratch/memory" "$scratch/trace" socket "$scratch/run/uffd/golden:v1.sock"
until "$programs/reap-pack" ws export golden:v1 "$out/trace" 2>/dev/null; do sleep 0.2; done
stop
sums() { (cd "$scratch" && sha256sum "$@") >"$out/$name.sha256"; }
case $out in
*-diff)
    cp "$scratch/state" "$scratch/data"
    name=golden:v1 sums memory state root data
    for number in 2 3; do
        cp "$scratch/memory$number" "$scratch/memory"
        name=golden:v$number sums memory
    done
    ;;
*)
    name=golden:v1 sums memory state root
    mv "$scratch/memory2" "$scratch/memory"
    name=golden:v2 sums memory
    cp "$out/golden:v2.sha256" "$out/latest.sha256"
    ;;
esac
du -sb "$out"
