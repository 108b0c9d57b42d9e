"""What does a checkpoint cost in CPU time, part by part?

    python benchmarks/bench_checkpoint_cpu.py --out checkpoint-cpu.json

One process, vectors of a model of 98 million parameters and what the rank has of its
own (782 MB in all): the copy that training waits for; the checksums; the same bytes
given to the kernel in parts of 4 MB, through the page cache and past it (O_DIRECT, from
memory that is aligned); and what the writer does for all of it, HDF5 included. Each is
done --loops times behind one that is left out; medians of user and system seconds, and
of the clock. A machine whose cores are all busy pays the CPU seconds; one with a core
to spare pays for the copy.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import parser, report

from mpilm.storage.state_file import PART_BYTES, write_state

PAGE = 4096


def aligned(num_bytes: int) -> np.ndarray:
    """Return memory that begins at a page, (n,) float32, of whole pages."""
    found = np.frombuffer(mmap.mmap(-1, num_bytes // PAGE * PAGE), np.float32)
    found[:] = np.random.default_rng(1).standard_normal(len(found), np.float32)
    return found


def write(path: Path, array: np.ndarray, flags: int) -> None:
    """Write an array in parts and force it to the disk."""
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | flags, 0o666)
    data = array.view(np.uint8).data
    for start in range(0, len(data), PART_BYTES):
        os.pwrite(file, data[start : start + PART_BYTES], start)
    os.fsync(file)
    os.close(file)


def row(what: str, work: Callable[[], Any], args: Any) -> dict[str, Any]:
    """Return the medians of what a part takes."""
    found = []
    for _ in range(args.warmup + args.loops):
        began_s, before = time.perf_counter(), os.times()
        work()
        after = os.times()
        clock_s = time.perf_counter() - began_s
        found.append((after.user - before.user, after.system - before.system, clock_s))
    columns = zip(*found[args.warmup :], strict=True)
    user_s, system_s, clock_s = (statistics.median(column) for column in columns)
    return {
        "part": what,
        "user (s)": user_s,
        "system (s)": system_s,
        "of the clock (s)": clock_s,
    }


def main(args: Any) -> None:
    """Measure all parts; report."""
    theta = aligned(4 * args.parameters)
    own = aligned(4 * args.parameters)
    copies = [np.empty_like(theta), np.empty_like(own)]
    with tempfile.TemporaryDirectory(dir=args.disk) as name:
        folder = Path(name)

        def copy() -> None:
            np.copyto(copies[0], theta)
            np.copyto(copies[1], own)

        def check() -> None:
            for array in (theta, own):
                zlib.crc32(array.view(np.uint8).data)

        def write_both(flags: int) -> None:
            for number, array in enumerate((theta, own)):
                write(folder / f"{number}", array, flags)

        def write_states() -> None:
            write_state(folder / "shared.h5", {"theta": theta})
            write_state(folder / "rank.h5", {"theta": own})
            for path in folder.glob("*.h5"):
                path.unlink()

        rows = [
            row("copied, while training waits", copy, args),
            row("checksums", check, args),
            row("through the page cache", lambda: write_both(0), args),
            row("past it (O_DIRECT)", lambda: write_both(os.O_DIRECT), args),
            row("all that the writer does", write_states, args),
        ]
    args.disk = args.disk is not None  # a path is of one machine
    report("checkpoint-cpu", "CPU time of a checkpoint", rows, args)


if __name__ == "__main__":
    arguments = parser(__doc__, warmup=1, loops=5)
    arguments.add_argument("--parameters", type=int, default=97_751_078)
    arguments.add_argument("--disk", type=Path, help="folder for the files")
    arguments = arguments.parse_args()
    if arguments.smoke:
        arguments.parameters = 1 << 20
    main(arguments)
