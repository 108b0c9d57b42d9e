"""A rank dies: what a peer's copy of it brings back, in the virtual world.

The mean is computed again here, from what the ranks had: the dead one as it noted it
itself after the step of its copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mpilm.config import resolve
from mpilm.data.pool import PoolBatches
from mpilm.train.loop import Trainer
from mpilm.vectors import to_array
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual


class Noted(Trainer):
    """A trainer that notes what its rank has after each step, and around a death.

    steps    step -> theta, g and Delta of block momentum, moments, samples
    left     the same when others had died; gone_on: when training goes on
    joined   the same when this rank joins
    """

    def __init__(self, *arguments, notes, **options):
        self.steps, self.joined = {}, None
        self.left = self.gone_on = None
        notes.append(self)  # who dies returns nothing
        super().__init__(*arguments, **options)
        if self.world.joins:
            self.joined = self.found()

    def found(self):
        learner = self.learner
        momentum = getattr(self.strategy, "momentum", None)
        return {
            "theta": to_array(learner.theta),
            "g": momentum and to_array(momentum.start_point),
            "Delta": momentum and to_array(momentum.delta),
            "moments": {n: to_array(v) for n, v in learner.moments().items()},
            "samples": learner.samples,
        }

    def look_after_saving(self):
        self.steps[self.totals.step] = self.found()
        super().look_after_saving()

    def regroup(self):
        self.strategy.survive(self.learner)
        self.left = self.found()
        goes_on = super().regroup()
        self.gone_on = self.found()
        return goes_on


@pytest.fixture
def train(corpus, tmp_path):
    """Return a function: train where these ranks die; return what the ranks noted."""

    def train(name, deaths, *, every, size=3, samples=2200, **sections):
        config = resolve(
            {
                "data": {"corpus": str(corpus), **sections.get("data", {})},
                "model": {"embed": 12, "hidden": 16},
                "optim": {"name": "sgd", "lr": 0.2, "momentum": 0.5},
                "train": {
                    "batch": 4,
                    "unroll": 10,
                    "samples": samples,
                    "test": False,
                    "worst_rank": False,
                    **sections.get("train", {}),
                },
                "strategy": {"name": name, **sections.get("strategy", {})},
                "checkpoint": {"peer_every": every},
                "world": {"on_death": "go_on", **sections.get("world", {})},
                "faults": {
                    "profile": [
                        {"kind": "fail_at", "rank": r, "step": s} for r, s in deaths
                    ]
                },
            }
        )
        notes = []

        def main(world):
            trainer = Noted(config, world, tmp_path / "run", notes=notes)
            trainer.train()
            return trainer.world.size

        machine = Machine(step_s=0.1)
        sizes = run_virtual(
            main, size, machine=machine, faults=config.faults, can_shrink=True
        )
        return notes, sizes

    return train


def mean(*vectors):
    """Return the mean of some vectors, summed in this order."""
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
    total /= len(vectors)
    return total


BLOCKS = {"eta": 0.5}  # the automatic one follows the number of ranks


@dataclass(frozen=True)
class Case:
    """A strategy, its settings; copies every so many steps; rank 2 dies after some."""

    name: str
    every: int
    death: int
    of_copy: int
    settings: dict[str, Any]


CASES = {
    "local": Case("local", 5, 13, 10, {}),
    # the mean at 18 never comes
    "model_averaging": Case("model_averaging", 4, 17, 16, {"period": 9}),
    "des_loc": Case("des_loc", 4, 17, 16, {"period": 9}),
    "bmuf": Case("bmuf", 3, 15, 15, {"period": 8, **BLOCKS}),
    "bmuf, delay": Case("bmuf", 3, 15, 15, {"period": 8, "delay": 4, **BLOCKS}),
    "gossip_bmuf": Case("gossip_bmuf", 2, 15, 14, {"period": 4, **BLOCKS}),
    "gossip_bmuf, delay": Case(
        "gossip_bmuf", 2, 15, 14, {"period": 4, "delay": 1, **BLOCKS}
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_copy_is_one_of_the_models(train, capsys, case):
    """Without it, the mean would be that of two, and rank 2's steps lost."""
    name, of_copy = case.name, case.of_copy
    notes, _ = train(name, [(2, case.death)], every=case.every, strategy=case.settings)
    first, second, dead = notes
    copy = dead.steps[of_copy]
    for what in ("theta", "g", "Delta"):
        if copy[what] is None or (name == "bmuf" and what != "theta"):
            continue
        # rank 0 holds the copy: it adds the two, and the other's come to that
        expected = mean(first.left[what], copy[what], second.left[what])
        for trainer in (first, second):
            assert np.array_equal(trainer.gone_on[what], expected), what
        assert not np.array_equal(mean(first.left[what], second.left[what]), expected)
    line = capsys.readouterr().out
    assert f"of their models and that of rank 2 after {of_copy} steps at" in line
    total = first.left["samples"] + second.left["samples"] + copy["samples"]
    assert f" at {total:,} samples, " in line


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("model_averaging", {"period": 5}),
        ("bmuf", {"period": 5, "delay": 1, **BLOCKS}),
        ("dpsgd", {}),  # a step begins with an exchange
    ],
)
def test_a_copy_of_before_an_exchange_is_not_merged(train, capsys, name, settings):
    """What it holds, of step 8, is in the others' models since step 10."""
    (first, second, _), _ = train(
        name, [(2, 12)], every=8, strategy=settings, samples=2000
    )
    expected = mean(first.left["theta"], second.left["theta"])
    assert np.array_equal(first.gone_on["theta"], expected)
    assert "2 go on from the mean of their models at" in capsys.readouterr().out


