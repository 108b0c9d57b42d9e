"""Did the virtual world get slower: instructions of a rank-step, in two trees.

    git worktree add ../old 1432502
    python benchmarks/bench_instructions.py --tree ../old . --ranks 16 128 \
        --out benchmarks/results/instructions.json

A clock says little of code while others use the caches. Valgrind (Debian: valgrind)
counts instructions, and they differ by some thousandths from run to run. Each tree runs
its own bench_virtual.py, one loop of one variant; the same without a loop (imports) is
taken off. Data references and misses of a first cache of 32 KiB beside it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import parser, report

RUN = """
import argparse, sys
sys.path.insert(0, "benchmarks")
import bench_virtual
name, ranks, steps, loops = sys.argv[1], *map(int, sys.argv[2:])
args = argparse.Namespace(parameters=1000, layers=2)
for _ in range(loops):
    bench_virtual.simulate(name, ranks, steps, args, {})
"""
COUNTS = {"instructions": "I +refs", "data refs": "D +refs", "D1 misses": "D1 +misses"}


def count(tree: Path, python: str, *arguments: str) -> dict[str, int]:
    """Return what Valgrind counts in one run of RUN in a tree."""
    environment = os.environ | {
        "PYTHONPATH": str(tree.resolve()),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = f"--cachegrind-out-file={folder}/out"
        tool = ["valgrind", "--tool=cachegrind", "--cache-sim=yes", out]
        ran = subprocess.run(
            [*tool, python, "-c", RUN, *arguments],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    found = {}
    for name, pattern in COUNTS.items():
        match = re.search(rf"{pattern}: +([\d,]+)", ran.stderr)
        assert match is not None, ran.stderr
        found[name] = int(match[1].replace(",", ""))
    return found


def main() -> None:
    arguments = parser(__doc__, warmup=0, loops=1)
    arguments.add_argument("--tree", type=Path, nargs="+", default=[Path()])
    arguments.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    arguments.add_argument("--rank-steps", type=int, default=3200)
    arguments.add_argument("--variant", default="allreduce, one bucket")
    args: argparse.Namespace = arguments.parse_args()
    if args.smoke:
        args.ranks, args.rank_steps = [2], 4
    if shutil.which("valgrind") is None:
        print("bench_instructions.py: skipped, there is no valgrind here")
        return
    rows: list[dict[str, Any]] = []
    for ranks in args.ranks:
        steps = max(1, args.rank_steps // ranks)
        for tree in args.tree:
            run = (tree, sys.executable, args.variant, str(ranks), str(steps))
            without, with_ = count(*run, "0"), count(*run, str(args.loops))
            done = ranks * steps * args.loops
            row = {k: (with_[k] - without[k]) / done for k in COUNTS}
            commit = subprocess.run(
                ["git", "describe", "--always", "--dirty"],
                cwd=tree,
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            rows.append({"commit": commit, "ranks": ranks, **row})
    args.tree = [str(tree) for tree in args.tree]
    report("instructions", f"A rank-step: {args.variant}", rows, args)


if __name__ == "__main__":
    main()
