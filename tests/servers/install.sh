#!/bin/bash
# Installs the object-store servers that tests need into target/servers, and the packages that are named: moto
# (S3), azurite (Azure), and two S3 servers that do not keep create-only: s3rver overwrites, s3s-fs races.
set -euo pipefail
cd "$(dirname "$0")/../.."
fail() {
    echo "servers/install.sh: $1" >&2
    exit 1
}
python3 -c 'import venv, ensurepip' 2>/dev/null || set -- python3-venv "$@"
command -v npm >/dev/null || set -- nodejs npm "$@"
[ $# = 0 ] || tests/install.sh "$@"
servers=$PWD/target/servers
mkdir -p "$servers"

if [ ! -x "$servers/moto/bin/moto_server" ]; then
    echo "servers/install.sh: installing moto into target/servers"
    rm -rf "$servers/moto"
    python3 -m venv "$servers/moto"
    "$servers/moto/bin/pip" install --quiet --disable-pip-version-check 'moto[s3,server]==5.2.*' || {
        rm -rf "$servers/moto"
        fail "moto cannot be installed: is the Python package index reachable?"
    }
fi

# Neither needs what its packages would run at installation.
if [ ! -e "$servers/npm/done" ]; then
    echo "servers/install.sh: installing azurite and s3rver into target/servers"
    npm install --prefix "$servers/npm" --ignore-scripts --no-audit --no-fund --loglevel=error \
        azurite@3.37 s3rver@3.7 >/dev/null || fail "azurite cannot be installed: is the npm registry reachable?"
    touch "$servers/npm/done"
fi

# Not optimized: it serves one test, and building it is what takes time.
if [ ! -x "$servers/s3s/bin/s3s-fs" ]; then
    echo "servers/install.sh: building s3s-fs into target/servers"
    cargo install --quiet --locked --debug s3s-fs@0.14.1 --features binary --root "$servers/s3s" ||
        fail "s3s-fs cannot be built: is the crate registry reachable?"
fi
