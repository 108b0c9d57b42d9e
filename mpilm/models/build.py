"""The model of section [model]."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from mpilm.models.configs import LstmLmConfig
from mpilm.models.lstm_lm import LstmLm


class Choice(Protocol):
    """A model's name and its settings."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Any: ...


def build_model(
    choice: Choice, num_inputs: int, num_outputs: int, *, seed: int
) -> torch.nn.Module:
    """Return a model, the same for the same seed.

    Args:
        num_inputs: words of the vocabulary, or numbers in a frame.
        num_outputs: classes of the softmax.

    The global random state is as before afterwards.
    """
    config = choice.settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, LstmLmConfig):
            return LstmLm(
                num_outputs,
                embed=config.embed,
                hidden=config.hidden,
                layers=config.layers,
                dropout=config.dropout,
                tied=config.tied,
            )
    raise TypeError(f"no model for {type(config).__name__}")
