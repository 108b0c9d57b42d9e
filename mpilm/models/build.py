"""The model of section [model]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mpilm.convert import Choice
from mpilm.errors import ConfigError
from mpilm.models.acoustic import Dnn, LstmAm
from mpilm.models.adaptive_softmax import AdaptiveSoftmax
from mpilm.models.configs import BlstmAmConfig, DnnConfig, LstmAmConfig, LstmLmConfig
from mpilm.models.lstm_lm import LstmLm
from mpilm.models.sampled_softmax import SampledSoftmax
from mpilm.models.softmax import Softmax
from mpilm.models.weights import load_weights_


def build_model(
    choice: Choice, num_inputs: int, num_outputs: int, *, seed: int
) -> torch.nn.Module:
    """Return a model, the same for the same seed.

    Args:
        num_inputs: words of the vocabulary, or numbers in a (spliced) frame.
        num_outputs: classes of the softmax.

    The global random state is as before afterwards.

    Raises:
        DataError: the file of first weights cannot be read, or is of another model.
        ConfigError: settings of the softmax that do not go with so many words.
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
                softmax=softmax_of(config, num_outputs),
                sparse=config.sparse,
                input_dropout=config.own_dropout(config.input_dropout),
                output_dropout=config.own_dropout(config.output_dropout),
                embed_dropout=config.embed_dropout,
                locked=config.locked,
                weight_dropout=config.weight_dropout,
                layer_norm=config.layer_norm,
                projected=config.projected,
                compute=config.compute,
            )
        if isinstance(config, DnnConfig):
            dnn = Dnn(
                num_inputs,
                num_outputs,
                hidden=config.hidden,
                layers=config.layers,
                activation=config.activation,
            )
            if config.init:
                load_weights_(dnn, Path(config.init))
            return dnn
        if isinstance(config, LstmAmConfig | BlstmAmConfig):
            return LstmAm(
                num_inputs,
                num_outputs,
                hidden=config.hidden,
                layers=config.layers,
                bottleneck=config.bottleneck,
                dropout=config.dropout,
                bidirectional=isinstance(config, BlstmAmConfig),
            )
    raise TypeError(f"no model for {type(config).__name__}")


def softmax_of(
    config: LstmLmConfig, num_words: int
) -> Callable[[int, int], Softmax | AdaptiveSoftmax]:
    """Return what makes the softmax of a language model.

    Raises:
        ConfigError: a cutoff or a number of words that the vocabulary does not have.
    """
    if config.softmax == "adaptive":
        if config.adaptive_cutoffs[-1] >= num_words:
            raise ConfigError(
                f"model.adaptive_cutoffs: {config.adaptive_cutoffs[-1]} is not below"
                f" the {num_words} words of the vocabulary"
            )
        return partial(
            AdaptiveSoftmax, cutoffs=config.adaptive_cutoffs, div=config.adaptive_div
        )
    if config.softmax == "sampled":
        for key in ("sampled_frequent", "sampled_random"):
            if getattr(config, key) > num_words:
                raise ConfigError(
                    f"model.{key} = {getattr(config, key)}: the vocabulary has"
                    f" {num_words} words"
                )
        return partial(
            SampledSoftmax,
            num_frequent=config.sampled_frequent,
            num_random=config.sampled_random,
            num_recent=config.sampled_recent,
            sparse=config.sparse,
        )
    return Softmax


def require_sample(choice: Choice, num_words: int, num_targets: int) -> None:
    """Raise if a sampled softmax has fewer words than a minibatch may have targets.

    Its targets would be the only other words of most rows; what is rare would never be
    learned to be so.

    Raises:
        ConfigError: one line with the numbers.
    """
    config: Any = choice.settings
    if getattr(config, "softmax", "") != "sampled":
        return
    sample = config.sampled_frequent + config.sampled_random
    if sample < min(num_targets, num_words):
        raise ConfigError(
            f"model.sampled_frequent + model.sampled_random = {sample} words, and"
            f" {num_targets} targets in a minibatch (train.batch x train.unroll): take"
            f" {min(num_targets, num_words)} words or more"
        )
