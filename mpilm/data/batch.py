"""A minibatch, and what every source of minibatches offers."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Batch(NamedTuple):
    """One minibatch.

    inputs       (T, B) int64 token ids, or (T, B, F) float32 frames
    targets      (T, B) int64; -1 where there is nothing to predict (padding)
    num_samples  predicted tokens or frames: targets that are not -1
    start        the carried recurrent state must be zeroed before this batch
    """

    inputs: NDArray[Any]
    targets: NDArray[np.int64]
    num_samples: int
    start: bool


class Batches(Protocol):
    """An endless source of minibatches for one rank.

    num_dropped  targets that are never visited (the tail that fills no minibatch)
    """

    num_dropped: int

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""

    def start(self) -> None:
        """Begin background work, if there is any. Collective."""

    def close(self) -> None:
        """End background work, if there is any. Collective."""

    def next(self) -> Batch:
        """Return the next minibatch; after the last one the next epoch begins."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on from here."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken.

        Raises:
            DataError: it was taken from other data or another geometry.
        """
