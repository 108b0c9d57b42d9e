"""Section [model] of the configuration, one dataclass per model. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0.0, lt=1.0)]
ShareOrSame = Annotated[float, Meta(ge=-1.0, lt=1.0)]
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
    input_dropout: ShareOrSame = -1.0
    """after the embedding; -1: as dropout"""
    output_dropout: ShareOrSame = -1.0
    """after the last layer; -1: as dropout"""
    locked: bool = False
    """whether the same units are dropped in all time steps (variational dropout)"""
    embed_dropout: Share = 0.0
    """share of words whose embedding is dropped in a minibatch, wherever they stand"""
    weight_dropout: Share = 0.0
    """share of recurrent weights dropped in a minibatch (AWD-LSTM)"""
    layer_norm: bool = False
    """whether the outputs of every layer are normalised"""
    projected: Natural = 0
    """LSTMP: size that every layer's output is projected to, below hidden; 0: none"""
    compute: Literal["float32", "bfloat16", "auto"] = "float32"
    """LSTM while training; auto: bfloat16 where it pays (docs/language_models.md)"""
    tied: bool = False
    """whether the softmax uses the embedding matrix as its weights"""
    sparse: bool = False
    """whether gradients of embedding and sampled softmax are rows, not all of them"""
    softmax: Literal["full", "sampled", "adaptive"] = "full"
    """sampled: trained on a sample of the words; adaptive: rare words in clusters"""
    sampled_frequent: Natural = 1000
    """sampled: the most frequent words, in every sample"""
    sampled_random: Natural = 1000
    """sampled: words drawn for each minibatch, beside its targets and the frequent"""
    sampled_recent: Natural = 0
    """sampled: targets of the last minibatches, whose words are in every sample"""
    adaptive_cutoffs: tuple[Positive, ...] = (2000, 10000)
    """adaptive: ids where a cluster of rarer words begins; ascending, below V"""
    adaptive_div: Annotated[float, Meta(ge=1.0)] = 4.0
    """adaptive: how many times smaller the inner size of the next cluster is"""

    def __post_init__(self) -> None:
        for key in ("input_dropout", "output_dropout"):
            if -1.0 < getattr(self, key) < 0.0:
                raise ValueError(
                    f"{key}: {getattr(self, key)} is neither a share nor -1"
                )
        if self.projected >= self.hidden:
            raise ValueError(
                f"projected: {self.projected} is not below hidden = {self.hidden}"
            )
        cutoffs = self.adaptive_cutoffs
        if not cutoffs or any(b <= a for a, b in pairwise(cutoffs)):
            raise ValueError(
                f"adaptive_cutoffs: {list(cutoffs)}: at least one, each above the last"
            )

    def own_dropout(self, share: float) -> float:
        """Return the share of input_dropout or output_dropout that is meant."""
        return self.dropout if share < 0.0 else share


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


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Section [pretrain]: RBMs, the first weights of a `dnn` (`mpilm pretrain`)."""

    batch: Positive = 100
    """frames in a minibatch of one rank"""
    gaussian_epochs: Positive = 2
    """passes over the data for the lowest RBM, whose input are features"""
    gaussian_lr: Annotated[float, Meta(gt=0.0)] = 0.01
    """its learning rate, times 1 - momentum"""
    bernoulli_epochs: Positive = 1
    """passes over the data for each of the others"""
    bernoulli_lr: Annotated[float, Meta(gt=0.0)] = 0.4
    """their learning rate, times 1 - momentum"""
    first_momentum: Share = 0.5
    """momentum at the start of an RBM"""
    momentum: Share = 0.9
    """momentum that it rises to"""
    momentum_samples: Natural = 20_000_000
    """samples of all ranks over which it rises"""
    penalty: Annotated[float, Meta(ge=0.0)] = 2e-4
    """L2 penalty of the weights"""
    stddev: Annotated[float, Meta(gt=0.0)] = 0.1
    """standard deviation of the first weights"""


@dataclass(frozen=True, kw_only=True)
class OwnModelConfig:
    """Section [model] of `own`: one that `mpilm.fit` was given."""

    reads: ClassVar[str] = "own"
    kind: str = ""
    """class of the module"""
    parameters: Natural = 0
    """how many are trained"""


MODELS: dict[str, type] = {
    "lstm_lm": LstmLmConfig,
    "dnn": DnnConfig,
    "lstm_am": LstmAmConfig,
    "blstm_am": BlstmAmConfig,
}
