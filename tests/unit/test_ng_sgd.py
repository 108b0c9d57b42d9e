"""NG-SGD: against Kaldi's affine layer, against equations, with the Learner."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpilm.errors import CheckpointError, ConfigError
from mpilm.learner.learner import Learner
from mpilm.models.softmax import PADDING, Softmax
from mpilm.optim.affine import preconditioner
from mpilm.optim.configs import NgSgdConfig
from mpilm.optim.natural_gradient import NaturalGradient
from mpilm.optim.ng_sgd import NgSgd, precondition_

BESIDE = Path(__file__).parents[2] / "../shared/data"
GOLDEN = Path(os.environ.get("MPILM_DATA", BESIDE)) / "kaldi_ng_golden.h5"

PLAIN = 1e15  # alpha at which preconditioning is the identity to rounding


def distance(found, expected):
    expected = np.asarray(expected, dtype=np.float64)
    return np.linalg.norm(np.asarray(found) - expected) / np.linalg.norm(expected)


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"no {GOLDEN}")
@pytest.mark.parametrize(
    ("dtype", "suffix", "limit"),
    [(torch.float64, "_dp", 1e-6), (torch.float32, "", 1e-4)],
)
@pytest.mark.parametrize("summed", [True, False])
def test_layer_equals_kaldi_over_20_updates(dtype, suffix, limit, summed):
    """Closed loop: each derivative comes from the layer as trained so far."""
    with h5py.File(GOLDEN) as golden:
        group = golden["affine"]
        at = {name: data[:] for name, data in group.items()}
        attributes = dict(group.attrs)
    num_steps, N, I = at["X"].shape  # noqa: E741
    layer = nn.Linear(I, at["target"].shape[2], dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(at["W0"]))
        layer.bias.copy_(torch.from_numpy(at["b0"]))
    lr = float(attributes["learning_rate"])
    config = NgSgdConfig(
        lr=lr if summed else lr * N,
        rank_in=int(attributes["rank_in"]),
        rank_out=int(attributes["rank_out"]),
        alpha=float(attributes["alpha"]),
        num_samples_history=float(attributes["num_samples_history"]),
        update_period=int(attributes["update_period"]),
        summed=summed,
        max_change="none",
    )
    maps = precondition_(layer, config)
    optimizer = NgSgd(list(layer.parameters()), maps=maps, config=config)
    for step in range(num_steps):
        X = torch.tensor(at["X"][step], dtype=dtype)
        target = torch.tensor(at["target"][step], dtype=dtype)
        loss = 0.5 * (layer(X) - target).square().sum() / N
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert distance(layer.weight.detach(), at["W" + suffix][step]) < limit
        assert distance(layer.bias.detach(), at["b" + suffix][step]) < limit
    assert num_steps == 20


class Net(nn.Module):
    """Two maps, the first without a bias, and a softmax; optionally tied rows."""

    def __init__(self, *, embedding=False):
        super().__init__()
        self.first = nn.Linear(6, 8, bias=False)
        self.second = nn.Linear(8, 5)
        self.softmax = Softmax(5, 7)
        nn.init.normal_(self.softmax.weight)
        if embedding:
            self.embedding = nn.Embedding(3, 6)

    def loss(self, batch):
        x = torch.tanh(self.second(torch.tanh(self.first(batch.x))))
        return self.softmax(x, batch.y)

    def plain_loss(self, batch):
        x = torch.tanh(F.linear(batch.x, self.first.weight))
        x = torch.tanh(F.linear(x, self.second.weight, self.second.bias))
        logits = F.linear(x, self.softmax.weight, self.softmax.bias)
        return F.cross_entropy(logits, batch.y, ignore_index=PADDING)


class Frames(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    num_samples: int


class Batches:
    """Random frames, the same for the same seed."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.drawn = 0

    def next(self):
        self.drawn += 1
        y = self.random.integers(0, 7, 32)
        x = self.random.normal(size=(32, 6)) + y[:, None] / 4
        return Frames(x.astype(np.float32), y, 32)

    def state(self):
        return {"drawn": self.drawn}

    def load_state(self, state):
        while self.drawn < state["drawn"]:
            self.next()


def make(config, **kwargs):
    torch.manual_seed(1)
    net = Net(**kwargs)
    maps = precondition_(net, config)
    learner = Learner(net, Batches(), partial(NgSgd, maps=maps, config=config))
    return learner, maps


def tensors(batch):
    return Frames(torch.from_numpy(batch.x), torch.from_numpy(batch.y), 32)


@pytest.mark.parametrize("summed", [False, True])
def test_large_alpha_gives_the_plain_gradient(summed):
    config = NgSgdConfig(alpha=PLAIN, summed=summed, max_change="none")
    learner, _ = make(config)
    batch = tensors(Batches().next())
    parameters = list(learner.model.parameters())
    plain = torch.autograd.grad(learner.model.plain_loss(batch), parameters)
    loss = learner.gradient()
    assert loss == pytest.approx(learner.model.plain_loss(batch).item(), rel=1e-5)
    for parameter, expected in zip(parameters, plain, strict=True):
        expected = expected * (32 if summed else 1)
        assert distance(parameter.grad, expected) < 1e-5


