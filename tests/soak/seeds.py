"""Random schedules, or random deaths, of every strategy: seed after seed, for hours.

    python -m tests.soak.seeds schedules --seeds 100000 --minutes 60 --out FILE
    python -m tests.soak.seeds deaths --seeds 2000 --minutes 60 --out FILE

Strategies take turns, so a run that is stopped has tried all of them alike; FILE keeps
where each is, and the next run goes on there. A seed that fails is noted with its
reason and the command that replays it, and the others go on; so is one that lasts
longer than a minute. Ends with 1 if any seed has ever failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# seeds in one piece of work, some seconds; seconds after which one is taken to hang
PIECES = {"schedules": 200, "deaths": 8}
LIMIT_S = 60
MODULES = {
    "schedules": "tests.strategies.schedules",
    "deaths": "tests.strategies.deaths",
}


class TooLongError(BaseException):
    """A seed has not come to an end."""


def give_up(*_: Any) -> None:
    """End what hangs, wherever it is."""
    raise TooLongError


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
    signal.signal(signal.SIGALRM, give_up)
    outcomes: Counter[str] = Counter()
    failed: list[Any] = []
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for seed in seeds:
            signal.alarm(LIMIT_S)
            try:
                outcomes[run(name, seed) or "kept all promises"] += 1
            except TooLongError:
                failed.append([seed, f"no end after {LIMIT_S} s"])
            except Exception as error:
                failed.append([seed, f"{type(error).__name__}: {error}"[:500]])
            finally:
                signal.alarm(0)
    return name, seeds, outcomes, failed


class Book:
    """What has been tried: FILE.

    strategies  name -> next (seed), outcomes, failed ([seed, reason])
    seconds     of all runs so far
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"kind": kind, "seconds": 0.0, "strategies": {}}
        if path.exists():
            self.content = json.loads(path.read_text())
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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    def table(self) -> Iterator[str]:
        """Yield a line for each strategy, one for each failure, and one for all."""
        kind, num_all, num_failed = self.content["kind"], 0, 0
        for name, own in self.content["strategies"].items():
            outcomes = ", ".join(f"{n:,} {what}" for what, n in own["outcomes"].items())
            yield f"{name:<16}{own['next']:>8,} seeds: {outcomes or 'none yet'}"
            num_all += own["next"]
            num_failed += len(own["failed"])
            for seed, reason in own["failed"]:
                yield f"  FAILED {seed}: {reason}"
                yield f"  replay: python -m {MODULES[kind]} {name} {seed}"
        rate = num_all / max(self.content["seconds"], 1e-9) * 60.0
        yield f"{num_all:,} {kind}, {num_failed} failed; {rate:,.0f} a minute"


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
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for pieces in in_turns(work(), options.jobs):
            for done in pool.map(piece, pieces, chunksize=1):
                book.add(*done)
            book.write(before_s + time.monotonic() - began_s)
    print("\n".join(book.table()))
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
