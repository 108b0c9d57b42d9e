"""A run as a report sees it. What an older run did not log is simply not there.

Notation    t_r(s) -> seconds that rank r computed, without waiting; n_r -> samples
Score       relative    min_q t_q/n_q  /  t_r/n_r      against the fastest rank     (1)
            recent      the same in the last of some windows of the run
            individual  min_w t_rw/n_rw / t_r/n_r  of the last of some windows w    (2)

1 is as fast as the fastest rank, or as this rank has ever been; 0.5 twice as slow.
Waiting is not counted: in lockstep every rank is as slow as the slowest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.config import OWN
from mpilm.storage.runlog import RankLog
from mpilm.train.changes import Change
from mpilm.world.waits import typical_limit

Vector = NDArray[np.float64]

POINTS = 240  # of a curve: a pixel or two of it each
MOMENTS = 60  # of the curve of waiting
SLOW = 0.8  # a score below this is pointed at; chosen, not tuned
SMOOTHING = 25  # a point is the mean of so many neighbours, or fewer for few points
PARTS = ("data", "forward", "backward")  # of a gradient, by the log
WINDOWS = 10  # of a run, for the score against a rank's own best


@dataclass(frozen=True)
class Curve:
    """How a run went, all ranks together: a value per moment.

    seconds  of training
    samples  of all ranks
    loss     mean over ranks of the minibatches' losses, smoothed, nats
    """

    seconds: Vector
    samples: Vector
    loss: Vector


@dataclass(frozen=True)
class RankRow:
    """What one rank did; scores are (1) and (2), parts are shares of its time.

    data, forward, backward  of the gradient, see learner/spent.py; NaN: not logged
    waiting                  for communication, or for other ranks
    slower                   the last window's time by the usual one; 1: in line with it
    host                     where it ran; "": not known
    """

    rank: int
    samples_per_s: float
    data: float
    forward: float
    backward: float
    waiting: float
    sent_Bps: float
    relative: float
    individual: float
    recent: float
    host: str = ""
    slower: float = 1.0

    @property
    def most(self) -> str:
        """Which part of the gradient took the most time; "" if none is known."""
        parts = {name: getattr(self, name) for name in PARTS}
        known = {name: part for name, part in parts.items() if math.isfinite(part)}
        return max(known, key=lambda name: known[name]) if known else ""


@dataclass
class Run:
    """A run folder that has been read.

    name       what it is called in the report
    summary    summary.json; empty if the run has not ended
    config     the resolved configuration it began with, section -> key -> value
    changes    settings that were changed later, see train/changes.py
    logs       rank -> its log
    machine    name of the machine that its seconds are of, if that has one
    simulated  whether its seconds are virtual
    """

    name: str
    path: Path
    summary: dict[str, Any]
    config: dict[str, dict[str, Any]]
    toml: str = ""
    logs: dict[int, RankLog] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    machine: str = ""
    simulated: bool = field(init=False)

    def __post_init__(self) -> None:
        self.simulated = bool(self.summary.get("simulated"))

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return str(self.config.get("strategy", {}).get("name", "?"))

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.logs) or int(self.summary.get("ranks", 0))

    @property
    def ideal_samples_per_s(self) -> float:
        """Samples/s of ranks that never wait on the declared machine; NaN: unknown."""
        train, machine = self.config.get("train", {}), self.config.get("machine", {})
        try:
            per_step = train["batch"] * train["unroll"]
            return float(self.ranks * per_step / machine["step_s"])
        except (KeyError, TypeError, ZeroDivisionError):
            return math.nan

    def number(self, key: str) -> float:
        """Return a number of the summary; NaN if it is not there."""
        value = self.summary.get(key)
        return float(value) if isinstance(value, (int, float)) else math.nan

    def column(self, rank: int, name: str) -> Vector:
        """Return a field of a rank's log; empty if it has none."""
        found = self.logs[rank].rows.get(name)
        return np.array([]) if found is None else np.asarray(found, np.float64)

    def curve(self) -> Curve | None:
        """Return how the run went; None if nothing was logged."""
        filled = [r for r in self.logs if len(self.column(r, "seconds")) > 1]
        if not filled:
            return None
        first = min(self.column(r, "seconds")[0] for r in filled)
        last = max(self.column(r, "seconds")[-1] for r in filled)
        if not last > first:
            return None
        rows = max(len(self.column(r, "seconds")) for r in filled)
        seconds = np.linspace(first, last, min(POINTS, rows))
        losses = np.full((len(filled), len(seconds)), np.nan)
        for place, rank in enumerate(filled):
            at = self.column(rank, "seconds")
            during = (seconds >= at[0]) & (seconds <= at[-1])
            loss = np.interp(seconds, at, smooth(self.column(rank, "loss")))
            losses[place, during] = loss[during]
        # while half of the ranks are under way: the loss of a few is another one
        most = np.isfinite(losses).sum(axis=0) >= len(filled) / 2
        seconds, losses = seconds[most], losses[:, most]
        if len(seconds) < 2:
            return None
        return Curve(seconds, self.samples_at(seconds), np.nanmean(losses, axis=0))

    def waiting(self) -> tuple[Vector, Vector]:
        """Return moments, and the mean share of their time that ranks waited then.

        A share is that of the time since the moment before. Waiting after the last row
        of a log counts: the summary knows of it. So the mean of all is the summary's.
        """
        ways = []
        for rank in self.logs:
            at, blocked_s = self.column(rank, "seconds"), self.column(rank, "blocked_s")
            if not len(at):
                continue
            end_s, end_blocked_s, *_ = self._totals(rank)
            if end_s > at[-1]:
                at, blocked_s = (
                    np.append(at, end_s),
                    np.append(blocked_s, end_blocked_s),
                )
            ways.append((np.append(0.0, at), np.append(0.0, blocked_s)))
        if not ways:
            return np.array([]), np.array([])
        rows = max(len(at) for at, _ in ways) - 1
        last = max(at[-1] for at, _ in ways)
        edges = np.linspace(0.0, last, min(MOMENTS, rows) + 1)
        busy, blocked = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
        for at, blocked_s in ways:
            blocked += np.diff(np.interp(edges, at, blocked_s))
            busy += np.diff(np.minimum(edges, at[-1]))
        shares: Vector = np.clip(blocked / np.maximum(busy, 1e-12), 0.0, 1.0)
        return edges[1:], shares

    def activities(self, name: str) -> dict[int, tuple[Vector, Vector]]:
        """Return rank -> where each event of that name began and ended, seconds."""
        found = {}
        for rank, log in sorted(self.logs.items()):
            mine = log.events["name"] == name
            spans = (log.events[key][mine] for key in ("start_s", "stop_s"))
            found[rank] = tuple(np.asarray(span, np.float64) for span in spans)
        return found  # type: ignore[return-value]

    def samples_at(self, seconds: Vector) -> Vector:
        """Return the samples of all ranks together at some moments."""
        samples = np.zeros_like(seconds)
        for rank in self.logs:
            at = self.column(rank, "seconds")
            if len(at):
                of_rank = self.column(rank, "samples")
                start = np.concatenate([[0.0], at]), np.concatenate([[0.0], of_rank])
                samples += np.interp(seconds, *start)
        return samples

    def measured(self, name: str, by: str = "") -> tuple[Vector, Vector, Vector]:
        """Return samples of all ranks, seconds and values of a now-and-then measure.

        A row holds the value measured last: here is one point for each new one, the
        root mean square over ranks; the last point is from the summary.

        Args:
            by: field that changes with each measurement; `name` itself if not given.
        """
        found: list[tuple[float, list[float]]] = []
        for rank in self.logs:
            values, marks = self.column(rank, name), self.column(rank, by or name)
            if len(values) != len(marks):
                continue
            known = np.isfinite(values)
            values, marks = values[known], marks[known]
            seconds = self.column(rank, "seconds")[known]
            new = np.flatnonzero(np.diff(marks, prepend=np.nan) != 0.0)
            for number, row in enumerate(new):
                if number == len(found):
                    found.append((seconds[row], []))
                found[number][1].append(values[row])
        means = [math.sqrt(np.mean(np.square(values))) for _, values in found]
        at = np.array([seconds for seconds, _ in found])
        last, end = self.number(name), self.number("train_seconds")
        if math.isfinite(last) and (not means or by or means[-1] != last):
            means, at = [*means, last], np.append(at, end)
        order = np.argsort(at)
        samples = np.minimum(self.samples_at(at), _or_inf(self.number("samples")))
        if math.isfinite(last) and len(samples):
            samples[at == end] = self.number("samples")
        return samples[order], at[order], np.array(means)[order]

    @property
    def measure(self) -> str:
        """What its models are judged by: "perplexity", or the "loss" of own models."""
        return (
            "loss" if self.config.get("model", {}).get("name") == OWN else "perplexity"
        )

    def valid(self) -> tuple[Vector, Vector, Vector]:
        """Return samples, seconds and `measure` of each evaluation on valid."""
        return self.measured(f"valid_{self.measure}")

    def consensus(self) -> tuple[Vector, Vector, Vector]:
        """Return samples, seconds and distance to the mean model, where measured."""
        return self.measured("consensus_distance", by="consensus_step")

    def staleness(self) -> Vector | None:
        """Return how many updates came how late, all ranks; None: not logged."""
        total = None
        for log in self.logs.values():
            found = log.rows.get("staleness")
            if found is None or found.ndim != 2 or not len(found) or found[-1, 0] < 0:
                continue
            total = found[-1] if total is None else total + found[-1]
        return None if total is None or not total.sum() else total.astype(np.float64)

    def rank_rows(self) -> list[RankRow]:
        """Return what each rank did, with its straggler scores."""
        found = {rank: self._windows(rank) for rank in self.logs}
        each = {rank: windows for rank, windows in found.items() if windows.size}
        totals = {rank: self._totals(rank) for rank in each}
        cost = {r: (s - b) / n for r, (s, b, n, _) in totals.items()}
        best = min(cost.values(), default=math.nan)
        last = min((windows[-1] for windows in each.values()), default=math.nan)
        rows = []
        for rank, windows in each.items():
            seconds, blocked_s, samples, sent = totals[rank]
            rows.append(
                RankRow(
                    rank=rank,
                    samples_per_s=samples / seconds,
                    **{name: self._part(rank, name) for name in PARTS},
                    waiting=min(1.0, blocked_s / seconds),
                    sent_Bps=sent / seconds,
                    relative=best / cost[rank],
                    individual=float(windows.min() / windows[-1]),
                    recent=float(last / windows[-1]),
                    host=self.logs[rank].host,
                    slower=slower_than_before(windows),
                )
            )
        return rows

    def _part(self, rank: int, name: str) -> float:
        """Return the share of a rank's time that a part of the gradient took."""
        spent, seconds = self.column(rank, f"{name}_s"), self.column(rank, "seconds")
        return float(spent[-1] / seconds[-1]) if len(spent) else math.nan

    def _totals(self, rank: int) -> tuple[float, float, float, float]:
        """Return seconds, seconds of waiting, samples, bytes sent of a rank.

        The summary knows more than the last row of the log: a rank that is done may
        wait for others.
        """
        found = []
        for key, name in (
            ("train_seconds", "seconds"),
            ("blocked_s", "blocked_s"),
            ("samples", "samples"),
            ("bytes_sent", "bytes_sent"),
        ):
            each = self.summary.get("per_rank", {}).get(key)
            if each is not None and len(each) == self.ranks:
                found.append(float(each[rank]))
            else:
                found.append(float(self.column(rank, name)[-1]))
        seconds, blocked_s, samples, sent = found
        return seconds, blocked_s, samples, sent

    def _windows(self, rank: int) -> Vector:
        """Return seconds of computing per sample in each window of the run."""
        seconds = self.column(rank, "seconds")
        if len(seconds) < 2:
            return np.array([])
        cuts = np.unique(np.linspace(0, len(seconds) - 1, WINDOWS + 1).astype(int))
        busy = (seconds - self.column(rank, "blocked_s"))[cuts]
        samples = self.column(rank, "samples")[cuts]
        costs: Vector = np.diff(busy) / np.maximum(np.diff(samples), 1.0)
        return np.maximum(costs, 1e-12)


def slower_than_before(windows: Vector) -> float:
    """Return the last window by the median of those before; 1: it is no outlier.

    What is out of line goes by the rank's own spread (world/waits.py): one whose time
    always varies by half is not slow for it.
    """
    *before, last = windows.tolist()
    if len(before) < 3 or last <= typical_limit(before):
        return 1.0
    slower = float(last / np.median(before))
    return slower if slower > 1.0 / SLOW else 1.0


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def smooth(values: Vector) -> Vector:
    """Return running means, shorter at both ends.

    >>> smooth(np.array([1.0, 2.0, 3.0]))
    array([1., 2., 3.])
    """
    half = min(SMOOTHING, len(values) // 8) // 2
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    begin = np.maximum(index - half, 0)
    end = np.minimum(index + half + 1, len(values))
    means: Vector = (sums[end] - sums[begin]) / (end - begin)
    return means
