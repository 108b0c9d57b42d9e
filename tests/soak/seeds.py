"""Random schedules, or random deaths, of every strategy: seed after seed, for hours.

    python -m tests.soak.seeds schedules --seeds 100000 --minutes 60 --out FILE
    python -m tests.soak.seeds deaths --seeds 2000 --minutes 60 --out FILE

Strategies take turns, so a run that is stopped has tried all of them alike; FILE keeps
where each is, and the next run goes on there. A seed that fails is noted with its
reason and the command that replays it, and the others go on; so is one that takes a
minute of CPU. Ends with 1 if any seed has ever failed.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.soak.keeping import (
    TooLongError,
    limit_cpu,
    memory,
    read_book,
    step_aside,
    table,
    write_book,
)

PIECES = {"schedules": 200, "deaths": 8}  # seeds in one piece of work, some seconds
MODULES = {
    "schedules": "tests.strategies.schedules",
    "deaths": "tests.strategies.deaths",
}


def names(kind: str) -> list[str]:
    """Return the strategies that are tried."""
    if kind == "deaths":
        from tests.strategies.deaths import SURVIVING

        return list(SURVIVING)
    from mpilm.strategies import STRATEGIES

    return list(STRATEGIES)


def piece(work: tuple[str, str, range]) -> tuple[str, range, Counter[str], list[Any]]:
    """Try some seeds of a strategy; return how they went, and which failed."""
    kind, name, seeds = work
    if kind == "schedules":
        from tests.strategies.schedules import run
    else:
        from tests.strategies.deaths import run
    outcomes: Counter[str] = Counter()
    failed: list[Any] = []
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for seed in seeds:
            try:
                with limit_cpu():
                    outcomes[run(name, seed) or "kept all promises"] += 1
            except (TooLongError, Exception) as error:
                failed.append([seed, f"{type(error).__name__}: {error}"[:500]])
    return name, seeds, outcomes, failed


class Book:
    """What has been tried: FILE.

    strategies  name -> next (seed), outcomes, failed ([seed, reason])
    seconds     of all runs so far
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        empty = {"kind": kind, "seconds": 0.0, "strategies": {}}
        self.content = read_book(path, empty)
        if self.content["kind"] != kind:
            raise SystemExit(f"{path}: holds {self.content['kind']}")

    def of(self, name: str) -> dict[str, Any]:
        """Return what has been tried of a strategy."""
        empty: dict[str, Any] = {"next": 0, "outcomes": {}, "failed": []}
        found: dict[str, Any] = self.content["strategies"].setdefault(name, empty)
        return found

    def add(
        self, name: str, seeds: range, outcomes: Counter[str], failed: list[Any]
    ) -> None:
        """Note a piece that is done; they come in order."""
        own = self.of(name)
        own["next"] = seeds.stop
        own["outcomes"] = dict(Counter(own["outcomes"]) + outcomes)
        own["failed"] += failed

    def write(self, seconds: float) -> None:
        """Write FILE whole, or leave it as it is."""
        self.content["seconds"] = round(seconds, 1)
        write_book(self.path, self.content)

    def page(self) -> str:
        """Return a table of all strategies, what failed, and a line on all."""
        kind, strategies = self.content["kind"], self.content["strategies"]
        totals: Counter[str] = Counter()
        rows, failures = [], []
        for name, own in strategies.items():
            totals.update(own["outcomes"])
            rows.append([name, own["next"], len(own["failed"])])
            for seed, reason in own["failed"]:
                failures.append(f"FAILED {name} {seed}: {reason}")
                failures.append(f"  replay: python -m {MODULES[kind]} {name} {seed}")
        for row, own in zip(rows, strategies.values(), strict=True):
            row += [own["outcomes"].get(what, 0) for what in sorted(totals)]
        num_all = sum(own["next"] for own in strategies.values())
        rate = num_all / max(self.content["seconds"], 1e-9) * 60.0
        head = ["strategy", "seeds", "failed", *sorted(totals)]
        num_failed = len(failures) // 2
        last = f"{num_all:,} {kind}, {num_failed} failed; {rate:,.0f} a minute"
        return "\n".join([table(head, rows), "", *failures, last])


def main() -> int:
    """Do as the header says; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(PIECES))
    parser.add_argument("--seeds", type=int, required=True, help="of each strategy")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--only", nargs="*", help="strategies")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    book = Book(options.out, options.kind)
    began_s, before_s = time.monotonic(), book.content["seconds"]
    chosen = options.only or names(options.kind)
    ahead = {name: book.of(name)["next"] for name in chosen}

    def work() -> Iterator[tuple[str, str, range]]:
        while min(ahead.values()) < options.seeds:
            for name, first in ahead.items():
                if time.monotonic() - began_s > 60.0 * options.minutes:
                    return
                stop = min(options.seeds, first + PIECES[options.kind])
                ahead[name] = stop
                if stop > first:
                    yield options.kind, name, range(first, stop)

    # in order and no more than that: what is noted as tried has no gaps
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(dir=memory(), prefix="mpilm-seeds-") as place,
        spawn.Pool(options.jobs, step_aside, (place,)) as pool,
    ):
        for pieces in in_turns(work(), options.jobs):
            for done in pool.map(piece, pieces, chunksize=1):
                book.add(*done)
            book.write(before_s + time.monotonic() - began_s)
    print(book.page())
    return 1 if any(own["failed"] for own in book.content["strategies"].values()) else 0


def in_turns(work: Iterator[Any], jobs: int) -> Iterator[list[Any]]:
    """Yield so many pieces at a time that all processes have some."""
    while True:
        pieces = [piece for _, piece in zip(range(2 * jobs), work, strict=False)]
        if not pieces:
            return
        yield pieces


if __name__ == "__main__":
    sys.exit(main())
