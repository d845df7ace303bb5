#!/bin/bash
# Builds the laboratory's guest from Debian packages: a kernel, an initramfs that mounts the disk, and
# a disk with Python and the functions.
#
#   build-guest.sh OUTDIR    makes OUTDIR/guest -> guest-HASH/{kernel,initramfs,disk,packages}
#
# HASH is that of everything here that the image is made of, so an image that is current is not built
# again. A directory gets that name only when it is whole: a build that was killed is never taken for
# a finished one, and the next build clears it away.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
log=
step=start

fail() {
    [ -z "$log" ] || tail -n 15 "$log" >&2
    echo "build-guest.sh: failed: $1" >&2
    exit 1
}
trap 'fail "$step"' ERR
begin() {
    step=$1
    echo "build-guest.sh: $1"
}

[ $# = 1 ] || { echo "usage: build-guest.sh OUTDIR" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)

inputs() {
    cd "$here" && find build-guest.sh init server.py functions -type f ! -name '*.pyc' | LC_ALL=C sort
}
hash=$(cd "$here" && inputs | xargs sha256sum | sha256sum | cut -c1-16)
guest=$out/guest-$hash

# Points OUTDIR/guest at the image, in one step.
publish() {
    ln -sfn "guest-$hash" "$out/.guest.$$"
    mv -T "$out/.guest.$$" "$out/guest"
}

current() {
    [ -e "$guest/disk" ] && [ "$(readlink "$out/guest" || true)" = "guest-$hash" ]
}
current && exit 0

# One build at a time; who waited finds the image of the one before.
exec 9>"$out/.lock"
flock 9
current && exit 0
if [ -e "$guest/disk" ]; then
    publish
    exit 0
fi
rm -rf "$out"/.build.*
# Guests may still run from an older image; after a day nobody does.
find "$out" -maxdepth 1 -name 'guest-*' -mmin +1440 -exec rm -rf {} +

begin "packages of this machine"
"$here/install.sh" || fail "$step"

build=$(mktemp -d "$out/.build.XXXXXX")
trap 'rm -rf "$build"' EXIT
chmod 755 "$build"
log=$build/log
mkdir "$build/debs" "$build/root" "$build/kernel-tree" "$build/initramfs-tree" "$build/image"

begin "downloading the guest's packages"
# The closure of dependencies, as if nothing were installed; what only serves an installation is left
# out, because nothing is configured: files are unpacked and that is all.
: >"$build/status"
kernel_package=$(apt-cache depends linux-image-cloud-amd64 |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | tail -n 1)
[ -n "$kernel_package" ] || fail "linux-image-cloud-amd64 depends on no kernel package"
apt-get -o Dir::State::status="$build/status" -s --no-install-recommends install python3-pil \
    >"$build/closure" 2>>"$log"
packages=$(sed -n 's/^Inst \([^ ]*\).*/\1/p' "$build/closure" | LC_ALL=C sort -u |
    grep -Evx '(lib)?perl.*|.*-base|libdb.*|libgdbm.*|dpkg|tar|media-types|mailcap|mime-support')
# shellcheck disable=SC2086 # one word per package is meant
(cd "$build/debs" && apt-get -o APT::Sandbox::User=root download $packages "$kernel_package") \
    >>"$log" 2>&1

begin "unpacking"
for deb in "$build"/debs/*.deb; do
    case $(basename "$deb") in
        linux-image-*) dpkg -x "$deb" "$build/kernel-tree" >>"$log" 2>&1 ;;
        *) dpkg -x "$deb" "$build/root" >>"$log" 2>&1 ;;
    esac
    basename "$deb" .deb >>"$build/image/packages"
done
cp "$build"/kernel-tree/boot/vmlinuz-* "$build/image/kernel"

begin "initramfs"
# Dependencies before what needs them: busybox' insmod resolves nothing. A module that this kernel has
# built in is not in the package.
modules="virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
    crc16 crc32c_generic mbcache jbd2 ext4"
tree=$build/initramfs-tree
mkdir -p "$tree/bin" "$tree/modules" "$tree/dev" "$tree/proc" "$tree/disk"
cp "$(command -v busybox)" "$tree/bin/busybox"
cp "$here/init" "$tree/init"
chmod 755 "$tree/init" "$tree/bin/busybox"
for module in $modules; do
    file=$(find "$build/kernel-tree/lib/modules" -name "$module.ko*" | head -n 1)
    case $file in
        "") continue ;;
        *.xz) xz -dc "$file" >"$tree/modules/$module.ko" ;;
        *.zst) zstd -qdc "$file" >"$tree/modules/$module.ko" ;;
        *) cp "$file" "$tree/modules/$module.ko" ;;
    esac
    echo "$module" >>"$tree/modules/order"
done
[ -e "$tree/modules/virtio_blk.ko" ] || fail "the kernel package holds no virtio_blk module"
(cd "$tree" && find . | LC_ALL=C sort | cpio --quiet -o -H newc --owner 0:0 | gzip -1) \
    >"$build/image/initramfs" 2>>"$log"

begin "disk"
root=$build/root
python=$(basename "$(find "$root/usr/bin" -name 'python3.[0-9]*' | head -n 1)")
[ -n "$python" ] || fail "the packages hold no Python"
library=$root/usr/lib/$python
rm -rf "$root"/usr/share/{doc,man,locale,bash-completion,lintian,perl*,bug,applications,pixmaps} \
    "$root/var" "$root/etc" "$library"/{test,tkinter,idlelib,lib2to3,ensurepip,distutils,pydoc_data} \
    "$root"/usr/lib/x86_64-linux-gnu/gconv
mkdir -p "$root"/{dev,proc,tmp,lab}
cp "$here/server.py" "$root/lab/server.py"
cp -r "$here/functions" "$root/lab/functions"
ln -sfn "$python" "$root/usr/bin/python3"
# Compiled here, by the guest's own Python: the guest's disk is read-only and its processor is slow.
find "$root" -name __pycache__ -prune -exec rm -rf {} +
PYTHONHOME=$root/usr "$(find "$root" -name 'ld-linux-x86-64.so.2' | head -n 1)" \
    --library-path "$root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu" \
    "$root/usr/bin/$python" -I -S -m compileall -q -j 2 --invalidation-mode unchecked-hash \
    -s "$root" "$library" "$root/usr/lib/python3" "$root/lab" >>"$log" 2>&1
size_kib=$(($(du -sk --apparent-size "$root" | cut -f1) * 5 / 4 + 4096))
mkfs.ext4 -q -F -d "$root" -b 4096 -m 0 -N 8192 -O '^has_journal,^resize_inode' \
    "$build/image/disk" "${size_kib}k" >>"$log" 2>&1

mv "$build/image" "$guest"
publish
begin "done: $(du -sh "$guest" | cut -f1) in guest-$hash"
