"""The strategy interface: how the ranks come to agree on one model.

A strategy is an algorithm of a paper. Its `step(learner)` reads like the paper's
equations: it uses the learner's `theta`, `grad`, `gradient()` and `update()`, and the
world's communicator, clock and activities. It imports no torch, mpi4py, threading
or time; flat vectors are used through operators that numpy and torch share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import numpy as np

from mpilm.learner.flat import Layout
from mpilm.world.base import IN_PLACE, Comm, World

Observer = Callable[[slice, Any], None]
NUM_BINS = 17  # of the staleness: 0 to 15, and more


class Learner(Protocol):
    """What a strategy may ask of the learner (`mpilm.Learner` offers it).

    theta    the model, (P,) float32, contiguous; the torch parameters are views of it
    grad     the gradient, (P,) float32, contiguous
    layout   where each parameter and component lies
    samples  samples (tokens, frames) this rank has processed
    lr       learning rate of the next update
    """

    theta: Any
    grad: Any
    layout: Layout
    samples: int
    lr: float

    def gradient(
        self, ready: Callable[[slice], None] | None = None, *, scale: float = 1.0
    ) -> Any:
        """Draw the next minibatch; set `grad` at theta; return the mean loss.

        `grad` is the gradient times `scale`. `ready` is called with each segment's
        slice as soon as it is final.
        """

    def update(self) -> None:
        """Take one step of the local optimiser: theta <- theta - lr * P(grad)."""

    def moments(self) -> dict[str, Any]:
        """Return the optimiser's flat state vectors by name (momentum, ...)."""


class Strategy(ABC):
    """Base of all strategies.

    name      the one name: module, config value, test id, docs page
    Config    its section [strategy] of the configuration
    lockstep  every rank takes the same number of steps, at one common pace
    synchronises  it calls `synchronised`; `ema` needs that
    moves_first   a step changes theta before it takes the gradient there

    on_synchronised  called with (where, model): the place of a part in the flat vector
                     and its synchronised values, in the order in which it happens. The
                     observer reads them before it returns, and changes nothing.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    lockstep: bool = True
    synchronises: bool = False
    moves_first: bool = False
    on_synchronised: Observer | None = None

    def __init__(self, world: World, config: Any) -> None:
        self.world = world
        self.config = config
        self.comm: Comm = world.comm.Dup()

    def require(self, learner: Learner) -> None:
        """Raise unless the strategy can train this learner in its world.

        Called once before `start`, inside `world.together()`: no communication.

        Raises:
            ConfigError, WorldError: one line that says what would work.
        """

    def start(self, learner: Learner) -> None:
        """Give every rank the model of rank 0.

        Communicates: collective, one Bcast of 4P bytes, blocking.
        """
        self.comm.Bcast(learner.theta, root=0)

    @abstractmethod
    def step(self, learner: Learner) -> Any:
        """Process one minibatch on this rank; return its mean loss."""

    def retire(self, learner: Learner) -> None:
        """Note that this rank takes no step before `finish`; it goes on answering.

        Out of lockstep, call it before this rank waits for others that still take
        steps. Not collective.
        """

    def finish(self, learner: Learner) -> None:
        """End background work; nothing stays in flight. Collective."""

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the model to evaluate and keep into `out`, (P,): the mean over ranks.

        Communicates: collective, one Allreduce of 4P bytes, blocking.
        """
        out[:] = learner.theta
        self.mean_(out)

    @property
    def stride(self) -> int:
        """Steps from one point where all ranks wait for each other to the next."""
        return 1

    def agree(self, number: int) -> int:
        """Return the number of the rank that decides for this one: mostly itself.

        Out of lockstep, whatever decides if a step is taken must be asked here: some
        ranks may be in lockstep with each other all the same (`hierarchical`).
        """
        return number

    def global_samples(self, learner: Learner) -> int:
        """Return the samples that all ranks together have processed, as known here."""
        return learner.samples * self.world.size

    def accounts(self) -> dict[str, Any]:
        """Return counts of this rank for log and summary: name -> number or array.

        docs/accounting.md says what they mean for each strategy. K are all ranks of the
        world; a strategy leaves out what has no meaning for it.

        mixes      how often a model was mixed with others
        partners   int64 (K,): how often with each rank
        rounds     rounds of mixing that this rank has begun
        shares     float64 (K,): sum over rounds of the weights T_ij, j != i, that the
                   other models had in this rank's new one
        staleness  int64 (17,): foreign mixes between the reading of a model and its
                   update; bins 0 to 15, and more
        """
        return {}

    def averages(self, rounds: int) -> dict[str, Any]:
        """Return the accounts after so many averages over all ranks: T = 11^T/K."""
        others = np.full(self.comm.size, rounds, np.int64)
        others[self.comm.rank] = 0
        return {
            "mixes": int(others.max()),
            "partners": others,
            "rounds": rounds,
            "shares": others / self.comm.size,
        }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of this rank: name -> array or number."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""

    def synchronised(self, where: slice, model: Any) -> None:
        """Show the observer, if there is one, a synchronised part of the model."""
        if self.on_synchronised is not None:
            self.on_synchronised(where, model)

    def mean_(self, vector: Any) -> None:
        """Replace `vector` by its mean over ranks.

        Communicates: collective, one Allreduce of the vector, blocking.
        """
        if self.comm.size > 1:
            self.comm.Allreduce(IN_PLACE, vector)
            vector *= 1.0 / self.comm.size