def test_who_held_the_copy_has_died_too(train, capsys):
    """Then it is as without copies, and a line says so."""
    notes, sizes = train("local", [(1, 12), (2, 12)], every=5, size=4, samples=2000)
    first, _, _, last = notes
    # of rank 1 rank 2 had the copy; that of rank 2 is rank 3's
    vectors = [first.left, notes[2].steps[10], last.left]
    expected = mean(*(found["theta"] for found in vectors))
    assert np.allclose(first.gone_on["theta"], expected, rtol=0.0, atol=1e-6)
    assert "(no copy is left of rank 1)" in capsys.readouterr().out
    assert sizes == [2, None, None, 2]


def test_who_joins_gets_the_moments_of_who_died(train):
    (_, _, dead, joined), _ = train(
        "local", [(2, 12)], every=5, world={"on_death": "replace"}, samples=6000
    )
    for name, moment in dead.steps[10]["moments"].items():
        assert np.array_equal(joined.joined["moments"][name], moment), name


def test_the_pool_goes_on_where_the_dead_rank_was():
    """Not one minibatch is dealt twice of what it had seen until the copy."""
    tokens, size = np.arange(1 + 2 * 3 * 4 * 12), 3  # 12 chunks of 4 minibatches

    def pool(rank, size):
        return PoolBatches(tokens, 2, 3, 4, rank, size, seed=1)

    def seen(batches, num):
        return [int(batches.next().inputs.min()) for _ in range(num)]

    before = [pool(rank, size) for rank in range(size)]
    drawn = [seen(batches, 6) for batches in before]
    places = [batches.survive() for batches in before]
    seen(before[2], 1)  # after its copy
    after = [pool(rank, 2) for rank in range(2)]
    for rank, batches in enumerate(after):
        batches.take_over(places, rank, 2, samples=18 * 6)
        # of three chunks in hand, two minibatches left in each; then three chunks each
        drawn.append(seen(batches, (2 * 2, 2)[rank] + 3 * 4))
    found = [number for numbers in drawn for number in numbers]
    assert sorted(found) == sorted({*found})
    assert len(found) == 12 * 4
