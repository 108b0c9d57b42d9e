"""Muon beside AdamW: torch's two optimisers, each on its own parameters, to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpilm.config import read_config, resolve
from mpilm.convert import Choice
from mpilm.errors import ConfigError
from mpilm.learner.learner import Learner
from mpilm.models.build import build_model
from mpilm.optim.build import build_optimizer
from mpilm.optim.configs import MuonConfig
from mpilm.optim.muon import MuonAdamw, inner_matrices
from mpilm.train.run import require_gradient

CONFIG = MuonConfig(lr=0.02, weight_decay=0.1, clip=0.0)
FOLDER = Path(__file__).parents[2] / "jobs" / "configs"


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Linear(7, 4))


def gradients_of(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_it_is_muon_for_the_inner_matrices_and_adamw_for_the_rest() -> None:
    model, other = small_model(), small_model()
    parameters = list(model.parameters())
    both = MuonAdamw(parameters, matrices=inner_matrices(model), config=CONFIG)
    matrices = [other[0].weight, other[2].weight]
    rest = [other[0].bias, other[2].bias, *other[3].parameters()]
    muon = torch.optim.Muon(
        matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(rest, lr=0.02, weight_decay=0.1, fused=True)
    for step in range(5):
        if step == 3:
            for optimizer in (both, muon, adamw):
                for group in optimizer.param_groups:
                    group["lr"] = 0.005
        gradients_of(model, step)
        gradients_of(other, step)
        both.step()
        muon.step()
        adamw.step()
        for mine, theirs in zip(parameters, other.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_a_step_of_a_matrix_is_nearly_orthogonal() -> None:
    """(3) for a matrix (9, 6): singular values near 0.2 sqrt(9) lr."""
    model = small_model()
    before = model[0].weight.detach().clone()
    config = MuonConfig(lr=0.02, weight_decay=0.0)
    both = MuonAdamw(
        list(model.parameters()), matrices=inner_matrices(model), config=config
    )
    gradients_of(model, 0)
    both.step()
    moved = torch.linalg.svdvals(before - model[0].weight.detach()) / (0.02 * 0.6)
    assert moved.min() > 0.5
    assert moved.max() < 1.3
    gradient = torch.linalg.svdvals(model[0].weight.grad)
    assert gradient.max() / gradient.min() > 3.0  # which is far from orthogonal


@pytest.mark.parametrize("tied", [False, True])
def test_of_our_models_it_takes_what_lies_between(tied: bool) -> None:
    settings = {"name": "lstm_lm", "embed": 6, "hidden": 5, "layers": 2, "tied": tied}
    model = build_model(resolve({"model": settings}).model, 11, 11, seed=1)
    shapes = [tuple(parameter.shape) for parameter in inner_matrices(model)]
    inner = [(20, 6), (20, 5), (20, 5), (20, 5)]
    assert shapes == inner + ([(6, 5)] if tied else [])
    dnn = {"name": "dnn", "hidden": 5, "layers": 2}
    model = build_model(resolve({"model": dnn}).model, 7, 3, seed=1)
    assert [tuple(p.shape) for p in inner_matrices(model)] == [(5, 7), (5, 5)]


def test_a_wrapper_has_the_last_layer_of_what_it_wraps() -> None:
    wrapped = nn.Sequential(small_model())
    shapes = [tuple(parameter.shape) for parameter in inner_matrices(wrapped)]
    assert shapes == [(9, 6), (7, 9)]


@pytest.mark.parametrize(
    "model", [nn.Linear(3, 2), nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))]
)
def test_a_model_without_inner_matrices_is_refused(model: nn.Module) -> None:
    with pytest.raises(ConfigError, match="muon is for matrices between"):
        build_optimizer(Choice("muon", MuonConfig()), model)


def test_rows_are_refused() -> None:
    model = {"name": "lstm_lm", "sparse": True, "softmax": "sampled"}
    config = resolve({"model": model, "optim": {"name": "muon"}})
    with pytest.raises(ConfigError, match="takes whole matrices"):
        require_gradient(config)


class Points:
    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        x_ND = self.random.normal(size=(8, 6)).astype(np.float32)
        return torch.tensor(x_ND), torch.tensor(self.random.integers(0, 4, 8))


def learner() -> Learner:
    model = small_model()
    return Learner(
        model,
        Points(),
        build_optimizer(Choice("muon", MuonConfig(lr=0.02)), model),
        loss=lambda model, batch: nn.functional.cross_entropy(
            model(batch[0]), batch[1]
        ),
    )


def train(one: Learner, steps: int) -> None:
    for _ in range(steps):
        one.gradient()
        one.update()


def test_a_learner_keeps_shapes_schedules_both_and_goes_on_to_the_bit() -> None:
    one, other = learner(), learner()
    train(one, 4)
    moments = one.moments()
    names = {"momentum_buffer/0.weight", "momentum_buffer/2.weight"}
    assert {name for name in moments if "buffer" in name} == names
    assert sum(len(moments[name]) for name in names) == 9 * 6 + 7 * 9
    train(other, 4)
    fresh = learner()
    fresh.load_state(other.state())
    fresh.batches = other.batches
    train(fresh, 3)
    train(one, 3)
    assert torch.equal(fresh.theta, one.theta)
    one.lr = 0.0
    before = one.theta.clone()
    train(one, 1)
    assert torch.equal(one.theta, before)  # no rate is left out


def test_after_a_reset_it_begins_anew() -> None:
    one, other = learner(), learner()
    train(one, 4)
    one.reset_moments()
    other.theta[:] = one.theta
    one.batches = Points()
    train(one, 3)
    train(other, 3)
    assert torch.equal(one.theta, other.theta)


def test_the_preset_differs_from_diloco_in_the_optimiser_alone() -> None:
    muloco = read_config(FOLDER / "muloco.toml")
    diloco = read_config(FOLDER / "diloco.toml")
    assert (muloco.optim.name, diloco.optim.name) == ("muon", "adamw")
    for section in ("model", "schedule", "strategy", "train"):
        assert getattr(muloco, section) == getattr(diloco, section)
