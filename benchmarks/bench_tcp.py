"""What do settings of Open MPI make of a reduction over TCP?

    python benchmarks/bench_tcp.py --out benchmarks/results/tcp.json

Open MPI's own Allreduce, in place, one rank a node, over the links of an emulated
cluster (tools/emulated_cluster.py: root, Debian's iproute2), or through shared memory.
Each of VARIANTS is an mpirun of its own, in turns; a reduction begins after a pause,
when all ranks are there, each up to --late-s late, and lasts from the last one's
beginning until the slowest is done. Without root what needs a cluster is skipped, and
--smoke needs none.

Nothing else may run: a rank that waits inside MPI yields its core, and others take it.

    at least   2 (K - 1) / K of the bytes at the declared rate
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from fleets import launch
from harness import parser, report

from mpilm.world.mpi.start import RULES

sys.path.insert(0, str(Path(__file__).parents[1]))
from tools.emulated_cluster import why_not

RATES = {"10mbit": 1e7, "100mbit": 1e8, "1gbit": 1e9}  # bits/s
HERE = "shared memory"
PAUSE_S = 0.05


def eager(num_bytes: int) -> dict[str, str]:
    """Return so many bytes before the clearance of a message."""
    keys = ("OMPI_MCA_btl_tcp_eager_limit", "OMPI_MCA_btl_tcp_rndv_eager_limit")
    return dict.fromkeys(keys, str(num_bytes))


TREES = {"OMPI_MCA_coll_tuned_use_dynamic_rules": "0"}  # as Open MPI chooses
PUT = {"OMPI_MCA_btl_tcp_flags": "put,send,inplace,need-ack,need-csum"}
VARIANTS: dict[str, dict[str, str]] = {
    'with "put", 64 KB': TREES | PUT | eager(65536),
    "64 KB": TREES | eager(65536),
    "300 KB": TREES | eager(300_000),
    "1 MB": TREES,
    "2 MB": TREES | eager(2_000_000),
    "64 KB, ring": RULES | eager(65536),
    "1 MB, ring": RULES,  # mpilm's own between nodes
}


def under_mpi(args: argparse.Namespace) -> None:
    """Reduce; rank 0 prints the seconds of each reduction."""
    os.environ.update(VARIANTS[args.variant])
    from mpilm.world.mpi.start import start_mpi

    MPI = start_mpi()
    comm = MPI.COMM_WORLD
    late = np.random.default_rng(comm.rank)
    x = np.ones(args.bytes // 4, np.float32)
    took = []
    for index in range(args.warmup + args.loops):
        time.sleep(PAUSE_S)
        everyone = comm.Ibarrier()
        while not everyone.Test():
            time.sleep(1e-4)
        begin_s = time.perf_counter() + late.uniform(0.0, args.late_s)
        while time.perf_counter() < begin_s:
            pass  # it computes
        began_s = time.perf_counter()
        comm.Allreduce(MPI.IN_PLACE, x)
        ended_s = time.perf_counter()  # all nodes have the clock of this machine
        began, ended = zip(*comm.allgather((began_s, ended_s)), strict=True)
        if index >= args.warmup:
            took.append(max(ended) - max(began))
        x.fill(1.0)
    if comm.rank == 0:
        print(*took)


def seconds(variant: str, args: argparse.Namespace) -> list[float]:
    """Return those of each reduction, under a variant of the settings."""
    script = [sys.executable, __file__, "--rank-of", variant, "--bytes", args.bytes]
    script += ["--warmup", args.warmup, "--loops", args.loops]
    script += ["--late-s", args.late_s]
    arguments = ["-n", args.ranks, *script]
    rate = args.rate if args.rate in RATES else ""
    with launch(arguments, args.ranks, rate) as (command, settings):
        done = subprocess.run(
            command,
            env=settings,
            capture_output=True,
            check=False,
            text=True,
            timeout=120,
        )
    if done.returncode:
        what = f"{' '.join(command)}: exit code {done.returncode}"
        raise RuntimeError(f"{what}\n{done.stderr}")
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    arguments = parser(__doc__, warmup=1, loops=11)
    arguments.add_argument("--rate", default="100mbit", choices=[*RATES, HERE])
    arguments.add_argument("--ranks", type=int, default=4)
    arguments.add_argument("--bytes", type=int, default=991_492, help="bench_network's")
    arguments.add_argument("--late-s", type=float, default=0.0, help="of a rank, most")
    arguments.add_argument("--variants", nargs="+", default=list(VARIANTS))
    arguments.add_argument("--rank-of", dest="variant", help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.variant:
        under_mpi(args)
        return
    if args.smoke:
        args.loops, args.ranks, args.bytes = 2, 2, 400_000
        args.variants, args.rate = args.variants[:2], HERE
    if args.rate != HERE and (reason := why_not()):
        print(f"skipped: {reason}")
        return
    bits = 2 * (args.ranks - 1) / args.ranks * 8 * args.bytes
    rows: list[dict[str, Any]] = []
    for variant in args.variants:
        took = seconds(variant, args)
        rows.append(
            {
                "before the clearance": variant,
                "min (ms)": min(took) * 1e3,
                "median (ms)": median(took) * 1e3,
                "max (ms)": max(took) * 1e3,
            }
        )
        if args.rate != HERE:
            rows[-1]["median / least"] = median(took) * RATES[args.rate] / bits
    where = f"{args.ranks} ranks, {args.rate}"
    where += f", up to {args.late_s * 1e3:g} ms late" if args.late_s else ""
    report("tcp", f"Allreduce of {args.bytes:,} bytes, {where}", rows, args)


if __name__ == "__main__":
    main()
