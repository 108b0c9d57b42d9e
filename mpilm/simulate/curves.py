"""Loss at equal time from runs that were trained before, on whatever machine.

    loss(t) = curve(samples_per_s t)                                           (1)

curve          perplexity on valid against samples of all ranks, from a run's log;
               between its points straight, both axes logarithmic
samples_per_s  of the run's strategy, period and batch on the declared machine

What a sample teaches is taken as the same on every network. For what runs in lockstep
it is, to the bit; out of lockstep it is not: on a slow network ranks mix less often.
Such curves are left out (bench_curves.py: adpsgd took four times the steps).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.config import Config, resolve
from mpilm.report.folders import read_all
from mpilm.report.groups import flat, shown
from mpilm.report.reader import Run, Vector
from mpilm.simulate.plan import Candidate, Row
from mpilm.strategies import find_strategy

OF_CURVE = ("strategy", "optim", "schedule", "ema")  # sections that a curve is of
SAME_PLACE = 0.01  # a curve that ends so shortly before a point reaches it


@dataclass(frozen=True)
class Stored(Candidate):
    """What runs were trained with.

    sections  OF_CURVE of their configuration
    """

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def applied(self, config: Config) -> Config:
        """Return the configuration with what these runs were trained with."""
        document = {**config.to_document(), **self.sections}
        document["train"]["batch"] = self.batch
        document["machine"]["step_s"] = self.step_s
        return resolve(document)


@dataclass
class StoredCurve:
    """Perplexity against samples, of all runs that were trained alike.

    samples, log_ppl  (N,) each, of each run
    """

    candidate: Stored
    samples: list[Vector] = field(default_factory=list)
    log_ppl: list[Vector] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Samples from which on all runs are known."""
        return max(float(each[0]) for each in self.samples)

    @property
    def last(self) -> float:
        """Samples up to which all runs are known."""
        return min(float(each[-1]) for each in self.samples)

    def perplexity(self, samples: float) -> float:
        """Return the geometric mean over runs, after so many samples."""
        at = math.log(samples)
        pairs = zip(self.samples, self.log_ppl, strict=True)
        return math.exp(float(np.mean([np.interp(at, np.log(x), y) for x, y in pairs])))


def read_curves(
    paths: Sequence[Path], config: Config, ranks: int
) -> tuple[list[StoredCurve], list[str]]:
    """Return the curves of the runs in folders, and why others are left out.

    Raises:
        CheckpointError: there is no run that can be read.
    """
    runs, problems = read_all(list(paths))
    found: dict[str, StoredCurve] = {}
    for run in runs:
        if why := unfit(run, config, ranks):
            problems.append(f"{run.path}: {why}")
            continue
        samples, _, perplexity = run.valid()
        known = np.isfinite(perplexity) & (samples > 0)
        sections = {key: run.config[key] for key in OF_CURVE if key in run.config}
        batch = int(run.config["train"]["batch"])
        key = repr((sorted(sections.items()), batch))
        strategy, machine = sections["strategy"], config.machine
        step_s = machine.step_s * batch / config.train.batch
        period = int(strategy.get("period", 0))
        stored = Stored(str(strategy["name"]), period, batch, step_s, sections)
        curve = found.setdefault(key, StoredCurve(stored))
        curve.samples.append(samples[known])
        curve.log_ppl.append(np.log(perplexity[known]))
    return list(found.values()), problems


def unfit(run: Run, config: Config, ranks: int) -> str:
    """Return why a run says nothing about this model, data and number of ranks."""
    mine = flat(config.to_dict())
    theirs = flat(run.config)
    for key in mine:
        is_task = key.startswith(("model.", "data.")) or key == "train.unroll"
        if is_task and theirs.get(key) != mine[key]:
            found = shown(theirs.get(key, ""))
            return f"{key} is {found} there, {shown(mine[key])} here"
    name = run.config["strategy"]["name"]
    if not find_strategy(name).lockstep:
        return f"{name} mixes as often as its network lets it"
    if run.ranks != ranks:
        return f"ran on {run.ranks} ranks, not on {ranks}"
    known = np.isfinite(run.valid()[2])
    if not run.logs or known.sum() < 2:
        return "has no curve: train.valid_every makes one"
    return ""


def equal_time_s(rows: Sequence[Row], curves: Sequence[StoredCurve]) -> float:
    """Return the longest time that every curve reaches, in virtual seconds."""
    pairs = zip(rows, curves, strict=True)
    return min(
        (curve.last / row.spoken.samples_per_s for row, curve in pairs if row.spoken),
        default=0.0,
    )


def expect(row: Row, curve: StoredCurve, budget_s: float) -> None:
    """Fill in what a candidate comes to in that time by (1), or why it is unknown."""
    if row.spoken is None:
        return
    samples = row.spoken.samples_per_s * budget_s
    if samples > curve.last * (1.0 + SAME_PLACE):
        row.why = f"reads {samples:,.0f} samples in that time; its curve ends"
        row.why += f" at {curve.last:,.0f}"
    elif samples < curve.first * (1.0 - SAME_PLACE):
        row.why = f"reads {samples:,.0f} samples in that time; its curve begins"
        row.why += f" at {curve.first:,.0f}"
    else:
        row.trained = dataclasses.replace(
            row.spoken,
            samples=round(samples),
            seconds=budget_s,
            perplexity=curve.perplexity(samples),
        )
