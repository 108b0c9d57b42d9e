"""Which runs belong together: their colours, series over ranks, pairs of bars.

Two runs are of one series if their configurations are the same in all that says how
fast a step is. What they may differ in is listed below; `train.seed` makes repetitions
of one point. Number of ranks and strategy stand for themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mpilm.report.charts import Look
from mpilm.report.reader import Run

# M. Okabe and K. Ito, "Color Universal Design", 2008, told apart by everybody; then
# darker ones of between
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"),
    *("#7a5195", "#8c564b", "#6b8e23", "#b3261e", "#00808a"),
)
DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4", "1 5")
IDLE = "#c9ced6"  # waiting

# settings that do not make a step faster or slower
WITHOUT_SPEED = {
    *("train.seed", "train.samples", "train.valid_every", "train.test"),
    *("train.worst_rank", "train.eval_streams", "train.log_every", "optim.lr"),
    *("train.worst_rank_share", "train.max_bad_steps", "train.max_bad_rounds"),
    *("train.trace_steps",),
}
WITHOUT_SPEED_SECTIONS = {"checkpoint", "schedule", "pretrain"}
STEP = "machine.step_s"  # the model's as much as the machine's


def looks(runs: list[Run]) -> list[Look]:
    """Return how each run's lines look: none like another, while there are enough.

    A strategy has a colour and its runs have patterns, if there are few runs of many
    strategies; otherwise every run has a colour, and patterns when they run out.
    """
    members: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        members.setdefault(run.strategy, []).append(index)
    most = max((len(found) for found in members.values()), default=0)
    if len(runs) > len(COLOURS) and most <= len(DASHES) and len(members) > 1:
        found = {
            index: Look(COLOURS[number % len(COLOURS)], DASHES[place])
            for number, indices in enumerate(members.values())
            for place, index in enumerate(indices)
        }
        return [found[index] for index in range(len(runs))]
    return [look(index) for index in range(len(runs))]


def look(index: int) -> Look:
    """Return the look of the `index`-th line of a chart."""
    pattern = index // len(COLOURS) % len(DASHES)
    return Look(COLOURS[index % len(COLOURS)], DASHES[pattern])


def flat(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return section.key -> value.

    >>> flat({"optim": {"name": "sgd"}, "faults": {"slow": {"3": 4.0}}})
    {'optim.name': 'sgd', 'faults.slow': {'3': 4.0}}
    """
    return {
        f"{name}.{key}": value
        for name, section in config.items()
        for key, value in section.items()
    }


def differing(runs: list[Run]) -> list[str]:
    """Return the settings that are not the same in all runs, in their order."""
    settings = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    return [
        key
        for key in keys
        if any(one.get(key) != settings[0].get(key) for one in settings)
    ]


def kind(run: Run, keys: Iterable[str]) -> str:
    """Return the values of those settings, as words that fit behind a strategy.

    The numbers of a machine that ships are its name.
    """
    settings = flat(run.config)
    words, keys = [], list(keys)
    of_machine = [key for key in keys if key.startswith("machine.") and key != STEP]
    if of_machine and run.machine:
        words.append(run.machine)
        keys = [key for key in keys if key not in of_machine]
    for key in keys:
        value = settings.get(key, "")
        short = key.removeprefix("strategy.").removeprefix("faults.")
        if key.startswith("faults.") and not value:
            continue
        words.append(f"{short} {shown(value)}")
    return ", ".join(words)


def shown(value: Any) -> str:
    """Return a setting in few letters.

    >>> shown({"3": 10.0}), shown([1, 2]), shown(True), shown("")
    ('3=10', '1 2', 'true', '-')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return " ".join(f"{key}={shown(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list):
        return " ".join(map(shown, value)) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value) or "-"


def with_speed(runs: list[Run]) -> list[str]:
    """Return the differing settings that a series may not mix.

    Those of a strategy that another strategy has not do not tell its runs apart.
    """
    names: dict[str, list[Run]] = {}
    for run in runs:
        names.setdefault(run.strategy, []).append(run)
    inside = {key for same in names.values() for key in differing(same)}
    inside |= {key for key in differing(runs) if not key.startswith("strategy.")}
    simulated = all(run.simulated for run in runs)
    return [
        key
        for key in differing(runs)
        if key in inside
        and key not in WITHOUT_SPEED
        and key.split(".")[0] not in WITHOUT_SPEED_SECTIONS
        and (simulated or not key.startswith("machine."))  # real runs have none
    ]


@dataclass
class Series:
    """Runs of one strategy with the same settings, over ranks.

    points  ranks -> samples/s of each run
    ideal   ranks -> samples/s of ranks that never wait, if it is known
    """

    name: str
    points: dict[int, list[float]] = field(default_factory=dict)
    ideal: dict[int, float] = field(default_factory=dict)

    def efficiency(self) -> tuple[list[int], list[float]]:
        """Return ranks, and samples/s of a rank in shares of the ideal.

        That is the declared one of a simulation; else this series' own, on the fewest
        ranks.
        """
        numbers = sorted(self.points)
        means = [mean(self.points[number]) for number in numbers]
        if all(number in self.ideal for number in numbers):
            ideals = [self.ideal[number] for number in numbers]
        else:
            ideals = [means[0] / numbers[0] * number for number in numbers]
        return numbers, [
            value / ideal for value, ideal in zip(means, ideals, strict=True)
        ]


def mean(values: list[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def series_of(runs: list[Run]) -> list[Series]:
    """Return the series of these runs; every run with a speed is in one."""
    keys = with_speed(runs)
    found: dict[tuple[str, str], Series] = {}
    for run in runs:
        speed = run.number("samples_per_s")
        if not math.isfinite(speed):
            continue
        name = ", ".join(filter(None, (run.strategy, kind(run, keys))))
        series = found.setdefault((run.strategy, name), Series(name))
        series.points.setdefault(run.ranks, []).append(speed)
        if run.simulated and math.isfinite(ideal := run.ideal_samples_per_s):
            series.ideal[run.ranks] = ideal
    return list(found.values())


@dataclass
class Pair:
    """Runs that differ in [faults] alone: without, and with what is declared."""

    name: str
    without: list[tuple[int, float]] = field(default_factory=list)
    slowed: list[tuple[int, float, str]] = field(default_factory=list)


def pairs_of(runs: list[Run]) -> list[Pair]:
    """Return speeds with and without faults, where there are both."""
    keys = with_speed(runs)
    plain = [key for key in keys if not key.startswith("faults.")]
    faults = [key for key in keys if key.startswith("faults.")]
    found: dict[tuple[str, int, str], Pair] = {}
    for index, run in enumerate(runs):
        speed = run.number("samples_per_s")
        if not math.isfinite(speed):
            continue
        settings = kind(run, plain)
        ranks = f"{run.ranks} ranks" if run.ranks > 1 else "1 rank"
        name = ", ".join(filter(None, (run.strategy, ranks, settings)))
        pair = found.setdefault((run.strategy, run.ranks, settings), Pair(name))
        if declared := kind(run, faults):
            pair.slowed.append((index, speed, declared))
        elif not any(flat(run.config).get(key) for key in faults):
            pair.without.append((index, speed))
    return [pair for pair in found.values() if pair.without and pair.slowed]
