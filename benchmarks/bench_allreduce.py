"""How fast is a reduction through MpiWorld, and what of it is hidden behind computing?

    mpirun -n 2 python benchmarks/bench_allreduce.py

Table 1: bytes/s of `Allreduce` and of `Iallreduce` + `Wait`, against mpi4py's Allreduce
of the same buffer in the same run.
Table 2: a step of computing (matrix products, one thread) and a reduction in buckets:
exposed time = step - computing alone.
Table 3: the same with a learner that sleeps, which leaves the cores to the reduction,
as a learner on a GPU or beside spare cores does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from harness import measure, parser, report

from mpilm.world.base import IN_PLACE, Comm, Request
from mpilm.world.mpi import MpiWorld, abort_on_error

SIDE = 256  # of the matrices multiplied


def bandwidth(world: MpiWorld, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return table 1."""
    from mpi4py import MPI

    bare_comm = world.control.Dup()
    rows = []
    for nbytes in args.bytes:
        x = np.ones(nbytes // 4, np.float32)

        variants = {
            "bare": partial(bare_comm.Allreduce, MPI.IN_PLACE, x),
            "Allreduce": partial(world.comm.Allreduce, IN_PLACE, x),
            "Iallreduce": partial(start_and_wait, world.comm, x),
        }
        t = measure(variants, warmup=args.warmup, loops=args.loops, comm=bare_comm)
        rows.append(
            {
                "size (B)": nbytes,
                "bare (us)": t["bare"].median_s * 1e6,
                "Allreduce (us)": t["Allreduce"].median_s * 1e6,
                "Iallreduce (us)": t["Iallreduce"].median_s * 1e6,
                "bare (GB/s)": nbytes / t["bare"].median_s / 1e9,
                "ratio": t["bare"].median_s / t["Allreduce"].median_s,
                "ratio of minima": t["bare"].min_s / t["Allreduce"].min_s,
                "Iallreduce ratio": t["bare"].median_s / t["Iallreduce"].median_s,
            }
        )
    bare_comm.Free()
    return rows


def start_and_wait(comm: Comm, x: np.ndarray) -> None:
    """Reduce without a blocking call."""
    comm.Iallreduce(IN_PLACE, x).Wait()


def overlap(
    world: MpiWorld, args: argparse.Namespace, *, sleeping: bool
) -> list[dict[str, Any]]:
    """Return table 2 or, for a learner that sleeps, table 3."""
    from mpi4py import MPI

    bare_comm = world.control.Dup()
    x = np.ones(args.model_bytes // 4, np.float32)
    buckets = np.array_split(x, args.buckets)
    a = np.ones((SIDE, SIDE), np.float32)

    def compute(ready: Callable[[np.ndarray], None] | None = None) -> None:
        for bucket in buckets:
            if sleeping:
                time.sleep(args.sleep_s)
            else:
                for _ in range(args.work):
                    a @ a
            if ready:
                ready(bucket)

    def alone() -> None:
        compute()

    def afterwards() -> None:
        compute()
        world.comm.Allreduce(IN_PLACE, x)

    def bare_afterwards() -> None:
        compute()
        bare_comm.Allreduce(MPI.IN_PLACE, x)

    def beside() -> None:
        requests: list[Request] = []
        compute(lambda b: requests.append(world.comm.Iallreduce(IN_PLACE, b)))
        for request in requests:
            request.Wait()

    def library() -> None:
        requests: list[MPI.Request] = []
        compute(lambda b: requests.append(bare_comm.Iallreduce(MPI.IN_PLACE, b)))
        MPI.Request.Waitall(requests)

    def polled() -> None:
        """A message that does not come: what the progress thread costs."""
        request = world.comm.Irecv(never, (world.rank - 1) % world.size, tag=99)
        compute()
        world.comm.Isend(never, (world.rank + 1) % world.size, tag=99).Wait()
        request.Wait()

    never = np.zeros(1, np.float32)
    variants = {
        "computing alone": alone,
        "then bare Allreduce": bare_afterwards,
        "then Allreduce": afterwards,
        "Iallreduce beside": beside,
        "MPI's own Iallreduce beside, Waitall": library,
        "a pending Irecv beside": polled,
    }
    t = measure(variants, warmup=args.warmup, loops=args.loops, comm=bare_comm)
    bare_comm.Free()
    alone_s = t["computing alone"]
    return [
        {
            "step": name,
            "median (ms)": timing.median_s * 1e3,
            "min (ms)": timing.min_s * 1e3,
            "exposed, medians (ms)": (timing.median_s - alone_s.median_s) * 1e3,
            "exposed, minima (ms)": (timing.min_s - alone_s.min_s) * 1e3,
        }
        for name, timing in t.items()
    ]


def main() -> None:
    arguments = parser(__doc__, warmup=3, loops=30)
    arguments.add_argument(
        "--bytes",
        type=int,
        nargs="+",
        default=[4, 4096, 262_144, 2_000_000, 10_800_000, 43_200_000],
        help="sizes of table 1",
    )
    arguments.add_argument(
        "--model-bytes", type=int, default=10_800_000, help="size of table 2"
    )
    arguments.add_argument("--buckets", type=int, default=5, help="calls per step")
    arguments.add_argument(
        "--work", type=int, default=20, help="matrix products before each bucket"
    )
    arguments.add_argument(
        "--sleep-s", type=float, default=0.006, help="sleep before each bucket"
    )
    arguments.add_argument(
        "--bandwidth", action="store_true", help="table 1 only", dest="only_first"
    )
    args = arguments.parse_args()
    if args.smoke:
        args.warmup, args.loops, args.bytes, args.work = 0, 2, [4, 100_000], 1
    with MpiWorld() as world, abort_on_error(world):
        title = f"Reduction bandwidth, {world.size} ranks"
        report("allreduce", title, bandwidth(world, args), args, comm=world.control)
        if args.only_first:
            return
        for kind, sleeping in (("computing", False), ("a sleeping learner", True)):
            title = f"Reduction beside {kind}, {world.size} ranks"
            rows = overlap(world, args, sleeping=sleeping)
            report("allreduce", title, rows, args, comm=world.control)


if __name__ == "__main__":
    main()
