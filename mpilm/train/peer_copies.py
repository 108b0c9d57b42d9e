"""A copy of each rank's state in the memory of the next one (a partner checkpoint).

    rank 0  step | copy, Isend to 1 | step step step ......... | next copy
    rank 1  step | copy, Isend to 2 | step step (all is there) | next copy
    rank 2  step | copy, Isend to 0 | step ... (dead)
                                             rank 0: the copy of 2 is one of the models

Why         What a rank has and no other one: its model where the models differ, its
            optimiser's moments, its place in the data. When it dies, these are gone.
Notation    d  the rank that has died; c  the step of its last copy
            n_ij  exchanges between i and j that are over (`Strategy.exchanged`)
At a death  theta <- (sum over those left of theta_j + theta_d(c)) / K, K with d   (1)
            and likewise what else the ranks average (`Strategy.copied`); if
            n_dj(c) = n_jd now for every j that is left. Else what d had learned until
            an exchange after c is in their models, and (1) goes without d, as it does
            without a copy.
            Samples of d: those of the copy with (1), else as many as the slowest other.
            The pool's leases go on where d was at c; a rank that joins in its place
            gets its moments.
Messages    every `checkpoint.peer_every` steps the state to the next rank, and from the
            one before: theta, the moments, of `gossip_bmuf` g and Delta. It is one
            message; if it is longer than those before, 16 bytes with its length first.
            Not blocking; a copy that is not through when the next one is due is waited
            for. All ranks take theirs after the same step, none while a mean is on its
            way (`delay`): it would hold neither what came before nor after.
Memory      three times that: what is sent, what is held, what comes.
Invariants  (1) keeps the sum of what all K have learned, but for d's steps after c.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mpilm.config import Config
from mpilm.errors import WorldError
from mpilm.storage.merged import MEAN_OF
from mpilm.storage.packed import HEAD, length_of, packed, unpacked
from mpilm.storage.saved import State, nested, saved_state
from mpilm.strategies import Strategy
from mpilm.vectors import lending
from mpilm.world.base import Comm, Request, Traffic, World
from mpilm.world.parts import named_ranks

FIRST, SECOND = 1, 2  # tags
# bytes by which a message may grow: counts in its header, leases; chosen, not tuned
SLACK = 4096
# of a learner's state: what others can use. Its buffers (`model/`) are averaged over
# those left; what it carried and its random numbers end with it.
OF_LEARNER = ("theta", "samples", "optimizer/", "rows/")


def copies_of_use(strategy: Strategy) -> bool:
    """Return whether a rank has anything of its own that others can go on with.

    Ranks with one model and one optimiser are copies of each other; out of lockstep
    there is no step that all have in common.
    """
    return strategy.survives and strategy.lockstep and not strategy.same_optimizer


def peer_copies(config: Config, world: World, strategy: Strategy) -> PeerCopies | None:
    """Return what makes the copies of a run; None: it needs none. Collective.

    For a run that goes on when a rank dies (`Assembly.goes_on`).
    """
    every = config.checkpoint.peer_every
    if not (every and world.size > 1 and copies_of_use(strategy)):
        return None
    return PeerCopies(world, every)


class PeerCopies:
    """One rank's part: sends its own copies, and holds those of the rank before.

    source   whose copies it holds
    traffic  what they have taken of the world's bytes and messages

    Args:
        every: steps between two copies.

    Communicates: collective when made: it duplicates the communicator.
    """

    def __init__(self, world: World, every: int) -> None:
        self.comm, self.every = world.comm.Dup(), every
        self.dest = (world.rank + 1) % world.size
        self.source = (world.rank - 1) % world.size
        self.traffic = Traffic()
        self._next: int | None = None  # step; None: the next multiple of `every`
        self._own: np.ndarray | None = None  # is sent
        self._held: np.ndarray | None = None  # has come, whole
        self._spare = np.empty(HEAD, np.uint8)  # is received into
        # bytes that the next rank can take at once; likewise this one
        self._room_there = self._room = HEAD
        self._sends: list[Request] = []
        self._coming: Request | None = None

    def look_after(self, trainer: Any) -> None:
        """Go on with the copy under way; begin one, if it is time. After every step.

        Communicates: see the header.
        """
        self._go_on()
        step = trainer.totals.step
        if self._next is None:
            self._next = -(-step // self.every) * self.every
        if step >= self._next and trainer.strategy.is_settled:
            self._next = (step // self.every + 1) * self.every
            self.settle()
            with lending():
                self._own = packed(own_state(trainer), self._own)
            self._send(self._own)

    def settle(self) -> None:
        """Wait until nothing is under way. Collective."""
        while self._coming is not None:
            self._coming.Wait()
            self._go_on()
        for send in self._sends:
            send.Wait()
        self._sends = []

    @property
    def held(self) -> State:
        """The last whole copy of rank `source`; empty: there is none yet.

        Its vectors are valid until another one comes.
        """
        with suppress(WorldError):  # it may have come since the last look
            self._go_on()
        return State() if self._held is None else unpacked(self._held)

    def _send(self, message: np.ndarray) -> None:
        length = length_of(message)
        parts = [(message[:length], FIRST)]
        if length > self._room_there:
            parts = [(message[:HEAD], FIRST), (message[:length], SECOND)]
            self._room_there = length + SLACK
        self._sends = [self.comm.Isend(part, self.dest, tag) for part, tag in parts]
        sent = sum(len(part) for part, _ in parts)
        self._count(sent=sent, messages=len(parts))
        self._receive(FIRST)

    def _receive(self, tag: int) -> None:
        if len(self._spare) < self._room:
            self._spare = np.empty(self._room, np.uint8)
        self._coming = self.comm.Irecv(self._spare[: self._room], self.source, tag)
        self._count(messages=1)

    def _go_on(self) -> None:
        """Take what has come. Never blocks."""
        if self._coming is None or not self._coming.Test():
            return
        self._coming = None
        length = length_of(self._spare)
        if length > self._room:
            self._count(received=HEAD)
            self._room = length + SLACK
            self._receive(SECOND)
            return
        self._count(received=length)
        before = np.empty(HEAD, np.uint8) if self._held is None else self._held
        self._held, self._spare = self._spare, before

    def _count(self, *, sent: int = 0, received: int = 0, messages: int = 0) -> None:
        self.traffic.bytes_sent += sent
        self.traffic.bytes_received += received
        self.traffic.messages += messages


def own_state(trainer: Any) -> State:
    """Return what the next rank holds of this one. No communication."""
    learner, strategy, batches = trainer.learner, trainer.strategy, trainer.batches
    of_learner = learner.state(data=False)
    state = {n: v for n, v in of_learner.items() if n.startswith(OF_LEARNER)}
    state = nested("learner", state)
    state |= nested("learner/batches", batches.survive())
    state |= nested("strategy", saved_state(strategy, strategy.copied))
    state |= nested("totals", asdict(trainer.totals))
    return state | {"exchanged": strategy.exchanged}


@dataclass
class Copies:
    """The copies of ranks that have died, as one rank knows of them.

    here     that this rank holds: rank -> what is merged as its state
    samples  of ranks whose models are merged (1): rank -> samples of the copy
    moments  of their optimisers, that this rank holds
    news     what people are told of them
    """

    here: dict[int, State] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    moments: list[State] = field(default_factory=list)
    news: str = ""


def copies_of_dead(
    copies: PeerCopies | None, comm: Comm, ranks: Sequence[int], exchanged: Any
) -> Copies:
    """Return what is left of the ranks that have died. Collective.

    Args:
        comm: of those that are left.
        ranks: their numbers before.
        exchanged: `Strategy.exchanged`, before.
    """
    if copies is None:
        return Copies()
    size = len(exchanged)
    dead = [rank for rank in range(size) if rank not in ranks]
    held = copies.held if copies.source in dead else State()
    about: Any = None
    if held:
        about = (held["learner/samples"], held["totals/step"], held.pop("exchanged"))
    own = ranks[comm.rank], {rank: int(exchanged[rank]) for rank in dead}
    found = comm.allgather((*own, about))
    by_holder = {rank: about for rank, _, about in found if about}
    with_copy = {rank: by_holder.get((rank + 1) % size) for rank in dead}
    result, used = Copies(), []
    for rank, about in with_copy.items():
        if not about:
            continue
        samples, step, of_copy = about
        if all(of_copy[j] == with_dead[rank] for j, with_dead, _ in found):
            result.samples[rank] = int(samples)
            used.append(f"that of rank {rank} after {step:,} steps")
    if held:
        rank = copies.source
        optimizer = ("learner/optimizer/", "learner/rows/")
        moments = {n: v for n, v in held.items() if n.startswith(optimizer)}
        result.moments.append(deepcopy(moments))
        gone = (*optimizer, *(() if rank in result.samples else MEAN_OF))
        if "learner/batches/taken" not in held:
            gone += ("learner/batches/",)  # shards go by the places of those left
        result.here[rank] = {n: v for n, v in held.items() if not n.startswith(gone)}
    result.news = "".join(f" and {text}" for text in used)
    lost = [rank for rank, about in with_copy.items() if not about]
    if lost:
        result.news += f" (no copy is left of {named_ranks(lost)})"
    return result
