"""Acoustic models against the float64 reference: loss, errors, gradient, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpilm.data.frame_evaluation import assemble, frames_of
from mpilm.data.frame_items import View
from mpilm.models.acoustic import Dnn, LstmAm
from mpilm.models.softmax import Softmax
from tests.reference import acoustic as reference

D, C = 3, 6
LENGTHS = (7, 5, 11)


def make(kind):
    torch.manual_seed(3)
    if kind in ("sigmoid", "relu"):
        return Dnn(D, C, hidden=8, layers=3, activation=kind)
    return LstmAm(D, C, hidden=8, layers=2, bottleneck=4, bidirectional=kind == "blstm")


KINDS = ("sigmoid", "relu", "lstm", "blstm")


@pytest.fixture
def utterances():
    random = np.random.default_rng(0)
    features = [random.normal(size=(n, D)).astype(np.float32) for n in LENGTHS]
    labels = [random.integers(-1, C, n).astype(np.int32) for n in LENGTHS]
    return features, labels


def view_of(kind):
    return View() if kind in ("sigmoid", "relu") else View(steps=4)


def minibatch(kind, features, labels):
    batch = assemble(view_of(kind), features, labels)
    tensors = [torch.from_numpy(array) for array in batch[:2]]
    return batch._replace(inputs=tensors[0], targets=tensors[1])


def parameters_of(model):
    return {n: p.detach().numpy().astype(float) for n, p in model.named_parameters()}


def log_p(kind, parameters, x_TD):
    if kind in ("sigmoid", "relu"):
        return reference.dnn(parameters, x_TD, kind)
    return reference.lstm(parameters, x_TD)


def sums(kind, parameters, features, labels):
    parts = [
        reference.loss_and_errors(log_p(kind, parameters, x.astype(float)), y)
        for x, y in zip(features, labels, strict=True)
    ]
    return np.sum(parts, axis=0)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_errors_and_posteriors_are_those_of_the_reference(kind, utterances):
    model, (features, labels) = make(kind), utterances
    parameters = parameters_of(model)
    batch = minibatch(kind, features, labels)
    nll, errors = model.nll(batch)
    expected_nll, expected_errors = sums(kind, parameters, features, labels)
    assert nll.dtype == torch.float64
    assert nll.item() == pytest.approx(expected_nll, rel=1e-6)
    assert errors.item() == expected_errors
    mean = expected_nll / batch.num_samples
    assert model.loss(batch).item() == pytest.approx(mean, rel=1e-6)
    for x, y in zip(features, labels, strict=True):
        alone = minibatch(kind, [x], [y])
        found = frames_of(view_of(kind), len(x), model.log_posteriors(alone))
        expected = log_p(kind, parameters, x.astype(float))
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_reference(kind, utterances):
    """Central differences in float64, at some elements of every parameter."""
    model, (features, labels) = make(kind), utterances
    batch = minibatch(kind, features, labels)
    model.loss(batch).backward()
    parameters = parameters_of(model)
    random = np.random.default_rng(1)
    for name, parameter in model.named_parameters():
        grad = parameter.grad.numpy()
        for _ in range(3):
            where = tuple(random.integers(0, n) for n in grad.shape)
            losses = []
            for step in (1e-5, -1e-5):
                moved = {**parameters, name: parameters[name].copy()}
                moved[name][where] += step
                losses.append(sums(kind, moved, features, labels)[0])
            slope = (losses[0] - losses[1]) / 2e-5 / batch.num_samples
            assert grad[where] == pytest.approx(slope, abs=2e-6), name


def test_the_network_of_the_adpsgd_papers_has_their_size():
    """Some 43 million parameters (docs/references.md); made without memory."""
    with torch.device("meta"):
        model = LstmAm(
            260, 32_000, hidden=1024, layers=6, bottleneck=256, bidirectional=True
        )
    cells, below = 512, [260, *[1024] * 5]
    lstm = sum(2 * 4 * (cells * (n + cells) + 2 * cells) for n in below)
    total = lstm + 1024 * 256 + 256 + 256 * 32_000 + 32_000
    assert sum(p.numel() for p in model.parameters()) == total
    assert total == 43_154_944


def test_the_softmax_is_the_fused_one():
    """NG-SGD finds it, and the linear layers and the LSTM, by their types."""
    types = {type(m) for m in make("blstm").modules()}
    assert {Softmax, torch.nn.LSTM, torch.nn.Linear} <= types
