#!/bin/bash
# Builds the fuzz targets, and prints their names. Dependencies are taken as every other build makes them.
set -euo pipefail
cd "$(dirname "$0")/.."
targets=$(cd fuzz/targets && ls | sed 's/\.rs$//')
bins=()
for target in $targets; do bins+=(--bin "$target"); done
RUSTC_WORKSPACE_WRAPPER=$PWD/fuzz/rustc.sh cargo build --release --locked --workspace \
    --features reap-fuzz/libfuzzer "${bins[@]}" >&2
echo $targets
