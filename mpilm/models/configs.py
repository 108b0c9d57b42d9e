"""Section [model] of the configuration, one dataclass per model. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
Context = Annotated[int, Meta(ge=-1)]


@dataclass(frozen=True, kw_only=True)
class LstmLmConfig:
    """Section [model] of `lstm_lm`."""

    reads: ClassVar[str] = "text"
    embed: Positive = 128
    """size of a token's embedding"""
    hidden: Positive = 128
    """LSTM cells in each layer"""
    layers: Positive = 1
    """LSTM layers"""
    dropout: Share = 0.0
    """share of units dropped after the embedding and after every layer"""
    tied: bool = False
    """whether the softmax uses the embedding matrix as its weights"""


@dataclass(frozen=True, kw_only=True)
class DnnConfig:
    """Section [model] of `dnn`."""

    reads: ClassVar[str] = "frames"
    recurrent: ClassVar[bool] = False
    hidden: Positive = 512
    """units in each hidden layer"""
    layers: Positive = 4
    """hidden layers"""
    activation: Literal["sigmoid", "relu"] = "sigmoid"
    """of the hidden layers"""
    context: Context = -1
    """frames spliced on either side; -1: what the corpus was prepared with"""
    init: str = ""
    """HDF5 file of first weights, made by `mpilm pretrain`"""


@dataclass(frozen=True, kw_only=True)
class LstmAmConfig:
    """Section [model] of `lstm_am`."""

    reads: ClassVar[str] = "frames"
    recurrent: ClassVar[bool] = True
    hidden: Positive = 512
    """LSTM cells in each layer"""
    layers: Positive = 2
    """LSTM layers"""
    bottleneck: Natural = 0
    """units of the linear layer before the softmax; 0: none"""
    dropout: Share = 0.0
    """share of units dropped after every layer"""
    context: Context = -1
    """frames spliced on either side; -1: what the corpus was prepared with"""
    whole: bool = True
    """whether whole utterances are evaluated; false: cut as train.unroll says"""


@dataclass(frozen=True, kw_only=True)
class BlstmAmConfig:
    """Section [model] of `blstm_am`."""

    reads: ClassVar[str] = "frames"
    recurrent: ClassVar[bool] = True
    hidden: Annotated[int, Meta(ge=2, multiple_of=2)] = 1024
    """LSTM cells in each layer, half of them in each direction"""
    layers: Positive = 6
    """LSTM layers"""
    bottleneck: Natural = 256
    """units of the linear layer before the softmax; 0: none"""
    dropout: Share = 0.0
    """share of units dropped after every layer"""
    context: Context = -1
    """frames spliced on either side; -1: what the corpus was prepared with"""
    whole: bool = True
    """whether whole utterances are evaluated; false: cut as train.unroll says"""


MODELS: dict[str, type] = {
    "lstm_lm": LstmLmConfig,
    "dnn": DnnConfig,
    "lstm_am": LstmAmConfig,
    "blstm_am": BlstmAmConfig,
}
