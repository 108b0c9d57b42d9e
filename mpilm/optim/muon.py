"""Muon for the matrices between the layers, AdamW for all else, as one optimiser.

Source      K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024;
            the factor of (3) is that of J. Liu et al., arXiv 2502.16982, 2025.
            B. Therien et al., "MuLoCo: Muon is a practical inner optimizer for DiLoCo",
            arXiv 2505.23725, 2025: this inside a block of `bmuf`.
Notation    W -> a matrix (A, B)    G -> its gradient    M -> momentum_buffer
            mu -> momentum    lambda -> weight_decay
            NS -> five Newton-Schulz steps towards the nearest U V^T, in bfloat16
Update      M <- mu M + (1 - mu) G                                             (1)
            O <- NS(mu M + (1 - mu) G)                                         (2)
            W <- (1 - lr lambda) W - lr 0.2 sqrt(max(A, B)) O                  (3)
            all else: adamw, (4) and (5) of build.py, with the same lr and lambda
Departs     (1) to (3) are torch.optim.Muon's. The four gates of an LSTM are one matrix
            (4H, H), as nn.LSTM has them. Of MuLoCo the abstract was read: its
            momentum and rate outside are not known, the preset has DiLoCo's.

(3) makes an update of the size that AdamW's has (root mean square 0.2), so that one
learning rate does for both kinds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from mpilm.errors import ConfigError
from mpilm.optim.configs import AdamwConfig, MuonConfig


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that Muon takes: matrices, in the order of the model.

    Left out are the embeddings (with what is tied to them) and the layer that the model
    ends with: the last one that has parameters, in the order in which they were made.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.LSTM(4, 3), nn.Linear(3, 9))
    >>> [tuple(parameter.shape) for parameter in inner_matrices(model)]
    [(12, 4), (12, 3)]

    Raises:
        ConfigError: there are none.
    """
    outer = list(_last_layer(model).parameters())
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            outer += module.parameters()
    left_out = {id(parameter) for parameter in outer}
    found = [p for p in model.parameters() if p.ndim == 2 and id(p) not in left_out]
    if not found:
        raise ConfigError(
            "optim: muon is for matrices between the embedding and the last layer; this"
            " model has none: adamw trains it"
        )
    return found


def _last_layer(model: nn.Module) -> nn.Module:
    layers = [child for child in model.children() if any(True for _ in _own(child))]
    is_shell = len(layers) == 1 and not any(
        p.requires_grad for p in model.parameters(recurse=False)
    )
    if is_shell:  # a wrapper of the model
        return _last_layer(layers[0])
    return layers[-1] if layers else model


def _own(module: nn.Module) -> Any:
    return (p for p in module.parameters() if p.requires_grad)


def adamw(parameters: list[nn.Parameter], config: AdamwConfig | MuonConfig) -> AdamW:
    """Return torch's AdamW: (4) and (5) of build.py."""
    return AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


class MuonAdamw(Optimizer):
    """torch.optim.Muon for some parameters beside torch.optim.AdamW for the others.

        matrices = inner_matrices(model)
        Learner(model, batches, partial(MuonAdamw, matrices=matrices, config=config))

    Args:
        parameters: to train, the model's own: shapes matter.
        matrices: those of them for Muon.
        config: rates, momenta and decay; `clip` is not done here.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        *,
        matrices: list[nn.Parameter],
        config: MuonConfig,
    ) -> None:
        chosen = {id(parameter) for parameter in matrices}
        inner = [p for p in parameters if id(p) in chosen]
        others = [p for p in parameters if id(p) not in chosen]
        self._parts: list[Optimizer] = [
            Muon(
                inner,
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if others:
            self._parts.append(adamw(others, config))
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__(groups, {})
        self._share()

    def _share(self) -> None:
        """Give both parts this one's groups and state: they have none of their own."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step. There is no closure: it would compute gradients itself."""
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()
