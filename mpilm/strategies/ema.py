"""Exponential moving average (EMA) of the synchronised models: an observer.

Source      X. Tian et al., "Exponential Moving Average Model in Parallel Speech
            Recognition Training", arXiv 1703.01024, 2017.
Notation    W(t)  the t-th synchronised model (of BMUF the filtered one, never the
                  look-ahead), (P,)
            E(t)  -> model, its moving average, (P,) float32
            a     decay; window: 1/(1-a) synchronisations, or samples
            n(t)  -> weight: a <- weights of all models so far sum to n(t)
Update      a    = exp(-s / window), s: samples since the last synchronisation  (1)
                 = 1 - 1 / window, where the window counts synchronisations     (2)
            n(t) = a n(t-1) + (1 - a),  n(0) = 0                                (3)
            E(t) = E(t-1) + ((1 - a) / n(t)) (W(t) - E(t-1))                    (4)
Messages    none while training; the average enters no learner's model. To evaluate or
            save it: the mean over ranks, one Allreduce of 4P bytes (all ranks of a
            synchronous strategy hold the same).
Invariants  training with it and without is the same to the bit.
            E(t) = (1-a) sum_i a^(t-i) W(i) / (1 - a^t) for a constant a: corrected for
            bias, so E(1) = W(1), and equal models stay as they are.
Departs     the paper does not say how it starts: (3) and (4) need no first value.
            Parts that are synchronised by themselves are averaged by themselves.
Cost        one extra copy of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from mpilm.errors import ConfigError
from mpilm.strategies.base import Learner, Strategy
from mpilm.strategies.rest import merge_rest
from mpilm.vectors import copy_of, fill_, to_array

CHUNK = 1 << 18  # elements of a temporary: 1 MB, stays in the cache; chosen, not tuned


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Section [ema]. Both windows 0: no moving average."""

    samples: Annotated[int, Meta(ge=0)] = 0
    """averaging window in samples of all ranks"""
    syncs: Annotated[int, Meta(ge=0)] = 0
    """averaging window in synchronisations"""

    def __post_init__(self) -> None:
        if self.samples and self.syncs:
            raise ValueError("samples and syncs: the window is one or the other")

    @property
    def on(self) -> bool:
        """Whether there is a moving average."""
        return bool(self.samples or self.syncs)

    def decay(self, samples: int) -> float:
        """Return a, (1) or (2); `samples`: since the last synchronisation.

        >>> EmaConfig(syncs=10).decay(0)
        0.9
        """
        if self.samples:
            return math.exp(-samples / self.samples)
        return 1.0 - 1.0 / self.syncs


def average_(average: Any, model: Any, weight: float, decay: float) -> float:
    """Apply (3) and (4) in place to E(t-1); return n(t).

    >>> import numpy as np
    >>> average = np.zeros(1)
    >>> average_(average, np.ones(1), 0.0, decay=0.75), float(average[0])
    (0.25, 1.0)
    """
    weight = decay * weight + (1.0 - decay)  # (3)
    if weight == 1.0 - decay:  # the first one, which (4) would round
        average[:] = model
        return weight
    for first in range(0, len(average), CHUNK):
        chunk = slice(first, first + CHUNK)
        difference = model[chunk] - average[chunk]
        difference *= (1.0 - decay) / weight
        average[chunk] += difference  # (4)
    return weight


class Ema:
    """The moving average of a strategy's synchronised models.

    It makes itself the strategy's observer.

    Args:
        config: the window.
        strategy: must synchronise.
        learner: whose model the strategy synchronises.
        done: from samples of this rank to those of all, `Batches.done`; if not given,
            all ranks are as far as this one.

    model  E(t), (P,); before the first synchronisation the model as it was
    parts  (start, stop) -> n(t), samples at its last synchronisation

    Raises:
        ConfigError: the strategy never synchronises.

    Communicates: none.
    """

    def __init__(
        self,
        config: EmaConfig,
        strategy: Strategy,
        learner: Learner,
        done: Callable[[int], int] | None = None,
    ) -> None:
        if not strategy.synchronises:
            raise ConfigError(
                f"ema: {strategy.name} has no synchronised model to average:"
                " set ema.samples = 0 and ema.syncs = 0, or take a strategy that"
                " synchronises (model_averaging, bmuf)"
            )
        self.config, self.strategy, self.learner = config, strategy, learner
        self.done = done or (lambda own: own * strategy.world.size)
        self.began = self.done(learner.samples)
        self.model = copy_of(learner.theta)
        self.parts: dict[tuple[int, int], tuple[float, int]] = {}
        strategy.on_synchronised = self.observe

    def observe(self, where: slice, model: Any) -> None:
        """Take up a synchronised part of the model, which is only read."""
        now = self.done(self.learner.samples)
        part = (where.start, where.stop)
        weight, before = self.parts.get(part, (0.0, self.began))
        decay = self.config.decay(now - before)
        if decay < 1.0:  # else no sample was processed since
            weight = average_(self.model[where], model, weight, decay)
        self.parts[part] = (weight, now)

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the mean over ranks of E(t) into `out`, (P,).

        What lies outside theta is the mean over ranks as it is (rest.py).

        Communicates: collective, one Allreduce of 4P bytes, blocking.
        """
        out[:] = self.model
        self.strategy.mean_(out)
        merge_rest(self.strategy.comm, learner, out)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: name -> value."""
        state: dict[str, Any] = {"model": to_array(self.model), "began": self.began}
        for (start, stop), (weight, samples) in self.parts.items():
            state[f"weight/{start}-{stop}"] = weight
            state[f"samples/{start}-{stop}"] = samples
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned; empty: the average begins now."""
        if not state:
            fill_(self.model, to_array(self.learner.theta))
            self.began, self.parts = self.done(self.learner.samples), {}
            return
        fill_(self.model, state["model"])
        self.began = int(state["began"])
        self.parts = {}
        for name, weight in state.items():
            kind, _, place = name.partition("/")
            if kind == "weight":
                start, stop = map(int, place.split("-"))
                samples = int(state[f"samples/{place}"])
                self.parts[start, stop] = (float(weight), samples)
