#!/bin/bash
# Installs what building and the demo need on Debian, and the packages that are named; only what is missing,
# and says nothing unless it has something to do. Needs root, or sudo that asks nothing.
set -euo pipefail

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

missing=()
command -v gcc >/dev/null || missing+=(gcc libc6-dev)
command -v make >/dev/null || missing+=(make)
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

for package in "$@"; do
    dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
done

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
"$(dirname "$0")/lab/install.sh"
