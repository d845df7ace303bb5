#!/bin/bash
# Runs every fuzz target over its corpus, as many at a time as there are cores:
#   fuzz/run.sh short   a few seconds each, as `make test` does
#   fuzz/run.sh long    10 million executions each, as `make fuzz` does
#   fuzz/run.sh long manifest frame   these only
# A target that crashes, hangs, or asks for more than 1 GiB of address space fails the run; what it was
# given is kept in fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:?usage: run.sh short|long [TARGET...]} in
short) bounds=(-runs=1000000 -max_total_time=3) ;;
long) bounds=(-runs=10000000) ;;
*) echo "run.sh: short or long?" >&2; exit 2 ;;
esac
shift
targets=$(fuzz/build.sh)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p fuzz/artifacts

# Longer inputs only slow down what decompresses, or parses text.
longest_bytes() {
    case $1 in
    manifest | frame) echo 1024 ;;
    names | size) echo 160 ;;
    *) echo 4096 ;;
    esac
}

run() {
    local target=$1
    cp -r "fuzz/corpus/$target" "$scratch/$target"
    if (ulimit -v 1048576; "target/release/$target" "${bounds[@]}" -max_len="$(longest_bytes "$target")" \
        -timeout=60 -print_final_stats=1 -artifact_prefix="fuzz/artifacts/$target-" "$scratch/$target") \
        >"$scratch/$target.log" 2>&1; then
        sed -n "s/^stat::number_of_executed_units: *//p" "$scratch/$target.log" >"$scratch/$target.count"
        echo "fuzz: $target: $(cat "$scratch/$target.count") executions, no crash"
    else
        tail -n 40 "$scratch/$target.log" >&2
        echo "fuzz: $target failed" >&2
        touch "$scratch/failed"
    fi
}

for target in ${*:-$targets}; do
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
    run "$target" &
done
wait
executions=$(cat "$scratch"/*.count 2>/dev/null | awk '{ sum += $1 } END { print sum + 0 }')
echo "fuzz: $(ls "$scratch"/*.count | wc -l) targets, $executions executions"
[ ! -e "$scratch/failed" ]