def test_padding_and_several_axes_are_rows():
    config = NgSgdConfig(alpha=PLAIN, max_change="none")
    net = Net()
    precondition_(net, config)
    x, y = torch.randn(4, 8, 6), torch.randint(0, 7, (32,))
    y[::5] = PADDING
    flat = Frames(x.reshape(32, 6), y, 32)
    hidden = torch.tanh(net.second(torch.tanh(net.first(x))))
    loss = net.softmax(hidden.flatten(0, 1), y)
    loss.backward()
    expected = torch.autograd.grad(net.plain_loss(flat), list(net.parameters()))
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        assert distance(parameter.grad, gradient) < 1e-5


def test_gradient_by_the_layers_inputs_is_torchs():
    net = nn.Linear(6, 8)
    x = torch.randn(9, 6, requires_grad=True)
    weights = torch.randn(9, 8)
    expected = torch.autograd.grad((net(x) * weights).sum(), x)[0]
    precondition_(net, NgSgdConfig())
    found = torch.autograd.grad((net(x) * weights).sum(), x)[0]
    assert torch.allclose(found, expected, atol=1e-6)


def test_scale_of_the_loss_does_not_matter_to_the_direction():
    """Derivatives of a mean are N times too small for epsilon: they are scaled up."""
    x, y = torch.randn(4096, 6), torch.randn(4096, 8)
    gradients = []
    for factor in (1.0, 1e-3):
        torch.manual_seed(2)
        layer = nn.Linear(6, 8)
        precondition_(layer, NgSgdConfig(max_change="none"))
        (0.5 * factor * (layer(x) - y).square().sum(1).mean()).backward()
        gradients.append(layer.weight.grad / factor)
    assert distance(gradients[1], gradients[0]) < 1e-3


def step_norm(learner, parameters):
    """Train once; return the norm of what was added to `parameters`."""
    before = [p.detach().clone() for p in parameters]
    learner.gradient()
    learner.update()
    steps = [p.detach() - b for p, b in zip(parameters, before, strict=True)]
    return torch.cat([step.flatten() for step in steps]).norm().item()


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("form", ["nnet2", "su_chen"])
@pytest.mark.parametrize("lr", [0.01, 1000.0])
def test_max_change_per_sample(form, summed, lr):
    """The gradient is the unlimited one times min(1, m N / bound), by hand."""
    m, N = 0.002, 32
    settings = {"lr": lr, "summed": summed, "max_change_per_sample": m}
    free, _ = make(NgSgdConfig(max_change="none", **settings))
    limited, _ = make(NgSgdConfig(max_change=form, **settings))
    free.gradient()
    limited.gradient()
    # the second map, from its definition
    net = free.model
    batch = tensors(Batches().next())
    h = torch.tanh(net.first(batch.x)).detach()
    y = F.linear(h, net.second.weight, net.second.bias).detach().requires_grad_()
    dy = torch.autograd.grad(net.softmax(torch.tanh(y), batch.y), y)[0] * N
    config = NgSgdConfig()
    h_hat, s_in = preconditioner(config, 20, 8)(torch.cat([h, torch.ones(N, 1)], 1))
    dy_hat, s_out = preconditioner(config, 80, 5)(dy)
    bound = sum(
        (h_hat[n].norm() * dy_hat[n].norm()).item() * float(s_in * s_out)
        for n in range(N)
    )
    if form == "nnet2":
        bound *= lr if summed else lr / N
    factor = min(1.0, m * N / bound)
    assert (factor < 1) == (form == "su_chen" or lr > 1 or summed)
    expected = factor * net.second.weight.grad
    assert distance(limited.model.second.weight.grad, expected) < 1e-4


def test_nnet3_limits_maps_and_the_whole():
    limits = {"max_change_map": 0.01, "max_change_all": 0.015}
    learner, maps = make(NgSgdConfig(lr=100.0, max_change="nnet3", **limits))
    everything = list(learner.model.parameters())
    assert step_norm(learner, everything) == pytest.approx(0.015, rel=1e-3)
    limits = {"max_change_map": 0.01, "max_change_all": 100.0}
    learner, maps = make(NgSgdConfig(lr=100.0, max_change="nnet3", **limits))
    for layer in maps:
        own = list(layer.owned)
        assert step_norm(learner, own) == pytest.approx(0.01, rel=1e-3)


def test_nnet3_leaves_small_steps_alone():
    config = NgSgdConfig(lr=1e-3, max_change="nnet3")
    limited, _ = make(config)
    free, _ = make(NgSgdConfig(lr=1e-3, max_change="none"))
    for learner in (limited, free):
        for _ in range(3):
            learner.gradient()
            learner.update()
    assert torch.equal(limited.theta, free.theta)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nnet3_skips_a_minibatch_that_is_not_finite(value):
    learner, _ = make(NgSgdConfig(max_change="nnet3"))
    before = learner.theta.clone()
    learner.gradient()
    learner.grad[3] = value
    learner.update()
    assert torch.equal(learner.theta, before)


