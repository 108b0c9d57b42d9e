"""Which strategy, period and batch: candidates, their speed, their loss at equal time.

    candidates -> protocols in virtual time -> the most promising -> training of those
                  (speed, waiting, drift)      of each strategy      in virtual time

Promise     Before any training, by the protocol alone:

                samples/s / (1 + drift / H)                                        (1)

            drift as in drift.py; H a guess (PATIENCE). It decides who is trained, and,
            without data, who is recommended: a guess then, and said to be one.
Equal time  A budget of virtual seconds; everyone trains as many samples as its protocol
            makes in them, schedule and all. The lower loss of the final model wins.
Batch       A step of b sequences takes b/b0 of the declared step_s unless it is given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mpilm.config import Config, resolve
from mpilm.convert import fields_of
from mpilm.errors import DivergenceError, MpilmError
from mpilm.learner.flat import Layout
from mpilm.simulate.simulation import (
    Outcome,
    co_simulate,
    samples_per_step,
    simulate_protocol,
)
from mpilm.strategies import STRATEGIES

PERIODS = (2, 10, 50)
# Chosen, not tuned: steps of drift that halve what a sample is worth.
PATIENCE = 25.0
LEAST_STEPS = 60  # of a protocol: some rounds of every strategy
NOT_ASKED = ("local", "hierarchical")  # no exchange; only where nodes hold several
SAME = 0.02  # perplexities closer than this say nothing in so short a run


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    period  steps between two rounds; 0: the strategy has no such setting
    batch   sequences (or frames) of a minibatch of one rank
    step_s  seconds of its gradient
    """

    strategy: str
    period: int
    batch: int
    step_s: float

    def __str__(self) -> str:
        return (
            f"{self.strategy}, period {self.period}" if self.period else self.strategy
        )

    def applied(self, config: Config) -> Config:
        """Return the configuration with this strategy, period and batch.

        What the configuration says of this strategy stays; of another one, the wire,
        if this one has it.

        Raises:
            ConfigError: they do not go together.
        """
        document = config.to_document()
        given = document["strategy"]
        chosen: dict[str, Any] = {"name": self.strategy}
        if given["name"] == self.strategy:
            chosen = given
        elif given.get("wire") in wires_of(STRATEGIES[self.strategy].Config):
            chosen["wire"] = given["wire"]
        if self.period and self.strategy == "hierarchical":
            if chosen.get("inner") not in _periodic():
                chosen = {"name": self.strategy, "inner": "gossip_bmuf"}
            inner = {**chosen.get("settings", {}), "period": self.period}
            chosen = {**chosen, "settings": inner}
        elif self.period:
            chosen = {**chosen, "period": self.period}
        document["strategy"] = chosen
        document["train"]["batch"] = self.batch
        document["machine"]["step_s"] = self.step_s
        return resolve(document)


@dataclass
class Row:
    """A candidate and what is known of it.

    spoken   its protocol's outcome; None: it cannot be run
    trained  its training's, at equal time; None: it was not trained
    why      it cannot be run, or its training failed: a line
    """

    candidate: Candidate
    spoken: Outcome | None = None
    trained: Outcome | None = None
    why: str = ""

    @property
    def promise(self) -> float:
        """(1); 0 if it cannot be run."""
        if self.spoken is None:
            return 0.0
        assert self.spoken.drift is not None
        return self.spoken.samples_per_s / (1.0 + self.spoken.drift / PATIENCE)

    @property
    def loss(self) -> float:
        """Perplexity (of other models: what takes its place) at equal time."""
        if self.trained is None or self.trained.perplexity is None:
            return math.inf
        return self.trained.perplexity

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {**dataclasses.asdict(self), "promise": self.promise}


def wires_of(kind: type) -> tuple[str, ...]:
    """Return the wire formats that the settings of a strategy know."""
    return get_args(get_type_hints(kind).get("wire"))


def _periodic() -> list[str]:
    return [name for name, s in STRATEGIES.items() if "period" in fields_of(s.Config)]


