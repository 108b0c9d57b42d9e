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


def build_model(choice: Choice, num_words: int, *, seed: int) -> torch.nn.Module:
    """Return the model for a vocabulary of `num_words`, the same for the same seed.

    The global random state is as before afterwards.
    """
    config = choice.settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, LstmLmConfig):
            return LstmLm(
                num_words,
                embed=config.embed,
                hidden=config.hidden,
                layers=config.layers,
                dropout=config.dropout,
                tied=config.tied,
            )
    raise TypeError(f"no model for {type(config).__name__}")
