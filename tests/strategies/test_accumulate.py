"""`train.accumulate`: several minibatches make one step, of every strategy."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from mpilm.data.batch import Batch
from mpilm.data.hdf5 import Corpus
from mpilm.data.streams import Streams
from mpilm.errors import MpilmError
from mpilm.models.lstm_lm import LstmLm
from mpilm.simulate.simulation import samples_per_step

LR, BATCH, UNROLL = 0.5, 4, 10


def first_model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LstmLm(40, embed=12, hidden=16)


class Rank:
    """Plain torch: a model, and its gradient over minibatches in a row."""

    def __init__(self, corpus, rank, size):
        self.model = first_model()
        self.streams = Streams(corpus.split("train"), BATCH, UNROLL, rank, size)

    def accumulated(self, number):
        parameters = list(self.model.parameters())
        total = [torch.zeros_like(p) for p in parameters]
        for _ in range(number):
            batch = self.streams.draw()
            inputs, targets = map(torch.as_tensor, batch[:2])
            loss = self.model.loss(Batch(inputs, targets, *batch[2:]))
            for mean, part in zip(
                total, torch.autograd.grad(loss, parameters), strict=True
            ):
                mean += part / number
        return total

    @torch.no_grad()
    def step_(self, gradient):
        for parameter, part in zip(self.model.parameters(), gradient, strict=True):
            parameter -= LR * part


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("period", [0, 2])
def test_a_step_takes_the_mean_gradient_of_minibatches_in_a_row(run, corpus, period):
    """period 0: allreduce; 2: models averaged every 2 *steps*."""
    accumulate, steps, size = 3, 4, 2
    name = "model_averaging" if period else "allreduce"
    trainers = run(
        size,
        name,
        steps=accumulate * steps,
        train={"accumulate": accumulate},
        strategy={"period": period} if period else {},
    )
    with Corpus.open(corpus) as opened:
        ranks = [Rank(opened, rank, size) for rank in range(size)]
        for step in range(1, steps + 1):
            gradients = [rank.accumulated(accumulate) for rank in ranks]
            if not period:
                mean = [sum(parts) / size for parts in zip(*gradients, strict=True)]
                gradients = [mean] * size
            for rank, gradient in zip(ranks, gradients, strict=True):
                rank.step_(gradient)
            if period and step % period == 0:
                models = [list(rank.model.parameters()) for rank in ranks]
                for parts in zip(*models, strict=True):
                    mean = sum(p.detach() for p in parts) / size
                    for parameter in parts:
                        parameter.data.copy_(mean)
    for rank, trainer in zip(ranks, trainers, strict=True):
        assert trainer.totals.step == steps
        assert trainer.learner.samples == steps * accumulate * BATCH * UNROLL
        expected, found = flat(rank.model), flat(trainer.learner.model)
        assert (found - expected).abs().max() <= 2e-6


def test_the_rate_the_log_and_the_simulation_go_by_its_samples(run):
    accumulate, steps, size = 2, 6, 2
    trainers = run(
        size,
        "allreduce",
        steps=accumulate * steps,
        train={"accumulate": accumulate},
        schedule={"name": "exponential", "final_ratio": 0.01},
    )
    per_step = accumulate * BATCH * UNROLL
    assert samples_per_step(trainers[0].config) == per_step
    with h5py.File(trainers[0].folder.log(0)) as file:
        rows = file["rows"][: file["num"][0]]
    assert rows["step"].tolist() == list(range(1, steps + 1))
    assert rows["samples"].tolist() == [per_step * n for n in range(1, steps + 1)]
    schedule = trainers[0].schedule
    before = [schedule.lr(size * per_step * n) for n in range(steps)]
    assert rows["lr"] == pytest.approx(before)
    assert np.all(np.diff(rows["lr"]) < 0)


@pytest.mark.long
@pytest.mark.parametrize("source", ["shards", "pool"])
@pytest.mark.parametrize("name", ["adpsgd", "async_sgd", "gossip_bmuf"])
def test_out_of_lockstep_a_run_ends_after_its_samples(run, name, source):
    accumulate, size, goal = 3, 3, 12 * 3 * BATCH * UNROLL
    strategy = {"period": 3} if name == "gossip_bmuf" else {}
    trainers = run(
        size,
        name,
        steps=12,
        train={"accumulate": accumulate},
        strategy=strategy,
        data={"source": source, "chunk_windows": 5},
        machine={"step_s": 0.1},
    )
    per_step = accumulate * BATCH * UNROLL
    done = [trainer.learner.samples for trainer in trainers]
    assert [s % per_step for s in done] == [0] * size
    assert [t.totals.step for t in trainers] == [s // per_step for s in done]
    assert goal <= sum(done) < goal + size * per_step


@pytest.mark.long
def test_a_run_goes_on_with_another_number(run):
    first = run(2, "allreduce", steps=8, out="x", train={"accumulate": 2})
    more = run(2, "allreduce", steps=20, out="x", resume=True, train={"accumulate": 4})
    assert [t.totals.step for t in first] == [4, 4]
    assert [t.totals.step for t in more] == [4 + 3] * 2
    assert [t.learner.samples for t in more] == [20 * BATCH * UNROLL] * 2


def test_rows_that_are_pulled_beforehand_are_those_of_one_minibatch(run):
    model = {"softmax": "sampled", "sampled_random": 20, "sampled_frequent": 20}
    with pytest.raises(MpilmError, match=r"train.accumulate = 2: async_sgd"):
        run(
            2,
            "async_sgd",
            train={"accumulate": 2},
            model={**model, "sparse": True},
        )
    sums = run(2, "allreduce", train={"accumulate": 2}, model={**model, "sparse": True})
    assert sums[0].learner.theta.equal(sums[1].learner.theta)
