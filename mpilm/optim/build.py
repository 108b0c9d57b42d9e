"""The optimiser of section [optim], as torch.optim does it.

Notation    g -> grad, the gradient, (P,)        theta -> theta, the model, (P,)
            c -> clip    mu -> momentum    lambda -> weight_decay    n -> step
Update      g <- g * min(1, c / ||g||)                                         (1)
            sgd       g <- g + lambda theta;  v <- mu v + g                    (2)
                      theta <- theta - lr v, or - lr (g + mu v): nesterov      (3)
            adamw     m <- beta1 m + (1 - beta1) g
                      s <- beta2 s + (1 - beta2) g^2                           (4)
                      theta <- (1 - lr lambda) theta
                      theta <- theta - lr m_hat / (sqrt(s_hat) + eps)          (5)
                      m_hat = m / (1 - beta1^n), s_hat = s / (1 - beta2^n)
Source      clipping: R. Pascanu et al., ICML 2013; adamw: I. Loshchilov and F. Hutter,
            ICLR 2019.
            muon, ng_sgd    see muon.py, ng_sgd.py
Departs     torch's sgd multiplies the rate into (3), not into v: a change of the rate
            acts at once on all of v.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mpilm.optim.configs import AdamwConfig, MuonConfig, NgSgdConfig, SgdConfig
from mpilm.optim.muon import MuonAdamw, adamw, inner_matrices
from mpilm.optim.ng_sgd import NgSgd, precondition_
from mpilm.optim.schedules import Choice

MakeOptimizer = Callable[[list[torch.nn.Parameter]], Optimizer]


def build_optimizer(
    choice: Choice, model: torch.nn.Module | None = None
) -> MakeOptimizer:
    """Return a function from parameters to the optimiser of section [optim].

    Args:
        choice: the section.
        model: what is trained. For `muon`, which looks for its matrices there, and
            for `ng_sgd`, whose layers then give preconditioned gradients; the others
            do not look at it.
    """
    config: Any = choice.settings
    if isinstance(config, NgSgdConfig):
        if model is None:
            raise TypeError("ng_sgd needs the model")
        return partial(NgSgd, maps=precondition_(model, config), config=config)
    if isinstance(config, MuonConfig):
        if model is None:
            raise TypeError("muon needs the model")
        matrices = inner_matrices(model)

    def make(parameters: list[torch.nn.Parameter]) -> Optimizer:
        if isinstance(config, SgdConfig):
            optimizer: Optimizer = torch.optim.SGD(
                parameters,
                lr=config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=config.weight_decay,
                fused=True,
            )
        elif isinstance(config, AdamwConfig):
            optimizer = adamw(parameters, config)
        elif isinstance(config, MuonConfig):
            optimizer = MuonAdamw(parameters, matrices=matrices, config=config)
        else:
            raise TypeError(f"no optimiser for {type(config).__name__}")
        if config.clip > 0.0:
            optimizer.register_step_pre_hook(clip_before_step(config.clip))
        return optimizer

    return make


def clip_before_step(max_norm: float) -> Callable[..., None]:
    """Return a hook that clips the gradient of all of an optimiser's parameters (1).

    So it does to those of row tables, which a `Learner` updates itself.
    """

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        gradients += getattr(optimizer, "row_gradients", [])  # of a Learner
        clip_(gradients, max_norm)

    return hook


def clip_(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale `gradients` so that their joint norm is at most `max_norm` (1).

    A NaN or infinite norm makes them NaN or zero: the loss tells.

    Returns:
        the norm before, 0-d.

    >>> clip_([vector := torch.tensor([3.0, 4.0])], 1.0).item()
    5.0
    >>> [round(x, 3) for x in vector.tolist()]
    [0.6, 0.8]
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if norm.is_cuda:  # asking whether to clip would wait for the device
        torch._foreach_mul_(gradients, (max_norm / norm).clamp(max=1.0))
    elif norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm
