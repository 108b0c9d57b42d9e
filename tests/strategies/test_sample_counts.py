"""Ranks out of lockstep go by the samples of all: learning rate, end, sync points.

In the virtual world the truth is known: what all ranks have done at any moment.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest

from mpilm.data.counts import Counter
from mpilm.errors import MpilmError
from mpilm.storage.checkpoint import Checkpoint
from mpilm.storage.state_file import read_state
from mpilm.strategies.adpsgd import Adpsgd
from mpilm.strategies.async_sgd import AsyncSgd
from mpilm.strategies.hierarchical import Hierarchical
from mpilm.train.run import make_schedule
from mpilm.world.virtual import VirtualWorld

BATCH, UNROLL = 2, 5
N = BATCH * UNROLL  # samples of a minibatch
SMALL = {"embed": 4, "hidden": 4}
FALLING = {"name": "exponential", "final_ratio": 0.01}
KINDS = (Adpsgd, AsyncSgd, Hierarchical)


@dataclass
class Truth:
    """What the ranks have done, and the rates that their updates used.

    done     samples of each rank
    rates    (rank, learning rate, samples of all ranks at the update but its own)
    ended_s  when each rank's last step ended
    """

    done: dict[int, int] = field(default_factory=dict)
    rates: list[tuple[int, float, int]] = field(default_factory=list)
    ended_s: dict[int, float] = field(default_factory=dict)

    def watch(self, step):
        def watched(strategy, learner):
            loss = step(strategy, learner)
            world = strategy.world
            if hasattr(world, "outer"):  # the inner strategy of nodes
                return loss
            rank = world.rank
            self.rates.append((rank, learner.lr, sum(self.done.values())))
            self.done[rank] = learner.samples
            self.ended_s[rank] = world.now_s()
            return loss

        return watched


@pytest.fixture
def truth(monkeypatch):
    truth = Truth()
    for kind in KINDS:
        monkeypatch.setattr(kind, "step", truth.watch(kind.step))
    return truth


def sections(size, slow, source, **train):
    return {
        "model": SMALL,
        "schedule": FALLING,
        "data": {"source": source, "chunk_windows": 5},
        "faults": {"slow": {str(size - 1): slow}},
        "train": {"unroll": UNROLL, "valid_every": 0, "worst_rank": False, **train},
    }


ADPSGD, ASYNC_SGD = {"name": "adpsgd"}, {"name": "async_sgd"}
NODES = {"name": "hierarchical", "node_size": 2}  # the slow rank leads none
NODES_ADPSGD, NODES_ASYNC_SGD = (
    NODES | {"inner": "adpsgd"},
    NODES | {"inner": "async_sgd"},
)


@pytest.mark.long
@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "strategy", "slow", "source"),
    [
        (4, ADPSGD, 10.0, "pool"),
        (4, ADPSGD, 100.0, "pool"),
        (4, ADPSGD, 10.0, "shards"),
        (4, ADPSGD, 100.0, "shards"),
        (16, ADPSGD, 10.0, "shards"),
        (16, ADPSGD, 100.0, "pool"),
        (4, ASYNC_SGD, 10.0, "pool"),
        (4, ASYNC_SGD, 100.0, "shards"),
        (4, NODES_ADPSGD, 100.0, "pool"),
        (4, NODES_ASYNC_SGD, 100.0, "pool"),
    ],
)
def test_rates_follow_the_samples_of_all_and_all_end_together(  # noqa: PLR0917
    run, truth, size, strategy, slow, source
):
    goal = 100 * size * N
    settings = sections(size, slow, source, samples=goal)
    name = strategy["name"]
    trainers = run(size, name, batch=BATCH, strategy=strategy, **settings)
    config = trainers[0].config
    schedule = make_schedule(config, size)
    for rank, lr, done in truth.rates:
        assert lr == pytest.approx(schedule.lr(done), rel=0.1), (rank, done)
    assert goal <= sum(truth.done.values()) < goal + size * N
    summary = json.loads(trainers[0].folder.summary.read_text())
    assert summary["samples"] == sum(truth.done.values())
    step_s = config.machine.step_s
    early_s = sorted(truth.ended_s.values())[-2 if name != "hierarchical" else -3]
    assert max(truth.ended_s.values()) - early_s <= 1.01 * slow * step_s
    steps = [trainer.totals.step for trainer in trainers]
    assert steps[-1] <= max(2, 1.1 * max(steps) / slow + 1)


@pytest.mark.long
@pytest.mark.long
@pytest.mark.parametrize("source", ["pool", "shards"])
@pytest.mark.parametrize("name", ["adpsgd", "async_sgd"])
def test_sync_points_stand_where_all_ranks_are(run, truth, name, source):
    """Their samples are exact, and none is passed by or stood at twice."""
    size, goal = 4, 60 * 4 * N
    settings = sections(size, 10.0, source, samples=goal, valid_every=goal // 3)
    settings["checkpoint"] = {"every": goal // 3, "keep": 9}
    out = f"synced-{name}-{source}"
    trainers = run(size, name, batch=BATCH, out=out, **settings)
    assert goal <= sum(truth.done.values()) < goal + size * N
    kept = sorted(trainers[0].folder.checkpoints.iterdir())
    found = [samples_in(folder, size) for folder in kept]
    assert [own for own, _ in found] == [total for _, total in found]
    totals = [total for _, total in found]
    # a slow rank comes when its step is done: meanwhile the others go no further
    assert totals[0] == pytest.approx(goal / 3, abs=20 * size * N)
    assert totals == sorted(totals) and len(totals) == 3


def samples_in(folder, size):
    """Return the samples that a checkpoint names, and the sum over its ranks."""
    checkpoint = Checkpoint.at(folder)
    own = [read_state(checkpoint.own(rank)) for rank in range(size)]
    total = sum(state["learner/samples"] for state in own)
    return read_state(checkpoint.shared)["samples"], total


@pytest.mark.parametrize("source", ["pool", "shards"])
def test_without_threads_the_strategy_is_named(run, monkeypatch, source):
    monkeypatch.setattr(VirtualWorld, "background", False)
    with pytest.raises(MpilmError) as error:
        run(2, "adpsgd", data={"source": source})
    assert str(error.value).startswith("strategy adpsgd needs MPI_THREAD_MULTIPLE")


@pytest.mark.long
@pytest.mark.parametrize("source", ["pool", "shards"])
def test_counting_ends_when_all_ranks_fail(run, monkeypatch, source):
    """Else rank 0's activity would keep a real run from ending in order."""
    closed = []

    def close(counter):
        ended(counter)
        closed.append(counter.is_running)

    ended = Counter.close
    monkeypatch.setattr(Counter, "close", close)
    with pytest.raises(MpilmError, match=r"the loss is .* at step"):
        run(3, "adpsgd", optim={"lr": 1e30}, data={"source": source})
    assert closed and not any(closed)
