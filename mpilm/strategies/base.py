"""The strategy interface: how the ranks come to agree on one model.

A strategy is an algorithm of a paper. Its `step(learner)` reads like the paper's
equations: it uses the learner's `theta`, `grad`, `gradient()` and `update()`, and the
world's communicator, clock and activities. It imports no torch, mpi4py, threading
or time; flat vectors are used through operators that numpy and torch share.

Who writes a strategy gives it

    name, Config   the one name, and its settings
    saves          attributes that a checkpoint must hold
    lockstep       whether all ranks take the same number of steps
    start, step, finish, final_model_
    moved_bytes    what it has communicated, by its own equations

and, where there is one, the `service` that works in the background. All else on this
page is for whoever trains with it. docs/own_strategy.md writes one in 40 lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.storage.merged import Merged
from mpilm.storage.saved import State, restore_state_, saved_state
from mpilm.strategies.rest import bcast_rest, with_rest
from mpilm.vectors import to_array
from mpilm.world.base import IN_PLACE, Comm, World, require_background
from mpilm.world.service import Service
from mpilm.world.wire import wired

Observer = Callable[[slice, Any], None]
NUM_BINS = 17  # of the staleness: 0 to 15, and more
ITEM_BYTES = 4  # of float32


class Learner(Protocol):
    """What a strategy may ask of the learner (`mpilm.Learner` offers it).

    theta         the model, (P,) float32, contiguous; torch's parameters are its views
    grad          the gradient, (P,) float32, contiguous; without the row tables
    rows          the gradients of row tables: segment's name -> (ids, values)
    layout        where each parameter and component lies
    samples       samples (tokens, frames) this rank has processed
    lr            learning rate of the next update
    refresh       sets `lr` to what it is now; `gradient` and `update` call it
    is_plain_sgd  whether the next update is theta <- theta - lr * grad, no more
    rows_rest     whether an update changes only the rows of row tables in `rows`
    """

    theta: Any
    grad: Any
    rows: Any
    layout: Layout
    samples: int
    lr: float
    refresh: Callable[[], None]

    @property
    def is_plain_sgd(self) -> bool: ...

    @property
    def rows_rest(self) -> bool: ...

    def gradient(
        self, ready: Callable[[slice], None] | None = None, *, scale: float = 1.0
    ) -> Any:
        """Draw the next minibatch; set `grad` at theta; return the mean loss.

        `grad` is the gradient times `scale`. `ready` is called with each segment's
        slice as soon as it is final.
        """

    def draw(self) -> dict[str, Any]:
        """Draw the minibatch of the next `gradient`; return table -> ids it reads."""

    def update(self) -> None:
        """Take one step of the local optimiser: theta <- theta - lr * P(grad)."""

    def moments(self) -> dict[str, Any]:
        """Return the optimiser's flat state vectors by name (momentum, ...)."""

    def reset_moments(self) -> None:
        """Let the optimiser begin anew: these vectors, and the counters beside them."""


@dataclass(frozen=True, kw_only=True)
class WireConfig:
    """What every strategy whose messages are float32 has in its section [strategy]."""

    wire: Literal["float32", "bfloat16", "float16"] = "float32"
    """how float32 vectors travel; what the format cannot hold stays with the sender"""


@dataclass(frozen=True, kw_only=True)
class UpdateWireConfig:
    """The same where what travels is a gradient or an update, which codes suit."""

    wire: Literal["float32", "bfloat16", "float16", "int8", "int4"] = "float32"
    """how float32 vectors travel; what the format cannot hold is sent with the next"""


@dataclass
class Pace:
    """How the ranks of a strategy keep in step.

    lockstep     every rank takes the same number of steps
    stride       steps from one point where all ranks wait for each other to the next
    moves_first  a step changes theta before it takes the gradient there
    node         ranks in lockstep with each other whatever `lockstep` says; None: none
    """

    lockstep: bool
    stride: int = 1
    moves_first: bool = False
    node: Comm | None = None

    def agree(self, number: int) -> int:
        """Return the number of the rank that decides for this one: mostly itself.

        Out of lockstep, whatever decides if a step is taken must be asked here.

        Communicates: with a `node`, out of lockstep: a Bcast of 8 bytes in it,
            blocking.
        """
        if self.lockstep or self.node is None or self.node.size == 1:
            return number
        decided = np.array([number], np.int64)
        self.node.Bcast(decided, root=0)
        return int(decided[0])


