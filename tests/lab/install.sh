#!/bin/bash
# Installs the Debian packages that the guest laboratory needs, only those that are missing, and
# says nothing unless it has something to do. Needs root, or sudo that asks nothing.
set -euo pipefail

fail() {
    echo "install.sh: $1" >&2
    exit 1
}

# What is looked for, and the package that brings it.
needs=(
    qemu-system-x86_64:qemu-system-x86
    busybox:busybox-static
    cpio:cpio
    gzip:gzip
    xz:xz-utils
    zstd:zstd
    mkfs.ext4:e2fsprogs
    flock:util-linux
    sha256sum:coreutils
    dpkg:dpkg
)
PATH=$PATH:/usr/sbin:/sbin

missing=()
for need in "${needs[@]}"; do
    command -v "${need%%:*}" >/dev/null || missing+=("${need#*:}")
done
# The plain busybox package links dynamically and cannot run in an initramfs.
if command -v busybox >/dev/null && ldd "$(command -v busybox)" >/dev/null 2>&1; then
    missing+=(busybox-static)
fi
# The guest's own packages are only downloaded, so the package lists must be there.
lists=present
apt-cache show linux-image-cloud-amd64 python3-pil >/dev/null 2>&1 || lists=missing
[ ${#missing[@]} -gt 0 ] || [ $lists = missing ] || exit 0

command -v apt-get >/dev/null || fail "this is not a Debian: install by hand: ${missing[*]}"
as_root=()
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || fail "needs root to install: ${missing[*]:-package lists}"
    as_root=(sudo -n)
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
quietly() {
    if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive "$@" >"$log" 2>&1; then
        tail -n 15 "$log" >&2
        fail "failed: $*"
    fi
}

lock=(-o DPkg::Lock::Timeout=300)
quietly apt-get "${lock[@]}" update
if [ ${#missing[@]} -gt 0 ]; then
    echo "install.sh: installing ${missing[*]}"
    quietly apt-get "${lock[@]}" install -y --no-install-recommends "${missing[@]}"
fi
apt-cache show linux-image-cloud-amd64 python3-pil >/dev/null 2>&1 ||
    fail "the package lists know no linux-image-cloud-amd64: Debian 12 on amd64 is needed"
