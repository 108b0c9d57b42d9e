"""How long does a message take through MpiWorld, waited for or beside computing?

    mpirun -n 2 python benchmarks/bench_messages.py

Every rank sends to the next and receives from the one before. "beside": both are
started, then the rank computes longer than they take, and then waits: the exposed time
is what is left. Where the library cannot copy from another process's memory (many
containers), it moves fragments, and only while both sides poll:

    OMPI_MCA_smsc=^cma mpirun ...                  such a machine
    OMPI_MCA_pml_ob1_send_pipeline_depth=3         Open MPI's own setting
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import measure, parser, report

from mpilm.world.mpi import MpiWorld, abort_on_error

SIDE = 256  # of the matrices multiplied
SETTINGS = (
    "OMPI_MCA_smsc",
    "OMPI_MCA_btl",
    "OMPI_MCA_pml_ob1_send_pipeline_depth",
    "OMPI_MCA_mpi_yield_when_idle",
)


def messages(world: MpiWorld, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per size."""
    bare_comm = world.control.Dup()
    before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    a = np.ones((SIDE, SIDE), np.float32)

    def compute() -> None:
        for _ in range(args.work):
            a @ a

    rows = []
    for nbytes in args.bytes:
        send, receive = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)

        def variants(x: np.ndarray, y: np.ndarray) -> dict[str, Callable[[], None]]:
            def bare() -> None:
                bare_comm.Sendrecv(x, after, 0, y, before, 0)

            def waiting() -> None:
                world.comm.Sendrecv(x, after, 0, y, before, 0)

            def beside() -> None:
                incoming = world.comm.Irecv(y, before)
                outgoing = world.comm.Isend(x, after)
                compute()
                incoming.Wait()
                outgoing.Wait()

            return {
                "bare": bare,
                "waiting": waiting,
                "beside": beside,
                "alone": compute,
            }

        t = measure(
            variants(send, receive),
            warmup=args.warmup,
            loops=args.loops,
            comm=bare_comm,
        )
        exposed_s = t["beside"].median_s - t["alone"].median_s
        rows.append(
            {
                "size (B)": nbytes,
                "bare Sendrecv (us)": t["bare"].median_s * 1e6,
                "Sendrecv (us)": t["waiting"].median_s * 1e6,
                "Sendrecv, min (us)": t["waiting"].min_s * 1e6,
                "computing alone (us)": t["alone"].median_s * 1e6,
                "exposed beside (us)": exposed_s * 1e6,
            }
        )
    bare_comm.Free()
    return rows


def main() -> None:
    arguments = parser(__doc__, warmup=3, loops=30)
    arguments.add_argument(
        "--bytes", type=int, nargs="+", default=[4, 65_536, 2_000_000, 10_800_000]
    )
    arguments.add_argument(
        "--work", type=int, default=100, help="matrix products beside a message"
    )
    args = arguments.parse_args()
    if args.smoke:
        args.warmup, args.loops, args.bytes, args.work = 0, 2, [4, 100_000], 5
    set_here = [f"{k[9:]}={os.environ[k]}" for k in SETTINGS if k in os.environ]
    with MpiWorld() as world, abort_on_error(world):
        title = (
            f"Messages in a ring, {world.size} ranks, {' '.join(set_here) or 'plain'}"
        )
        report("messages", title, messages(world, args), args, comm=world.control)


if __name__ == "__main__":
    main()
