"""Optimisers and clipping against their equations in float64."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from mpilm.optim.build import build_optimizer, clip_
from mpilm.optim.configs import OPTIMIZERS, AdamwConfig, SgdConfig


class Choice(NamedTuple):
    name: str
    settings: object


def trajectory(config, gradients, theta):
    """Return theta after each step of torch's optimiser on one flat parameter."""
    flat = torch.nn.Parameter(torch.tensor(theta, dtype=torch.float32))
    optimizer = build_optimizer(Choice("", config))([flat])
    found = []
    for gradient in gradients:
        flat.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        found.append(flat.detach().double().numpy().copy())
    return np.array(found)


def clipped(gradient, clip):
    norm = np.sqrt((gradient**2).sum())
    return gradient * min(1.0, clip / norm) if clip else gradient


def sgd(config, gradients, theta):
    v = np.zeros_like(theta)
    for gradient in gradients:
        g = clipped(gradient, config.clip) + config.weight_decay * theta
        v = config.momentum * v + g
        step = g + config.momentum * v if config.nesterov else v
        theta = theta - config.lr * step
        yield theta


def adamw(config, gradients, theta):
    m, s = np.zeros_like(theta), np.zeros_like(theta)
    for n, gradient in enumerate(gradients, start=1):
        g = clipped(gradient, config.clip)
        m = config.beta1 * m + (1 - config.beta1) * g
        s = config.beta2 * s + (1 - config.beta2) * g**2
        m_hat, s_hat = m / (1 - config.beta1**n), s / (1 - config.beta2**n)
        theta = theta * (1 - config.lr * config.weight_decay)
        theta = theta - config.lr * m_hat / (np.sqrt(s_hat) + config.eps)
        yield theta


@pytest.mark.parametrize(
    ("config", "equations"),
    [
        (SgdConfig(lr=0.5, clip=0.0), sgd),
        (SgdConfig(lr=0.5, clip=1.0), sgd),
        (SgdConfig(lr=0.1, momentum=0.9, weight_decay=0.01, clip=2.0), sgd),
        (SgdConfig(lr=0.1, momentum=0.9, nesterov=True, clip=0.0), sgd),
        (AdamwConfig(lr=0.01, clip=0.0), adamw),
        (AdamwConfig(lr=0.01, beta1=0.5, weight_decay=0.2, clip=1.0), adamw),
    ],
)
def test_trajectory_follows_the_equations(config, equations):
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 50)) * np.array([0.01, 1, 1, 1, 1, 1])[:, None]
    theta = rng.normal(size=50)
    got = trajectory(config, gradients, theta)
    expected = np.array(list(equations(config, gradients, theta)))
    assert got == pytest.approx(expected, abs=2e-6)


def test_clipping_is_by_the_joint_norm_and_leaves_small_gradients_alone():
    parts = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0], [4.0]])]
    assert clip_(parts, 10.0).item() == 5.0
    assert parts[0].tolist() == [3.0, 0.0]
    clip_(parts, 2.5)
    assert parts[0].tolist() == [1.5, 0.0]
    assert parts[1].tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sgd", {"lr": 0.0}),
        ("sgd", {"momentum": 1.0}),
        ("sgd", {"nesterov": True}),
        ("sgd", {"clip": -1.0}),
        ("adamw", {"beta2": 1.0}),
        ("adamw", {"eps": 0.0}),
    ],
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(settings, OPTIMIZERS[name])


def test_configs_and_schedules_import_no_torch():
    code = (
        "import sys, mpilm.models.configs, mpilm.optim.configs, mpilm.optim.schedules;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
