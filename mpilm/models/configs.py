"""Section [model] of the configuration, one dataclass per model. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta


@dataclass(frozen=True, kw_only=True)
class LstmLmConfig:
    """Section [model] of `lstm_lm`."""

    embed: Annotated[int, Meta(ge=1)] = 128
    """size of a token's embedding"""
    hidden: Annotated[int, Meta(ge=1)] = 128
    """LSTM cells in each layer"""
    layers: Annotated[int, Meta(ge=1)] = 1
    """LSTM layers"""
    dropout: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """share of units dropped after the embedding and after every layer"""
    tied: bool = False
    """whether the softmax uses the embedding matrix as its weights"""


MODELS: dict[str, type] = {"lstm_lm": LstmLmConfig}
