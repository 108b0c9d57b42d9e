"""The ranks of a run, as `mpilm status RUN` shows them; nodes that are slow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from mpilm.report.folders import read
from mpilm.report.reader import PARTS, SLOW, RankRow, Run


def read_ranks(folder: Path) -> tuple[Run, list[RankRow]]:
    """Return a run and its ranks, by rank, as far as they have logged.

    Raises:
        CheckpointError: there is no run that can be read.
    """
    run = read(folder, folder.name)
    return run, run.rank_rows()


def rank_table(run: Run, rows: list[RankRow]) -> Iterator[str]:
    """Yield a line for each rank, and one for each that is slow, or slower than before.

    Shares are of the rank's training time; `speed` is that of the fastest rank's.
    """
    if not rows:
        yield f"{run.path}: no rank has logged two rows yet (train.log_every)"
        return
    heads = ("samples/s", *PARTS, "waiting", "speed")
    yield f"{'rank':>5}" + "".join(f"{head:>10}" for head in heads) + "  host"
    for row in rows:
        parts = [getattr(row, name) for name in (*PARTS, "waiting")]
        shares = "".join(
            " " * 10 if math.isnan(part) else f"{part:>10.1%}" for part in parts
        )
        speed = f"{row.samples_per_s:>10,.0f}{shares}{row.relative:>10.2f}"
        yield f"{row.rank:>5}{speed}  {row.host}".rstrip()
    for row in rows:
        if row.relative < SLOW:
            most = f", most of it {row.most}" if row.most else ""
            yield (
                f"rank {row.rank} computes {1 / row.relative:.1f} x as long for a"
                f" sample as the fastest{most}"
            )
        if row.slower > 1.0:
            yield (
                f"rank {row.rank} computes {row.slower:.1f} x as long for a sample now"
                " as it did before"
            )


def slow_nodes(rows: list[RankRow], factor: float) -> list[str]:
    """Return the hosts on which every rank takes over `factor` times the fastest's.

    In the last tenth of the run, as the ranks may have been elsewhere before. With one
    host, or where all are as slow, there are none.
    """
    hosts: dict[str, list[float]] = {}
    for row in rows:
        if row.host:
            hosts.setdefault(row.host, []).append(1.0 / row.recent)
    return sorted(host for host, ratios in hosts.items() if min(ratios) > factor)