def default_strategies(config: Config, ranks: int) -> list[str]:
    """Return what is tried: all that exchange something on these ranks."""
    names = [name for name in STRATEGIES if name not in NOT_ASKED]
    if 1 < config.machine.ranks_per_node < ranks:
        names.append("hierarchical")
    return names


def candidates(
    config: Config,
    strategies: Sequence[str],
    periods: Sequence[int],
    batches: dict[int, float],
) -> list[Candidate]:
    """Return all combinations that differ.

    Args:
        batches: sequences of a minibatch to seconds of its gradient; 0.0: as long as
            its share of the configured batch.
    """
    machine, base = config.machine, config.train.batch
    periodic = (*_periodic(), "hierarchical")
    return [
        Candidate(name, period, batch, step_s or machine.step_s * batch / base)
        for name in strategies
        for period in (periods if name in periodic else (0,))
        for batch, step_s in batches.items()
    ]


def play(config: Config, row: Row, layout: Layout, ranks: int) -> None:
    """Fill in what the protocol of a candidate comes to."""
    period = max(1, row.candidate.period)
    steps = 2 * period * math.ceil(LEAST_STEPS / 2 / period)  # rounds, in each half
    try:
        one = row.candidate.applied(config)
        one.faults.check(ranks)
        row.spoken = simulate_protocol(one, layout, ranks, steps)
    except MpilmError as error:
        row.why = str(error)


def finalists(rows: Sequence[Row], most: int) -> list[Row]:
    """Return the most promising candidate of each strategy, the best `most` of them."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row.candidate.strategy, row.candidate.batch)
        if row.promise > best.get(key, Row(row.candidate)).promise:
            best[key] = row
    return sorted(best.values(), key=lambda row: -row.promise)[:most]


def neighbours(rows: Sequence[Row]) -> list[Row]:
    """Return what the best of the trained ones is at other periods, untrained yet."""
    best = min(rows, key=lambda row: row.loss)
    mine = best.candidate
    return [
        row
        for row in rows
        if row.spoken and row.trained is None and not row.why
        if replace(row.candidate, period=mine.period) == mine
    ]


def co_train(config: Config, row: Row, ranks: int, budget_s: float, out: Path) -> None:
    """Fill in what training of a candidate comes to in `budget_s` virtual seconds.

    Raises:
        MpilmError: nobody can be trained: no corpus, and the like.
    """
    one = row.candidate.applied(config)
    assert row.spoken is not None
    per_round = ranks * samples_per_step(one)
    samples = max(per_round, round(row.spoken.samples_per_s * budget_s))
    every = max(1, samples // per_round // 20)
    settings = replace(
        one.train, samples=samples, log_every=every, valid_every=0, test=False
    )
    checkpoint = replace(one.checkpoint, every=0)
    one = replace(one, train=settings, checkpoint=checkpoint)
    try:
        row.trained = co_simulate(one, out, ranks)
    except DivergenceError as error:
        row.why = str(error)


def worth_showing(rows: Sequence[Row]) -> list[Row]:
    """Return of ranked rows the trained ones, and the first of every other strategy."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.candidate.strategy, row)
    return [
        row
        for row in rows
        if row.trained or row.why or first[row.candidate.strategy] is row
    ]


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Return those that can run, the best first: trained ones, by loss; by promise."""
    able = [row for row in rows if row.spoken is not None]
    return sorted(able, key=lambda row: (row.loss, bool(row.why), -row.promise))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each row; `ppl` is of the valid split, at equal time."""
    trained = any(row.trained for row in rows)
    width = max([24, *(len(row.candidate.strategy) + 2 for row in rows)])
    head = f"{'strategy':<{width}}{'period':>6}{'batch':>7}{'samples/s':>12}"
    head += f"{'efficiency':>12}{'waiting':>9}{'drift':>7}{'MB/step':>9}"
    yield head + (f"{'samples':>12}{'valid ppl':>11}" if trained else "")
    for row in rows:
        candidate, o = row.candidate, row.spoken
        line = f"{candidate.strategy:<{width}}{candidate.period or '-':>6}"
        line += f"{candidate.batch:>7}"
        if o is None:
            yield f"{line}  cannot run: {row.why}"
            continue
        line += f"{o.samples_per_s:>12,.0f}{o.efficiency:>12.1%}"
        line += f"{o.communication:>9.1%}{o.drift or 0.0:>7.1f}{_step_mb(o):>9.2f}"
        if row.trained:
            line += f"{row.trained.samples:>12,}{row.loss:>11.2f}"
        elif row.why:
            line += f"  {row.why}"
        yield line


