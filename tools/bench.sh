#!/bin/sh
# Run every benchmark as its own docstring says, from the first line that begins with
# "python benchmarks/..." or "mpirun -n N python benchmarks/...".
#
#   tools/bench.sh [--smoke]
#
# One that fails does not keep the rest from running; the last line names those.
set -eu
PATH="$PWD/.venv/bin:$PATH"
passed=0 failed=""
for script in benchmarks/bench_*.py; do
    command=$(sed -n "s,^    \(\(mpirun -n [0-9]* \)\?python $script\).*,\1,p" "$script" |
        head -n 1)
    if [ -z "$command" ]; then
        echo "$script: its docstring does not say how to run it" >&2
        exit 1
    fi
    echo "== $command $*"
    # shellcheck disable=SC2086 # a command and its words
    if timeout 1800 $command "$@"; then
        passed=$((passed + 1))
    else
        failed="$failed $script"
    fi
done
echo "$passed benchmarks ran${failed:+; failed:$failed}"
[ -z "$failed" ]