class Strategy(ABC):
    """Base of all strategies.

    name          the one name: module, config value, test id, docs page
    Config        its section [strategy] of the configuration
    lockstep      every rank takes the same number of steps, at one common pace
    synchronises  it calls `synchronised`; `ema` needs that
    takes_rows    it trains models with row tables (`learner.rows`)
    saves         names of the attributes that a checkpoint holds, see storage/saved.py
    lasting       those of `saves` that go on at another number of ranks
    survives      it goes on when ranks die (`world.on_death`)
    same_optimizer  all ranks have the same state of the local optimiser
    service       its background activity, if it has one
    pace          see `Pace`
    leaving       which models are left out of a mean; None: none

    on_synchronised  called with (where, model): the place of a part in the flat vector
                     and its synchronised values, in the order in which it happens. The
                     observer reads them before it returns, and changes nothing.
    """

    name: ClassVar[str]
    Config: ClassVar[type]
    lockstep: bool = True
    synchronises: bool = False
    takes_rows: bool = False
    saves: tuple[str, ...] = ()
    lasting: tuple[str, ...] = ()
    survives: bool = False
    same_optimizer: bool = False
    service: Service | None = None
    leaving: Any = None  # a LeaveOut
    on_synchronised: Observer | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Let a `final_model_` of its own see to what lies outside theta."""
        super().__init_subclass__(**options)
        if "final_model_" in vars(cls):
            cls.final_model_ = with_rest(cls.final_model_)  # type: ignore[method-assign]

    def __init__(self, world: World, config: Any) -> None:
        self.world = world
        self.config = config
        self.comm = wired(world.comm.Dup(), getattr(config, "wire", "float32"))
        self.pace = Pace(self.lockstep, stride=getattr(config, "period", 1))

    # what a strategy does
    def start(self, learner: Learner) -> None:
        """Give every rank the model of rank 0; make what the strategy keeps.

        Raises:
            ModelError: the ranks' models are not alike.

        Communicates: collective, one Bcast of 4P bytes, blocking; and what
            `bcast_rest` does for buffers and frozen parameters.
        """
        bcast_rest(self.comm, learner)
        self.comm.Bcast(learner.theta, root=0)

    @abstractmethod
    def step(self, learner: Learner) -> Any:
        """Process one minibatch on this rank; return its mean loss."""

    def finish(self, learner: Learner) -> None:
        """End background work; nothing stays in flight; more steps may follow.

        Communicates: collective; with a service, one barrier, blocking.
        """
        if self.service is not None and self.comm.size > 1:
            self.retire(learner)
            self.service.end()

    @with_rest
    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the model to evaluate and keep into `out`, (P,): the mean over ranks.

        If `out` is `learner.theta`, the module is that model afterwards, buffers and
        all (rest.py); that is so of every subclass, too.

        Communicates: collective, one Allreduce of 4P bytes, blocking.
        """
        out[:] = learner.theta
        self.mean_(out)

    def moved_bytes(self, layout: Layout) -> tuple[int, int] | None:
        """Return the bytes sent and received by this rank's steps, by its equations.

        Counted as `Traffic` counts; `start` and `final_model_` are left out, `finish`
        is not. None: not declared.
        """
        return None

    def conserved(self, learner: Learner) -> Any:
        """Return what the strategy conserves, (P,) float64; None: nothing.

        Whatever the timing, its mean over ranks changes by the learners' own steps and
        nothing else. Asked before the first step and after `finish`.
        """
        return np.asarray(to_array(learner.theta), np.float64)

    # what it may use
    def mean_(self, vector: Any) -> None:
        """Replace `vector` by its mean over ranks.

        In another wire format than float32 each rank's has besides what of its own did
        not travel; the final model has not.

        Communicates: collective, one Allreduce of the vector, blocking.
        """
        if self.comm.size > 1:
            left = self.comm.Allreduce(IN_PLACE, vector)
            vector /= self.comm.size
            if left is not None:
                vector += left

    def allreduced_bytes(self, num_elements: int) -> int:
        """Return what an Allreduce of so many float32 moves on this rank, each way."""
        return self.comm.allreduced_bytes(num_elements)

    def synchronised(self, where: slice, model: Any) -> None:
        """Show the observer, if there is one, a synchronised part of the model."""
        if self.on_synchronised is not None:
            self.on_synchronised(where, model)

    # for whoever trains with it
    def require(self, learner: Learner) -> None:
        """Raise unless the strategy can train this learner in its world.

        Called once before `start`, inside `world.all_or_none()`: no communication.

        Raises:
            ConfigError, WorldError: one line that says what would work.
        """
        self.require_takes_rows(learner)
        if self.comm.size > 1 and not self.lockstep:
            require_background(self.world, self.name)

    def require_takes_rows(self, learner: Learner) -> None:
        """Raise if the model has row tables, and the strategy cannot train them.

        Raises:
            ConfigError: one line that says what would work.
        """
        if learner.layout.tables and not self.takes_rows:
            raise ConfigError(
                f"strategy.name = {self.name}: exchanges whole models and gradients;"
                " model.sparse = true has rows of them, model.sparse = false has not"
            )

    def retire(self, learner: Learner) -> None:
        """Note that this rank takes no step before `finish`; it goes on answering.

        Out of lockstep, call it before this rank waits for others that still take
        steps. Not collective.
        """
        if self.service is not None and self.comm.size > 1:
            self.service.retire()

    def metrics(self) -> dict[str, Any]:
        """Return counts of this rank for log and summary: name -> number or array.

        docs/metrics.md says what they mean for each strategy. K are all ranks of the
        world; a strategy leaves out what has no meaning for it.

        mixes      how often a model was mixed with others
        partners   int64 (K,): how often with each rank
        rounds     rounds of mixing that this rank has begun
        weights    float64 (K,): sum over rounds of the weights T_ij, j != i, that the
                   other models had in this rank's new one
        staleness  int64 (17,): foreign mixes between the reading of a model and its
                   update; bins 0 to 15, and more
        """
        return {}

    def averages(self, rounds: int) -> dict[str, Any]:
        """Return the metrics after so many averages over all ranks: T = 11^T/K."""
        others = np.full(self.comm.size, rounds, np.int64)
        others[self.comm.rank] = 0
        return {
            "mixes": int(others.max()),
            "partners": others,
            "rounds": rounds,
            "weights": others / self.comm.size,
        }

    def state(self) -> State:
        """Return what a checkpoint must hold of this rank: name -> array or number."""
        return saved_state(self, self.saves)

    def load_state(self, state: State) -> None:
        """Take up what `state` returned.

        Raises:
            CheckpointError: it was made with other settings.
        """
        restore_state_(self, self.saves, state, f"strategy {self.name}")

    @property
    def inherited(self) -> tuple[str, ...]:
        """Names of the attributes that are merged after a death."""
        return self.lasting

    @property
    def copied(self) -> tuple[str, ...]:
        """Those of `inherited`, vectors, that differ from rank to rank."""
        return ()

    @property
    def exchanged(self) -> Any:
        """How many exchanges with each rank are over: they have changed theta, (K,).

        Of two ranks both have the same number when neither is in an exchange.
        """
        return self.metrics().get("partners", np.zeros(self.comm.size, np.int64))

    @property
    def is_settled(self) -> bool:
        """Whether no exchange will change theta yet; the same on all ranks."""
        return True

    def survive(self, learner: Learner) -> None:
        """Bring theta to what is known here, after others have died. No communication.

        A minibatch whose gradient no update has used does not count.
        """
        learner.samples = getattr(learner, "used", learner.samples)

    def take_over(self, learner: Learner, merged: Merged) -> None:
        """Go on from what ranks of another number have left: `lasting`, if they had it.

        Called after `start`, where theta is the mean of their models. What counts
        exchanges with single ranks (`metrics`) begins anew.

        Raises:
            CheckpointError: it was made with other settings.

        Communicates: collective, if at all.
        """
        entries = {name: name.replace(".", "/") for name in self.lasting}
        here = saved_state(self, self.lasting)
        state = merged.state
        found = {entry: state[entry] for entry in here if entry in state}
        names = [name for name, entry in entries.items() if entry in found]
        restore_state_(self, names, found, f"strategy {self.name}")