def _step_mb(outcome: Outcome) -> float:
    return outcome.bytes_sent / outcome.ranks / outcome.steps / 1e6


def reasons(
    rows: Sequence[Row], budget_s: float, *, stored: bool = False
) -> Iterator[str]:
    """Yield why the first of ranked rows is recommended, and why the next is not.

    Args:
        stored: nothing was trained; what it comes to is that of stored runs.
    """
    best, others = rows[0], rows[1:]
    o = best.spoken
    assert o is not None and o.drift is not None
    lost = 1.0 - o.efficiency
    yield (
        f"{best.candidate}, batch {best.candidate.batch}, makes"
        f" {o.samples_per_s:,.0f} samples/s on {o.ranks} ranks,"
        f" {o.efficiency:.0%} of ranks that never wait: communication takes"
        f" {o.communication:.0%} of a rank's time, for {_step_mb(o):.2f} MB sent a"
        " step."
    )
    if lost - o.communication > 0.05:
        yield (
            f"Another {lost - o.communication:.0%} goes to stragglers and to what the"
            " strategy itself computes."
        )
    yield (
        "All ranks hold the same model after every step."
        if o.drift < 0.05
        else f"A rank's model is {o.drift:.1f} of its own steps from the mean of all."
    )
    if best.trained is not None:
        yield (
            f"{'In' if stored else 'Trained for'} {budget_s:.4g} virtual seconds it"
            f" reads {best.trained.samples:,} samples and reaches a perplexity of"
            f" {best.loss:.2f} on the valid split{', as it did before' * stored}."
        )
    else:
        yield (
            "Nothing was trained: it has the most samples/s after a guess at what drift"
            f" costs ({PATIENCE:g} steps of it halve what a sample is worth)."
        )
    rival = next((r for r in others if r.candidate.strategy != _name(best)), None)
    for row in filter(None, (rival, *_notable(others, rival))):
        yield _lost(row, best, "" if stored else "failed: ")


def _name(row: Row) -> str:
    return row.candidate.strategy


def _notable(others: Sequence[Row], rival: Row | None) -> list[Row]:
    """Return who else deserves a sentence: allreduce, which everybody knows."""
    return [r for r in others if _name(r) == "allreduce" and r is not rival][:1]


def _lost(row: Row, best: Row, failed: str) -> str:
    """Return why a row is not recommended; `failed`: said before why it has no loss."""
    o, first = row.spoken, best.spoken
    assert o is not None and first is not None
    assert o.drift is not None and first.drift is not None
    text = f"{row.candidate}, batch {row.candidate.batch}"
    if row.why:
        return f"{text}, {failed}{row.why}."
    parts = []
    ratio = o.samples_per_s / first.samples_per_s
    if ratio < 0.95:
        parts.append(f"is slower, {ratio:.2f} x, waiting {o.communication:.0%}")
    elif ratio > 1.05:
        parts.append(f"is faster, {ratio:.2f} x")
    else:
        parts.append("is as fast")
    if o.drift > first.drift + 0.5:
        parts.append(f"its ranks are {o.drift:.1f} steps from their mean")
    if row.trained is not None and best.trained is not None:
        parts.append(f"it reaches a perplexity of {row.loss:.2f} in the same time")
        if row.loss < (1.0 + SAME) * best.loss:
            parts.append("too close to tell them apart in so short a run")
    return f"{text}, loses: it {'; '.join(parts)}."
