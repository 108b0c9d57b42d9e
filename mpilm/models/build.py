"""The model of section [model]."""

from __future__ import annotations

from pathlib import Path

import torch

from mpilm.convert import Choice
from mpilm.models.acoustic import Dnn, LstmAm
from mpilm.models.configs import BlstmAmConfig, DnnConfig, LstmAmConfig, LstmLmConfig
from mpilm.models.lstm_lm import LstmLm
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
