"""A validation that is worse puts the best model back, on every rank."""

from __future__ import annotations

import pytest
import torch

from mpilm.errors import MpilmError
from mpilm.train.loop import Trainer

EVERY = 2 * 4 * 10 * 5  # samples: 5 steps of 2 ranks
SECTIONS = {
    "schedule": {"name": "newbob", "reject": True, "stop_halving": 0.0},
    "strategy": {"period": 2},
}


@pytest.fixture
def verdicts(monkeypatch):
    """Return the list of losses that validations measure, and what was then kept."""
    losses = [3.0, 2.5, 2.9, 2.4, 2.8, 0.0]
    seen = []
    plain = Trainer.validate

    def validate(self):
        before = self.learner.theta.clone()
        index = sum(rank == self.world.rank for rank, *_ in seen)
        observe = self.schedule.observe

        def told(loss, accuracy):
            return observe(losses[index], accuracy)

        self.schedule.observe = told
        plain(self)
        self.schedule.observe = observe
        seen.append((self.world.rank, before, self.learner.theta.clone()))

    monkeypatch.setattr(Trainer, "validate", validate)
    return seen


def train(run, **sections):
    settings = {"samples": 6 * EVERY - EVERY // 2, "valid_every": EVERY}
    return run(2, "model_averaging", train=settings, **SECTIONS, **sections)


@pytest.mark.long
def test_every_rank_goes_back_to_what_it_had_at_the_best_validation(run, verdicts):
    trainers = train(run)
    for rank in range(2):
        own = [(before, after) for r, before, after in verdicts if r == rank]
        kept = [torch.equal(before, after) for before, after in own]
        assert kept == [True, True, False, True, False, True]  # the last: at the end
        assert torch.equal(own[2][1], own[1][1])
        assert torch.equal(own[4][1], own[3][1])
        assert torch.equal(trainers[rank].learner.theta, own[3][1])
    assert trainers[0].schedule.newbob.factor == 0.5**2
    assert trainers[0].schedule.finished  # the second one that was worse, halving
    assert trainers[0].totals.step == 25


@pytest.mark.long
def test_the_best_model_is_in_the_checkpoint(run):
    whole = train(run, out="whole", checkpoint={"every": EVERY})
    state = whole[1].best.state()
    whole[0].folder.summary.unlink()  # as if it had been killed before its end
    again = train(run, out="whole", resume=True, checkpoint={"every": EVERY})
    assert (again[1].best.state()["theta"] == state["theta"]).all()


def test_refused_where_theta_is_not_the_whole_model(run):
    with pytest.raises(MpilmError, match=r"reject: strategy bmuf .*local, allreduce"):
        run(2, "bmuf", schedule={"name": "newbob", "reject": True})


def test_accuracy_is_for_frames(run):
    with pytest.raises(MpilmError, match="lstm_lm has no frame accuracy"):
        run(2, "local", schedule={"name": "newbob_accuracy"})
