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
from mpilm.world.base import IN_PLACE, MAX, World

if TYPE_CHECKING:
    from mpilm.learner.learner import Learner


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

    Communicates: collective, one Bcast and, if the models differ, one Allreduce of 4P
        bytes, and 8K bytes from each rank; blocking.
    """
    gap = realised_gap(world.comm.allgather(dict(metrics)))
    model = learner.theta.clone()
    world.comm.Bcast(model, root=0)
    differ = np.array([bool((model != learner.theta).any())], np.int64)
    world.comm.Allreduce(IN_PLACE, differ, MAX)
    if not differ[0]:  # the same on all ranks
        return Consensus(0.0, float(model.norm()), gap)
    model.copy_(learner.theta)
    world.comm.Allreduce(IN_PLACE, model)
    model *= 1.0 / world.size
    norm = float(model.norm())
    model -= learner.theta
    return Consensus(float(model.norm()), norm, gap)


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
