"""The learner: evaluation, resume, and several in one process."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mpilm.data.streams import EvaluationStreams
from mpilm.errors import CheckpointError
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from tests.unit.learners import (
    TOKENS,
    VOCAB,
    Partly,
    Points,
    adamw,
    make_learner,
    make_model,
    sgd,
    train,
)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (sgd, {"dropout": 0.3}),
        (adamw, {"dropout": 0.3, "tied": True}),
        (lambda p: torch.optim.SGD(p, lr=0.1), {}),
    ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_resume_is_exact_to_the_bit(optimizer, settings, flat):
    whole = make_learner(make_model(**settings), optimizer, seed=5, flat=flat)
    train(whole, 3)
    state = whole.state()
    for name, value in state.items():
        assert isinstance(value, np.ndarray | int | float | str | bytes), name
    losses = train(whole, 4)
    torch.manual_seed(123)
    other = LstmLm(VOCAB, embed=6, hidden=8, layers=2, **settings)
    resumed = make_learner(other, optimizer, seed=99, flat=flat)
    train(resumed, 1)
    resumed.load_state(state)
    assert resumed.samples == 60
    assert train(resumed, 4) == losses
    assert torch.equal(resumed.theta, whole.theta)
    for name, moment in whole.moments().items():
        assert torch.equal(resumed.moments()[name], moment)


def test_buffers_and_frozen_parameters_are_in_the_state():
    whole = Learner(Partly(), Points(), sgd)
    train(whole, 2)
    state = whole.state()
    losses = train(whole, 2)
    resumed = Learner(Partly(), Points(), sgd)
    resumed.load_state(state)
    assert train(resumed, 2) == losses
    mean = resumed.model.norm.running_mean
    assert torch.equal(mean, whole.model.norm.running_mean)


def test_the_state_does_not_change_with_the_learner():
    learner = make_learner()
    train(learner, 1)
    state = learner.state()
    kept = copy.deepcopy(state)
    train(learner, 2)
    for name, value in kept.items():
        assert np.array_equal(state[name], value), name


def test_a_state_of_another_model_is_refused():
    small = make_learner(make_model(hidden=4))
    with pytest.raises(CheckpointError, match=r"theta: .* \d+ parameters, this model"):
        make_learner().load_state(small.state())


def test_learners_in_one_process_do_not_disturb_each_other():
    def make(seed):
        return make_learner(make_model(dropout=0.5), seed=seed)

    alone = [train(make(seed), 4) for seed in (1, 2)]
    assert alone[0] != alone[1]
    assert train(make(1), 4) == alone[0]
    together = [make(seed) for seed in (1, 2)]
    losses = [[], []]
    for turn in [0, 1, 1, 0, 0, 1, 0, 1]:
        losses[turn] += train(together[turn], 1)
    assert losses == alone


def test_evaluation_is_exact_and_leaves_no_trace():
    learner, undisturbed = (make_learner(make_model(dropout=0.5)) for _ in range(2))
    assert train(learner, 2) == train(undisturbed, 2)
    learner.model.dropout.eval()
    undisturbed.model.dropout.eval()
    expected = 0.0
    model = copy.deepcopy(learner.model).eval()
    for batch in EvaluationStreams(TOKENS, 3, 7):
        tensors = batch._replace(
            inputs=torch.as_tensor(batch.inputs), targets=torch.as_tensor(batch.targets)
        )
        expected += model.nll(tensors).item()
    nll, count, _ = learner.evaluate(EvaluationStreams(TOKENS, 3, 7))
    assert count == len(TOKENS) - 1
    assert nll == expected
    parts = [
        learner.evaluate(EvaluationStreams(TOKENS, 3, 7, rank, 2)) for rank in range(2)
    ]
    assert sum(part[1] for part in parts) == count
    assert sum(part[0] for part in parts) == pytest.approx(nll, rel=1e-6)
    assert learner.model.training
    assert not learner.model.dropout.training
    assert train(learner, 3) == train(undisturbed, 3)
    assert torch.equal(learner.theta, undisturbed.theta)


def test_any_module_with_any_loss_can_be_evaluated():
    model = nn.Linear(2, 1)
    learner = Learner(
        model, Points(), sgd, loss=lambda m, b: m(b.inputs).square().mean()
    )
    batches = [Points().next()]
    nll, count, _ = learner.evaluate(batches)
    with torch.no_grad():
        expected = model(torch.as_tensor(batches[0].inputs)).double().square().sum()
    assert count == 8
    assert nll == pytest.approx(expected.item(), rel=1e-6)
