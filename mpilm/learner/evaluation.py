"""Evaluation in the middle of training, which goes on as if nothing had been."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpilm.learner.rest import ModuleRest


class Sums(NamedTuple):
    """What a model made of some minibatches.

    nll          negative log-likelihood of the targets, nats
    num_targets  how many there were
    errors       targets that were not the likeliest class; NaN: not measured
    """

    nll: float
    num_targets: int
    errors: float


def sum_up(
    found: Iterable[tuple[Tensor, Any, int]], most: int | None, device: torch.device
) -> Sums:
    """Return the sums over minibatches, waiting for the device once.

    Args:
        found: of each its nll, 0-d float64, its errors or None, its samples.
        most: stop after the minibatch with which there were so many samples.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    errors: Any = None
    count = 0
    for nll, wrong, num_samples in found:
        total += nll
        count += num_samples
        if wrong is not None:
            errors = wrong + (0 if errors is None else errors)
        if most is not None and count >= most:
            break
    return Sums(total.item(), count, math.nan if errors is None else float(errors))


@contextmanager
def evaluating(model: nn.Module, rest: ModuleRest) -> Iterator[None]:
    """Put the model into evaluation; afterwards modes, buffers, carried state back.

    Within the block nothing is carried over from the minibatches before it.
    """
    modes = [(module, module.training) for module in model.modules()]
    carried, buffers = carried_by(model), rest.copy(frozen=False)
    model.eval()
    carry(model, ())
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        carry(model, carried)
        rest.put_back(buffers)


def carried_by(model: nn.Module) -> tuple[Tensor, ...]:
    """Return what a model carries from minibatch to minibatch, if it does."""
    carried: Any = getattr(model, "carried", None)
    return tuple(carried()) if carried else ()


def carry(model: nn.Module, parts: tuple[Tensor, ...]) -> None:
    """Let a model carry these parts on; none: let it begin anew."""
    load: Any = getattr(model, "load_carried", None)
    if load:
        load(parts)
