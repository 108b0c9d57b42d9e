#!/bin/sh
# Run every benchmark as its own docstring says, from the first line that begins with
# "python benchmarks/..." or "mpirun -n N python benchmarks/...".
#
#   tools/bench.sh [--smoke]
set -eu
PATH="$PWD/.venv/bin:$PATH"
passed=0
for script in benchmarks/bench_*.py; do
    command=$(sed -n "s,^    \(\(mpirun -n [0-9]* \)\?python $script\).*,\1,p" "$script" |
        head -n 1)
    if [ -z "$command" ]; then
        echo "$script: its docstring does not say how to run it" >&2
        exit 1
    fi
    echo "== $command $*"
    # shellcheck disable=SC2086 # a command and its words
    timeout 1800 $command "$@"
    passed=$((passed + 1))
done
echo "$passed benchmarks ran"
