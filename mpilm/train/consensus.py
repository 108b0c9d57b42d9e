"""How far the ranks are from one model, and how well they mix.

Notation    theta_i   model of rank i, (P,);  m = (1/K) sum_j theta_j, their mean
            distance  ||theta_i - m||_2
            T         mean over rounds of the mixing matrix that was realised, (K, K)
            gap       1 - second largest |eigenvalue| of T
docs/metrics.md says how T is got for each strategy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpilm.strategies.topology import realised, spectral_gap
from mpilm.vectors import copy_of
from mpilm.world.base import IN_PLACE, MAX, World

if TYPE_CHECKING:
    from mpilm.learner.learner import Learner

# Elements of a part of theta that is copied: 16 MB. Chosen, not tuned.
PART = 1 << 22


@dataclass(frozen=True)
class Consensus:
    """Where a rank stands among the others.

    distance  ||theta_i - m||_2; 0 on all ranks if they hold the same bits
    norm      ||m||_2
    gap       of the realised mixing matrix; NaN: there is none
    """

    distance: float
    norm: float
    gap: float


def measure_consensus(
    learner: Learner, world: World, metrics: Mapping[str, Any]
) -> Consensus:
    """Return how far this rank's model is from the mean, and how well ranks mix.

    Equal models are compared with rank 0's: a mean of K equal numbers is rounded.

    Args:
        metrics: of this rank's strategy.

    Communicates: collective, Bcasts and, if the models differ, Allreduces of 4P bytes
        together, part by part, and 8K bytes from each rank; blocking.
    """
    gap = realised_gap(world.comm.allgather(dict(metrics)))
    parts, squares = parts_of(learner.theta), np.zeros(2)
    differ = np.zeros(1, np.int64)
    for own in parts:
        part = copy_of(own)
        world.comm.Bcast(part, root=0)
        differ |= bool((part != own).any())
        squares[1] += float(part.norm()) ** 2
    world.comm.Allreduce(IN_PLACE, differ, MAX)
    if not differ[0]:  # the same on all ranks
        return Consensus(0.0, float(np.sqrt(squares[1])), gap)
    squares[:] = 0.0
    for own in parts:
        part = copy_of(own)
        world.comm.Allreduce(IN_PLACE, part)
        part *= 1.0 / world.size
        squares[1] += float(part.norm()) ** 2
        part -= own
        squares[0] += float(part.norm()) ** 2
    distance, norm = np.sqrt(squares).tolist()
    return Consensus(distance, norm, gap)


def parts_of(theta: Any) -> list[Any]:
    """Return views of theta, one after the other, each of at most PART elements."""
    return [theta[start : start + PART] for start in range(0, len(theta), PART)]


def realised_gap(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Return the spectral gap of T from the metrics of all ranks.

    The number of rounds is the mean over ranks: out of lockstep a fast rank begins more
    than a slow one. NaN: one rank, no round yet, or a strategy that mixes no models.
    """
    size = len(metrics)
    shares = [np.asarray(own.get("weights", ()), np.float64) for own in metrics]
    rounds = float(np.mean([own.get("rounds", 0) for own in metrics]))
    if size == 1 or rounds == 0.0 or any(len(row) != size for row in shares):
        return float("nan")
    return spectral_gap(realised(np.stack(shares), rounds))
