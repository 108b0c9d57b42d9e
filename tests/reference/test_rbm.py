"""RBMs against enumeration of all hidden states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpilm.data.batch import Batch
from mpilm.models.rbm import Rbm, RbmStack
from tests.reference import rbm as reference

N, D, H = 6, 5, 4


@pytest.fixture(params=[True, False], ids=["gaussian", "bernoulli"])
def rbm(request):
    torch.manual_seed(2)
    model = Rbm(D, H, gaussian=request.param, stddev=0.7).double()
    torch.nn.init.normal_(model.hidden_bias)
    torch.nn.init.normal_(model.visible_bias)
    return model


def data(rbm):
    random = np.random.default_rng(1)
    return random.normal(size=(N, D)) if rbm.gaussian else random.uniform(size=(N, D))


def arrays(rbm):
    parts = (rbm.weight, rbm.visible_bias, rbm.hidden_bias)
    return tuple(part.detach().numpy() for part in parts)


def test_free_energy_is_the_sum_over_hidden_states(rbm):
    W, a, b = arrays(rbm)
    v = data(rbm)
    expected = [reference.free_energy(row, W, a, b, rbm.gaussian) for row in v]
    found = rbm.free_energy(torch.from_numpy(v)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_hidden_probabilities_are_shares_of_states(rbm):
    W, _, b = arrays(rbm)
    v = data(rbm)
    expected = [reference.hidden(row, W, b) for row in v]
    found = rbm.hidden(torch.from_numpy(v)).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_the_gradient_is_the_cd1_statistic(rbm, penalty):
    W, a, b = arrays(rbm)
    v0 = data(rbm)
    batch = Batch(torch.from_numpy(v0)[None], torch.zeros(1, N), N, True)
    torch.manual_seed(5)
    RbmStack([], rbm, penalty=penalty).loss(batch).backward()
    torch.manual_seed(5)  # the same h0 is drawn
    h0 = torch.bernoulli(rbm.hidden(torch.from_numpy(v0))).detach().numpy()
    v1 = h0 @ W + a
    v1 = v1 if rbm.gaussian else reference.sigmoid(v1)
    dW, da, db = reference.statistics(v0, v1, W, b)
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(rbm.weight.grad, dW + penalty * W, **close)
    np.testing.assert_allclose(rbm.visible_bias.grad, da, **close)
    np.testing.assert_allclose(rbm.hidden_bias.grad, db, **close)


def test_the_value_is_the_reconstruction_error(rbm):
    W, a, _ = arrays(rbm)
    v0 = data(rbm)
    targets = torch.tensor([[0, 1, -1, 0, 0, 0]])
    batch = Batch(torch.from_numpy(v0)[None], targets, 5, True)
    stack = RbmStack([], rbm)
    torch.manual_seed(5)
    loss = stack.loss(batch).item()
    torch.manual_seed(5)
    h0 = torch.bernoulli(rbm.hidden(torch.from_numpy(v0))).detach().numpy()
    v1 = h0 @ W + a
    v1 = v1 if rbm.gaussian else reference.sigmoid(v1)
    assert loss == pytest.approx(((v0 - v1) ** 2).sum(1).mean(), rel=1e-12)
    first, second = stack.nll(batch), stack.nll(batch)
    assert first == second  # nothing is drawn
    h = rbm.hidden(torch.from_numpy(v0)).detach().numpy()
    v1 = h @ W + a
    v1 = v1 if rbm.gaussian else reference.sigmoid(v1)
    errors = ((v0 - v1) ** 2).sum(1)
    assert first.item() == pytest.approx(errors.sum() - errors[2], rel=1e-12)


def test_what_lies_below_is_passed_through_and_not_trained(rbm):
    lower = [(torch.randn(D, 3).double(), torch.randn(D).double())]
    stack = RbmStack(lower, rbm)
    v = np.random.default_rng(3).normal(size=(N, 3))
    batch = Batch(torch.from_numpy(v)[None], torch.zeros(1, N), N, True)
    expected = reference.sigmoid(v @ lower[0][0].numpy().T + lower[0][1].numpy())
    np.testing.assert_allclose(stack.below(batch), expected, rtol=1e-12)
    names = {name for name, _ in stack.named_parameters()}
    assert names == {"top.weight", "top.hidden_bias", "top.visible_bias"}
