"""A torch module with all kinds of state outside theta, trained by any strategy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mpilm.learner.learner import Learner
from mpilm.strategies import strategy
from mpilm.world.base import World
from tests.strategies.cases import CASES

STEPS = 4
FLOATS = ("norm.running_mean", "wide", "narrow", "brain", "wave")


class Mixed(nn.Module):
    """Frozen parameters and buffers of many types, other ones for each seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(2)
        self.norm.running_mean += seed
        self.used = nn.Linear(2, 1)
        self.scale = nn.Parameter(torch.tensor(1.0 + seed))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_buffer("count", torch.tensor(10 * seed, dtype=torch.int32))
        self.register_buffer("mask", torch.rand(5) < 0.5)
        self.register_buffer("wide", torch.rand(3, dtype=torch.float64))
        self.register_buffer("narrow", torch.rand(2, 2).half())
        self.register_buffer("brain", torch.rand(3).bfloat16())
        self.register_buffer("wave", torch.rand(2, dtype=torch.complex64))
        self.register_buffer("table", torch.rand(2), persistent=False)
        self.register_buffer("later", None)

    def loss(self, batch: Any) -> torch.Tensor:
        x = self.norm(self.frozen(batch.x)) * self.scale
        self.count = self.count + 1  # another tensor, as many modules do it
        return self.used(x).square().mean()

    def everything(self) -> dict[str, torch.Tensor]:
        """Return a copy of all state, by name."""
        table = {"table": self.table}
        return {n: t.clone() for n, t in {**self.state_dict(), **table}.items()}


class Points:
    """Points of a rank's own."""

    def __init__(self, rank: int) -> None:
        self.random = torch.Generator().manual_seed(rank)

    def next(self) -> Any:
        x = torch.randn(6, 2, generator=self.random) + self.random.initial_seed()
        return SimpleNamespace(x=x, num_samples=len(x))


def make(world: World, seed: int | None = None) -> Learner:
    """Return a learner of a `Mixed` that is another on each rank."""
    return Learner(
        Mixed(world.rank + 1 if seed is None else seed),
        Points(world.rank),
        lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        compute=world.compute,
    )


def states(world: World, name: str) -> list[dict[str, torch.Tensor]]:
    """Return a rank's state before and after `start`, before and after the end.

    Args:
        name: a key of CASES.
    """
    learner = make(world)
    model: Any = learner.model
    found = [model.everything()]
    case = CASES[name]
    chosen = strategy(case.name, world, **case.of(world.size))
    chosen.start(learner)
    found.append(model.everything())
    for _ in range(STEPS):
        chosen.step(learner)
    chosen.retire(learner)
    chosen.finish(learner)
    found.append(model.everything())
    aside = torch.empty_like(learner.theta)
    chosen.final_model_(learner, aside)  # a look in the middle changes nothing
    now = model.everything()
    assert all(torch.equal(now[name], found[2][name]) for name in now)
    chosen.final_model_(learner, learner.theta)
    found.append(model.everything())
    return found


def faults(every: list[list[dict[str, torch.Tensor]]]) -> list[str]:
    """Return what is wrong with the `states` of all ranks; nothing if all is well."""
    found = []
    first, started, trained, final = (list(ranks) for ranks in zip(*every, strict=True))
    for name, value in final[0].items():
        is_float = name in (*FLOATS, "norm.running_var", "table")
        if not all(torch.equal(rank[name], first[0][name]) for rank in started):
            found.append(f"{name}: not rank 0's after start")
        if not all(torch.equal(rank[name], value) for rank in final):
            found.append(f"{name}: not the same in all final models")
        if is_float:
            precise = torch.complex128 if value.is_complex() else torch.float64
            mean = torch.stack([rank[name].to(precise) for rank in trained]).mean(0)
            if not torch.allclose(mean.to(value.dtype), value, rtol=1e-6, atol=0):
                found.append(f"{name}: not the mean")
        is_copied = name.startswith(("frozen", "count", "mask", "norm.num"))
        if is_copied and not torch.equal(trained[0][name], value):
            found.append(f"{name}: not rank 0's in the final model")
    return found
