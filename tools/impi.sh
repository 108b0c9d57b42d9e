#!/bin/sh
# Install Intel MPI for `make test`: .venv-impi holds it, all else comes from .venv-mpich.
#
#   PYTHON=python3 tools/impi.sh
#
# Its wheel asks for a libfabric that PyPI does not have; within a node it needs none.
set -eu
PYTHON=${PYTHON:-python3}
[ "$(uname -sm)" = "Linux x86_64" ] || {
    echo "no Intel MPI for $(uname -sm): make test goes without it"
    exit 0
}
"$PYTHON" -m venv .venv-impi
.venv-impi/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
    --constraint constraints.txt impi-rt
others=$(.venv-mpich/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$(.venv-impi/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$others')" >"$own/mpich.pth"
