#!/bin/sh
# The compiler for this project's own crates while fuzz targets are built: with the coverage counters that
# libFuzzer steers by, and with the checks of a debug build. Dependencies are those of every build.
#   RUSTC_WORKSPACE_WRAPPER=fuzz/rustc.sh cargo build ...
exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks
