#!/bin/bash
# Installs what building and testing need on Debian, only what is missing, and says nothing unless
# it has something to do. Needs root, or sudo that asks nothing.
set -euo pipefail

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

missing=()
command -v gcc >/dev/null || missing+=(gcc libc6-dev)
command -v make >/dev/null || missing+=(make)
# What packing is compared with.
command -v zstd >/dev/null || missing+=(zstd)
command -v pkg-config >/dev/null || missing+=(pkg-config)
command -v fusermount3 >/dev/null || missing+=(fuse3)
# For the bindings to the kernel's userfaultfd header.
ls /usr/lib/llvm-*/lib/libclang*.so* >/dev/null 2>&1 || missing+=(libclang-dev)
[ -f /usr/include/linux/userfaultfd.h ] || missing+=(linux-libc-dev)
rustup=
if ! command -v cargo >/dev/null && [ ! -x "$HOME/.cargo/bin/cargo" ]; then
    rustup=wanted
    missing+=(rustup)
fi

# moto, the S3 server of the tests, is a Python program.
python3 -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)

if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || fail "this is not a Debian: install by hand: ${missing[*]}"
    as_root=()
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || fail "needs root to install: ${missing[*]}"
        as_root=(sudo -n)
    fi
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    quietly() {
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive "$@" >"$log" 2>&1
    }
    lock=(-o DPkg::Lock::Timeout=300)
    quietly apt-get "${lock[@]}" update || { tail -n 15 "$log" >&2; fail "apt-get update failed"; }
    if [ -n "$rustup" ] && ! apt-cache show rustup >/dev/null 2>&1; then
        fail "there is no Rust: install Rust 1.95 or newer with rustup, then run this again"
    fi
    echo "install.sh: installing ${missing[*]}"
    quietly apt-get "${lock[@]}" install -y --no-install-recommends "${missing[@]}" ||
        { tail -n 15 "$log" >&2; fail "apt-get install failed"; }
    [ -z "$rustup" ] || rustup default stable
fi
moto=$(dirname "$0")/../target/servers/moto
if [ ! -x "$moto/bin/moto_server" ]; then
    echo "install.sh: installing moto into target/servers"
    mkdir -p "$(dirname "$moto")"
    rm -rf "$moto"
    python3 -m venv "$moto"
    "$moto/bin/pip" install --quiet --disable-pip-version-check 'moto[s3,server]==5.2.*' ||
        { rm -rf "$moto"; fail "moto cannot be installed: is the Python package index reachable?"; }
fi
"$(dirname "$0")/lab/install.sh"
