"""Learners, models and data that the tests of the learner share."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mpilm.data.batch import Batch
from mpilm.data.streams import Streams
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm

VOCAB = 19
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 2000).astype(np.uint16)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


def make_model(**settings):
    torch.manual_seed(1)
    return LstmLm(VOCAB, **{"embed": 6, "hidden": 8, "layers": 2, **settings})


def make_learner(model=None, optimizer=sgd, **settings):
    return Learner(model or make_model(), Streams(TOKENS, 4, 5), optimizer, **settings)


def train(learner, num_steps):
    losses = []
    for _ in range(num_steps):
        losses.append(learner.gradient())
        learner.update()
    return losses


class Partly(nn.Module):
    """A model whose loss leaves one parameter out, with a buffer and a frozen part."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(2, 1)
        self.unused = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def loss(self, batch):
        return self.used(self.norm(self.frozen(batch.inputs))).square().mean()


class Points:
    num_dropped = 0

    def __init__(self):
        self.index = 0

    def next(self):
        self.index += 1
        x = np.random.default_rng(self.index).normal(size=(8, 2)).astype(np.float32)
        return Batch(x, np.zeros((8, 1), np.int64), 8, False)

    def state(self):
        return {"index": self.index}

    def load_state(self, state):
        self.index = state["index"]
