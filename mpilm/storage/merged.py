"""The states of K' ranks, merged for a world of K: a run goes on at another size.

Notation    x_j   an entry of rank j's state that is as long as the model, (P,) float32
Merged      mean of x_j over the ranks j that have such an entry                   (1)
            all else as one of them has it: rank r takes that of rank r mod K'     (2)
            The samples of all are counted on: T // K for each rank, T mod K more.
Messages    one Allreduce of 4P bytes for each entry in (1).
Cost        beside two states a copy of each entry in (1).

Each part of a trainer takes from it what it needs: `Learner.take_over`,
`Strategy.take_over`, `Batches.take_over`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpilm.storage.saved import State, under
from mpilm.world.base import IN_PLACE, Comm

MEAN_OF = ("strategy/", "learner/theta", "best/theta", "ema/model")  # (1)


@dataclass(frozen=True)
class Merged:
    """What ranks of another number have left, as one rank of this world needs it.

    size     how many they were, K'
    samples  of all of them
    final    their final model, (P,)
    means    (1): name -> (P,)
    nearest  (2): name -> value
    held     the states that only this rank has read, without (1): rank -> state
    places   of all of them in the data, by rank; of those that have died: empty
    """

    size: int
    samples: int
    final: Any
    means: State
    nearest: State
    held: dict[int, State]
    places: list[State]

    def under(self, prefix: str) -> Merged:
        """Return the same of a part."""
        return Merged(
            self.size,
            self.samples,
            self.final,
            under(prefix, self.means),
            under(prefix, self.nearest),
            {rank: under(prefix, state) for rank, state in self.held.items()},
            self.places,
        )

    @property
    def state(self) -> State:
        """One of the states, with the means in their places."""
        return {**self.nearest, **self.means}


@dataclass
class Gathered:
    """The states that one rank of the new world has read, summed as they come."""

    sums: State = field(default_factory=dict)
    num: dict[str, int] = field(default_factory=dict)
    held: dict[int, State] = field(default_factory=dict)

    def add(self, rank: int, state: Mapping[str, Any]) -> None:
        """Take a rank's state."""
        length, rest = np.shape(state.get("learner/theta", 0)), {}
        for name, value in state.items():
            if not (name.startswith(MEAN_OF) and is_model(value, length)):
                rest[name] = value
            elif name in self.sums:
                self.sums[name] += value
                self.num[name] += 1
            else:
                self.sums[name], self.num[name] = np.array(value), 1
        self.held[rank] = rest

    def merged(
        self, comm: Comm, size: int, nearest: State, shared: Mapping[str, Any]
    ) -> Merged:
        """Return what all ranks have read, merged. Collective, see the header."""
        theta = shared["theta"]
        gathered = comm.allgather((self.num, data_places(self.held)))
        means = {}
        for name in sorted({name for num, _ in gathered for name in num}):
            mean = self.sums.pop(name, np.zeros_like(theta))
            comm.Allreduce(IN_PLACE, mean)
            mean /= sum(num.get(name, 0) for num, _ in gathered)
            means[name] = mean
        places = {rank: place for _, found in gathered for rank, place in found.items()}
        return Merged(
            size,
            int(shared["samples"]),
            theta,
            means,
            {name: value for name, value in nearest.items() if name not in means},
            self.held,
            [places.get(rank, {}) for rank in range(size)],
        )


def is_model(value: Any, shape: tuple[int, ...]) -> bool:
    """Return whether an entry is as long as the model, and of float32."""
    is_array = isinstance(value, np.ndarray)
    return is_array and value.shape == shape and value.dtype == np.float32


def data_places(held: Mapping[int, State]) -> dict[int, State]:
    """Return where the ranks stand in the data."""
    prefix = "learner/batches"
    return {rank: under(prefix, state) for rank, state in held.items()}
