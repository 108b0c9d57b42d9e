"""Sections [optim] and [schedule], one dataclass per name. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

Samples = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0.0)]
MaxChange = Literal["none", "nnet2", "su_chen", "nnet3"]


@dataclass(frozen=True, kw_only=True)
class SgdConfig:
    """Section [optim] of `sgd`."""

    lr: Annotated[float, Meta(gt=0.0)] = 1.0
    """learning rate before the schedule"""
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    """share of the last step kept in the next; 0: plain SGD"""
    nesterov: bool = False
    """whether momentum looks ahead; needs momentum > 0"""
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.0
    """L2 penalty: this times theta is added to the gradient"""
    clip: Annotated[float, Meta(ge=0.0)] = 0.25
    """largest norm of the whole gradient; 0: no clipping"""

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov: needs momentum > 0")


@dataclass(frozen=True, kw_only=True)
class AdamwConfig:
    """Section [optim] of `adamw`."""

    lr: Annotated[float, Meta(gt=0.0)] = 1e-3
    """learning rate before the schedule"""
    beta1: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    """decay of the mean gradient per minibatch"""
    beta2: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.999
    """decay of the mean squared gradient per minibatch"""
    eps: Annotated[float, Meta(gt=0.0)] = 1e-8
    """added to the root of the mean squared gradient"""
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.01
    """decoupled decay: theta shrinks by lr times this in every step"""
    clip: Annotated[float, Meta(ge=0.0)] = 1.0
    """largest norm of the whole gradient; 0: no clipping"""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Section [optim] of `muon`: Muon between the layers, AdamW for all else."""

    lr: Annotated[float, Meta(gt=0.0)] = 1e-3
    """learning rate before the schedule, of both"""
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.95
    """decay of the mean gradient of a matrix per minibatch"""
    beta1: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    """of AdamW: decay of the mean gradient per minibatch"""
    beta2: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.999
    """of AdamW: decay of the mean squared gradient per minibatch"""
    eps: Annotated[float, Meta(gt=0.0)] = 1e-8
    """of AdamW: added to the root of the mean squared gradient"""
    weight_decay: Annotated[float, Meta(ge=0.0)] = 0.01
    """decoupled decay: theta shrinks by lr times this in every step"""
    clip: Annotated[float, Meta(ge=0.0)] = 1.0
    """largest norm of the whole gradient; 0: no clipping"""


@dataclass(frozen=True, kw_only=True)
class NgSgdConfig:
    """Section [optim] of `ng_sgd`; ranks and limits as in Kaldi's recipes."""

    lr: Positive = 0.1
    """learning rate before the schedule"""
    rank_in: Annotated[int, Meta(ge=1)] = 20
    """rank for the inputs; at most half their number (rounded up)"""
    rank_out: Annotated[int, Meta(ge=1)] = 80
    """rank for the output derivatives; at most half their number (rounded up)"""
    alpha: Annotated[float, Meta(ge=0.0)] = 4.0
    """smoothing: how much of the mean eigenvalue is added to all"""
    num_samples_history: Positive = 2000.0
    """rows after which an old minibatch counts 1/e"""
    update_period: Annotated[int, Meta(ge=1)] = 4
    """minibatches per update of the estimates"""
    summed: bool = False
    """whether the gradient is the sum over the minibatch, as in Kaldi, or the mean"""
    max_change: MaxChange = "nnet3"
    """which published limit of a step holds"""
    max_change_per_sample: Positive = 0.075
    """limit per row of nnet2 and su_chen"""
    max_change_map: Positive = 0.75
    """nnet3: largest norm of a step of one affine map"""
    max_change_all: Positive = 2.0
    """nnet3: largest norm of a step of the whole model"""


@dataclass(frozen=True, kw_only=True)
class ConstantConfig:
    """Section [schedule] of `constant`."""

    warmup_samples: Samples = 0
    """samples of all ranks over which the rate rises linearly from 0"""
    times_ranks: bool = False
    """whether the rate is multiplied by the number of ranks (linear scaling)"""


@dataclass(frozen=True, kw_only=True)
class ExponentialConfig:
    """Section [schedule] of `exponential`."""

    final_ratio: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.01
    """rate at the end of training over rate at the start"""
    stages: Annotated[int, Meta(ge=0)] = 0
    """equal stretches of constant rate, such as epochs; 0: falls in every step"""
    warmup_samples: Samples = 0
    """samples of all ranks over which the rate rises linearly from 0"""
    times_ranks: bool = False
    """whether the rate is multiplied by the number of ranks (linear scaling)"""


@dataclass(frozen=True, kw_only=True)
class NewbobConfig:
    """Section [schedule] of `newbob`."""

    start_halving: Annotated[float, Meta(ge=0.0)] = 0.01
    """relative gain of the validation loss below which halving begins"""
    stop_halving: Annotated[float, Meta(ge=0.0)] = 1e-4
    """relative gain below which training ends, once halving has begun"""
    factor: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.5
    """what the rate is multiplied by when it is halved"""
    reject: bool = False
    """whether training goes back to the best model when a validation is no better"""
    warmup_samples: Samples = 0
    """samples of all ranks over which the rate rises linearly from 0"""
    times_ranks: bool = False
    """whether the rate is multiplied by the number of ranks (linear scaling)"""


@dataclass(frozen=True, kw_only=True)
class NewbobAccuracyConfig:
    """Section [schedule] of `newbob_accuracy`: of models that classify frames."""

    start_halving: Annotated[float, Meta(ge=0.0)] = 0.005
    """gain of the validation frame accuracy (a share) below which halving begins"""
    stop_halving: Annotated[float, Meta(ge=0.0)] = 0.001
    """gain below which training ends, once halving has begun"""
    factor: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.5
    """what the rate is multiplied by when it is halved"""
    reject: bool = False
    """whether training goes back to the best model when a validation is no better"""
    warmup_samples: Samples = 0
    """samples of all ranks over which the rate rises linearly from 0"""
    times_ranks: bool = False
    """whether the rate is multiplied by the number of ranks (linear scaling)"""


@dataclass(frozen=True, kw_only=True)
class OwnOptimConfig:
    """Section [optim] of `own`: one that `mpilm.fit` was given."""

    kind: str = ""
    """class of the optimiser"""
    lr: Annotated[float, Meta(ge=0.0)] = 0.0
    """learning rate of its first group"""
    clip: Annotated[float, Meta(ge=0.0)] = 0.0
    """largest norm of the whole gradient; 0: no clipping"""
    accumulate: Annotated[int, Meta(ge=1)] = 1
    """minibatches in a step"""
    autocast: Literal["", "bfloat16"] = ""
    """type in which torch computes what it can"""
    scheduler: str = ""
    """class of the torch scheduler that sets the rate, if there is one"""


OPTIMIZERS: dict[str, type] = {
    "sgd": SgdConfig,
    "adamw": AdamwConfig,
    "muon": MuonConfig,
    "ng_sgd": NgSgdConfig,
}
SCHEDULES: dict[str, type] = {
    "constant": ConstantConfig,
    "exponential": ExponentialConfig,
    "newbob": NewbobConfig,
    "newbob_accuracy": NewbobAccuracyConfig,
}