@pytest.mark.parametrize("limits", [(0.01, 0.015), (0.01, 100.0), (10.0, 10.0)])
def test_limits_taken_on_a_gpu_are_the_same(limits):
    """The way with few kernels, which works on a CPU too."""
    most_map, most_all = limits
    limits = {"max_change_map": most_map, "max_change_all": most_all}
    stepped = []
    for looks in (True, False):
        config = NgSgdConfig(lr=100.0, max_change="nnet3", **limits)
        learner, _ = make(config)
        learner.gradient()
        gradients = [p.grad for p in learner.model.parameters()]
        factor = learner.optimizer._limit_(gradients, looks=looks)
        stepped.append(learner.grad * factor)
    assert torch.allclose(*stepped, rtol=1e-5, atol=1e-9)
    gradients[0].view(-1)[0] = torch.nan
    learner.optimizer._limit_(gradients, looks=False)
    assert not learner.grad.any()


def test_nnet2_follows_the_schedule_of_the_rate():
    settings = {"max_change": "nnet2", "max_change_per_sample": 1e-4, "lr": 10.0}
    first, _ = make(NgSgdConfig(**settings))
    second, _ = make(NgSgdConfig(**settings))
    second.lr = 20.0
    first.gradient()
    second.gradient()
    assert distance(second.grad * 2, first.grad) < 1e-5


def test_resumed_equals_uninterrupted_to_the_bit():
    config = NgSgdConfig(lr=0.5)
    whole, _ = make(config)
    for _ in range(5):
        whole.gradient()
        whole.update()
    state = whole.state()
    assert state["optimizer/0/second/in/W"].shape == (4, 9)
    assert state["optimizer/0/second/out/d"].dtype == np.float64
    resumed, maps = make(config)
    resumed.load_state(state)
    for learner in (whole, resumed):
        for _ in range(10):
            learner.gradient()
            learner.update()
    assert torch.equal(whole.theta, resumed.theta)
    assert maps[0].sides["in"][0].fisher.t == 15


def test_state_of_other_ranks_is_refused():
    learner, _ = make(NgSgdConfig())
    learner.gradient()
    other, _ = make(NgSgdConfig(rank_in=2))
    with pytest.raises(CheckpointError, match=r"first/in.*\(3, 6\).*\(2, 6\)"):
        other.load_state(learner.state())


def test_evaluating_and_predicting_teach_nothing():
    learner, maps = make(NgSgdConfig())
    learner.gradient()
    before = maps[0].sides["in"][0].fisher
    learner.evaluate([Batches(9).next()])
    assert maps[0].sides["in"][0].fisher is before


def test_which_layers_are_preconditioned():
    net = Net(embedding=True)
    net.second.bias.requires_grad_(False)
    names = [layer.name for layer in precondition_(net, NgSgdConfig())]
    assert names == ["first", "softmax", "embedding"]
    lstm = nn.LSTM(3, 2, num_layers=2, bidirectional=True)
    names = [layer.name for layer in precondition_(lstm, NgSgdConfig(summed=True))]
    assert names == ["l0", "l0_reverse", "l1", "l1_reverse"]
    normed = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    with pytest.raises(ConfigError, match="summed: 1 is no"):
        precondition_(normed, NgSgdConfig(summed=True))
    for plain in (nn.GRU(2, 3), nn.LSTM(2, 3, proj_size=1), nn.Embedding(2, 3, 0)):
        with pytest.raises(ConfigError, match="no affine maps"):
            precondition_(plain, NgSgdConfig())


def test_ranks_are_at_most_half_the_dimension():
    _, maps = make(NgSgdConfig(rank_in=3, rank_out=80))
    ranks = [(ng.config.rank, D) for layer in maps for ng, D in layer.sides.values()]
    assert ranks == [(3, 6), (4, 8), (3, 9), (3, 5), (3, 6), (4, 7)]
    assert isinstance(maps[0].sides["in"][0], NaturalGradient)


def ill_conditioned(seed):
    """Return frames whose features differ in size by 3 decades, and a linear target."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -3, 12)
    x = torch.randn(256, 12, generator=generator) * sizes
    return x, x @ torch.diag(1 / sizes)[:, :3]


@pytest.mark.parametrize("lr", [0.3, 1.0])
def test_learns_faster_than_sgd_where_features_differ_in_size(lr):
    losses = {}
    for natural in (False, True):
        torch.manual_seed(4)
        layer = nn.Linear(12, 3)
        config = NgSgdConfig(lr=lr, max_change="none")
        if natural:
            maps = precondition_(layer, config)
            optimizer = NgSgd(list(layer.parameters()), maps=maps, config=config)
        else:
            optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
        for step in range(60):
            x, y = ill_conditioned(step)
            loss = (layer(x) - y).square().sum(1).mean()
            optimizer.zero_grad()
            (0.1 * loss).backward()
            optimizer.step()
        losses[natural] = loss.item()
    assert losses[True] < 0.7 * losses[False]
