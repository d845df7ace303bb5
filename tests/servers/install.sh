#!/bin/bash
# Installs what the tests over S3's protocol need: moto, a Python program, into target/servers, and the packages
# that are named.
set -euo pipefail
cd "$(dirname "$0")/../.."
python3 -c 'import venv, ensurepip' 2>/dev/null || set -- python3-venv "$@"
[ $# = 0 ] || tests/install.sh "$@"
moto=target/servers/moto
if [ ! -x $moto/bin/moto_server ]; then
    echo "servers/install.sh: installing moto into target/servers"
    rm -rf $moto
    mkdir -p target/servers
    python3 -m venv $moto
    $moto/bin/pip install --quiet --disable-pip-version-check 'moto[s3,server]==5.2.*' || {
        rm -rf $moto
        echo "servers/install.sh: moto cannot be installed: is the Python package index reachable?" >&2
        exit 1
    }
fi
