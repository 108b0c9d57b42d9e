"""How far the ranks' models are from each other in a simulated protocol.

Notation    theta_r, c_r -> a rank's model and its own minimum, (P,);  lr -> step length
            D -> root mean square of theta_r - mean, S -> that of c_r - mean
Drift       A quadratic's learner that starts from the mean and takes n steps alone has

                D = S (1 - (1 - lr)^n)   so   n = log(1 - D/S) / log(1 - lr)     (1)

            in mean over the second half of the run: so many steps of its own a rank is
            from the others. 0 where all take the same step; (H-1)/2 where all average
            every H steps; more where averages are partial, late or rare.
"""

from __future__ import annotations

import math

import numpy as np

from mpilm.learner.quadratic import ProtocolLearner

# Chosen, not tuned: a spread needs no more ranks and parameters to be known to 1%.
MOST_RANKS, MOST_PARAMETERS = 16, 4096


class Drift:
    """Watches the models of a protocol.

    Args:
        ranks: K.
        steps: of every rank.
        lockstep: models after the same number of steps belong together; otherwise those
            that are there when rank 0 has taken a step.
    """

    def __init__(self, ranks: int, steps: int, *, lockstep: bool) -> None:
        self.watched = range(0, ranks, -(-ranks // MOST_RANKS))
        self.lockstep, self.first = lockstep, steps // 2
        self.learners: dict[int, ProtocolLearner] = {}
        self.seen: dict[int, dict[int, np.ndarray]] = {}  # step -> rank -> model

    def note(self, rank: int, step: int, learner: ProtocolLearner) -> None:
        """Look at a rank that has taken `step` steps."""
        if rank not in self.watched:
            return
        self.learners[rank] = learner
        if step <= self.first:
            return
        if self.lockstep:
            self.seen.setdefault(step, {})[rank] = _part(learner.theta)
        elif rank == 0:
            self.seen[step] = {r: _part(of.theta) for r, of in self.learners.items()}

    def steps(self) -> float:
        """Return (1); 0 where there is nothing to compare."""
        minima = [_part(learner.target) for learner in self.learners.values()]
        if len(minima) < 2:
            return 0.0
        whole = _spread(minima)
        lr = next(iter(self.learners.values())).lr
        all_there = (m for m in self.seen.values() if len(m) == len(minima))
        shares = [_spread(list(models.values())) / whole for models in all_there]
        alone = [math.log1p(-min(s, 0.9999)) / math.log1p(-lr) for s in shares]
        return sum(alone) / len(alone) if alone else 0.0


def _part(vector: np.ndarray) -> np.ndarray:
    """Return some elements from everywhere, as a copy."""
    return vector[:: -(-len(vector) // MOST_PARAMETERS)].astype(np.float64)


def _spread(vectors: list[np.ndarray]) -> float:
    """Return the root mean square of what lies between vectors and their mean."""
    apart = np.stack(vectors) - np.mean(vectors, axis=0)
    return float(np.sqrt(np.mean(apart * apart)))
