#!/bin/sh
# Install SLURM from Debian, for `make cluster-test`; say so where that cannot be done.
set -eu
if command -v slurmctld slurmd munged >/dev/null; then
    exit 0
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "apt-get install slurm-wlm munge"
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends \
        slurm-wlm munge >/dev/null
else
    echo "no SLURM here, so its tests will be skipped: sudo apt-get install slurm-wlm munge"
fi
