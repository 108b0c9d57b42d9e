"""Which ranks' models are left out of a mean: those far worse than the best.

Source      Kaldi, steps/nnet3/train_dnn.py: models whose objective is far below the
            best are left out of the average of an iteration.
Notation    l_i  mean loss of rank i since the last mean, nats; inf: its model or all of
                 its losses are not finite
            S    the ranks of a mean
            c    -> limit, nats
Rule        i is left out of S if l_i > min over S of l_j, plus c                  (1)
            What is left goes on from the mean of the others, its optimiser anew.
Invariants  the best is never left out; if no model is finite, none is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.vectors import is_finite
from mpilm.world.base import IN_PLACE, Comm

LOSS_BYTES = 8
LEAVING = (  # what a checkpoint must hold
    *("leaving.left_out", "leaving.in_a_row", "leaving.loss_sum"),
    *("leaving.num_losses", "leaving.out_C"),
)


class LeaveOut:
    """One rank's losses, and how often it was left out.

    limit       c
    loss        l_i of the round that is being averaged
    out_C       uint8 (C,): components of the model that were left out of this round
    left_out    rounds, before this one, in which any was
    in_a_row    those of them since the last in which none was
    """

    def __init__(self, limit: float, num_components: int = 1) -> None:
        self.limit, self.loss = limit, math.inf
        self.loss_sum, self.num_losses = 0.0, 0
        self.out_C = np.zeros(num_components, np.uint8)
        self.left_out = self.in_a_row = 0

    def note(self, loss: Any) -> None:
        """Take the loss of a minibatch."""
        if math.isfinite(found := float(loss)):
            self.loss_sum += found
            self.num_losses += 1

    def forget(self) -> None:
        """Let the losses since the last mean be those of a model that is no more."""
        self.loss_sum, self.num_losses = 0.0, 0

    def begin_round(self, theta: Any) -> None:
        """Set `loss`; what was left out before is counted."""
        self.left_out, self.in_a_row = self.num_rounds, self.num_in_a_row
        self.out_C[:] = 0
        is_known = self.num_losses > 0 and is_finite(theta)
        self.loss = self.loss_sum / self.num_losses if is_known else math.inf
        self.forget()

    def judge(self, losses_K: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return who is left out, by (1).

        >>> LeaveOut(1.0).judge(np.array([2.0, 2.9, 3.1, np.inf])).tolist()
        [False, False, True, True]
        """
        found: NDArray[np.bool_] = losses_K > losses_K.min() + self.limit
        return found

    @property
    def num_rounds(self) -> int:
        """Rounds so far of which this rank was left out."""
        return self.left_out + int(self.out_C.any())

    @property
    def num_in_a_row(self) -> int:
        """The last ones of them, if no other round was between."""
        return self.in_a_row + 1 if self.out_C.any() else 0


def left_out_of(comm: Comm, leaving: LeaveOut) -> tuple[NDArray[np.bool_], int]:
    """Return who is left out of a mean over all ranks, and the bytes moved each way.

    Communicates: collective, an Allreduce of 8K bytes, blocking.
    """
    losses_K = np.zeros(comm.size)
    losses_K[comm.rank] = leaving.loss
    comm.Allreduce(IN_PLACE, losses_K)
    is_out_K = leaving.judge(losses_K)
    leaving.out_C[:] = is_out_K[comm.rank]
    return is_out_K, comm.exact.allreduced_bytes(2 * comm.size)  # float64


class Losses:
    """The losses of a group, on their way.

    Communicates: pairwise, 8 bytes to and from each other member; not blocking.
    """

    def __init__(self, comm: Comm, loss: float, others: list[int], tag: int) -> None:
        self.own, self.members = np.array([loss]), [comm.rank, *others]
        self.received_S = np.full(1 + len(others), loss)
        parts = [self.received_S[n : n + 1] for n in range(1, len(self.members))]
        pairs = zip(parts, others, strict=True)
        self.requests = [comm.Irecv(part, rank, tag) for part, rank in pairs]
        self.requests += [comm.Isend(self.own, rank, tag) for rank in others]

    def left_out(self, leaving: LeaveOut) -> set[int]:
        """Return the ranks that are left out. Blocking."""
        for request in self.requests:
            request.Wait()
        is_out_S = leaving.judge(self.received_S)
        return {rank for rank, out in zip(self.members, is_out_S, strict=True) if out}
