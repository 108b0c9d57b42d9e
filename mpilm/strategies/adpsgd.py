"""Asynchronous decentralised SGD: average with others in the background, wait-free.

Source      X. Lian et al., "Asynchronous Decentralized Parallel Stochastic Gradient
            Descent", ICML 2018; X. Cui et al., arXiv 2110.11199, 2021 (random ring).
Notation    x_i      -> x, the model of rank i, shared by two activities, (P,)
            w_hat_i  -> theta, the copy that the gradient is taken at, (P,)
            g        -> grad at w_hat_i
            a        -> weight of a meeting of i and j: T_ij = T_ji = a, T_ii = 1 - a
Update      learner  g at w_hat                             (not locked)       (1)
                     x <- x - lr * P(g); w_hat <- x         (under the lock)   (2)
            mixing   s <- x_i; send s to j                  (under i's lock)   (3)
                     d <- a (x_j - s); x_j <- x_j - d       (under j's lock)   (4)
                     x_i <- x_i + d                         (under i's lock)   (5)
            Had nothing else happened to x_i meanwhile, (4) and (5) are T.
Messages    a meeting is a snapshot of 4P bytes there and a delta of 4P bytes back, in
            pieces one after the other.

            i: s = x ====> s          x += d
            j:             x -= d, d ====> d
Invariants  the sum of x over ranks and of the deltas under way changes by (2) only,
            whatever the delays. Nobody holds a lock while waiting, and a rank that
            waits for an answer goes on answering: no graph can deadlock.
Departs     from the papers in: a ring averages with one neighbour at a time, in turns.
            a is 1/3 where Lian's pairs have 1/2: nobody stops the other meetings while
            a snapshot is under way. Two ranks that ask each other at the same time make
            two meetings at once: T has 1 - 2a on its diagonal, which at a = 1/2 only
            swaps the models. With a = 1/3 a ring in step is the papers' 1/3, 1/3, 1/3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import copy_of
from mpilm.strategies.base import NUM_BINS, Learner, Strategy
from mpilm.strategies.topology import permutation
from mpilm.world.base import (
    Activity,
    Comm,
    Message,
    Request,
    World,
)


@dataclass(frozen=True, kw_only=True)
class AdpsgdConfig:
    """Section [strategy] of `adpsgd`."""

    mixing: Literal["fixed_ring", "random_ring", "random_pairs"] = "random_ring"
    """whom a rank asks: its neighbours on a ring in turns, or anybody"""
    mixes_per_step: Annotated[float, Meta(gt=0)] = 1.0
    """meetings that a rank begins in each of its steps, at most"""
    weight: Annotated[float, Meta(gt=0, le=0.5)] = 1 / 3
    """share of the difference of two models that a meeting moves to each"""
    ring_rounds: Annotated[int, Meta(ge=1)] = 10
    """meetings that a rank begins on one random ring, before the next is drawn"""
    pieces: Annotated[int, Meta(ge=1)] = 2
    """parts that a model is sent in; 1: faster by a latency, one more copy in memory"""
    seed: Annotated[int, Meta(ge=0)] = 1
    """of the random rings and partners; the same on all ranks"""


class Adpsgd(Strategy):
    """Wait-free SGD; a background activity mixes the models."""

    name = "adpsgd"
    Config = AdpsgdConfig
    lockstep = False

    def __init__(self, world: World, config: AdpsgdConfig) -> None:
        super().__init__(world, config)
        self.mixer = Mixer(world, self.comm, config)

    def step(self, learner: Learner) -> Any:
        mixer = self.mixer
        if self.comm.size == 1:
            loss = learner.gradient()
            learner.update()
            return loss
        mixer.begin(learner.theta)
        loss = learner.gradient()  # (1)
        with mixer.lock:
            learner.theta[:] = mixer.x
            learner.update()
            mixer.x[:] = learner.theta  # (2)
            mixer.count_step()
        return loss

    def retire(self, learner: Learner) -> None:
        if self.comm.size > 1:
            self.mixer.begin(learner.theta)  # a rank without a step answers as well

    def finish(self, learner: Learner) -> None:
        """Mix no more, but answer until nobody asks; theta is x.

        Communicates: collective, one barrier, blocking.
        """
        if self.comm.size > 1:
            self.retire(learner)
            self.mixer.end()
            learner.theta[:] = self.mixer.x

    def metrics(self) -> dict[str, Any]:
        mixer = self.mixer
        return {
            "mixes": int(mixer.partners.sum()),
            "partners": mixer.partners.copy(),
            "rounds": mixer.round,
            "weights": self.config.weight * mixer.partners,
            "staleness": mixer.staleness.copy(),
        }

    def state(self) -> dict[str, Any]:
        mixer = self.mixer
        return {
            "round": mixer.round,
            "partners": mixer.partners.copy(),
            "staleness": mixer.staleness.copy(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.mixer.round = int(state["round"])
        self.mixer.partners[:] = state["partners"]
        self.mixer.staleness[:] = state["staleness"]


class Mixer:
    """The mixing activity of one rank: it asks, and it answers, and waits for both.

    x          the model, (P,); read and written under the lock
    asking     buffer of a piece: the snapshot, then the delta of the own meeting
    answering  buffer of a piece: somebody's snapshot, then the delta for them
    under_way  what the own meeting waits for; None: there is no own meeting
    reply      the answer that is being sent
    budget     meetings that may begin; steps add to it
    round      meetings begun so far
    partners   int64 (K,): meetings with each rank, whoever began them
    staleness  int64 (17,): meetings between the reading of w_hat and its update
    """

    def __init__(self, world: World, comm: Comm, config: AdpsgdConfig) -> None:
        self.world, self.comm, self.config = world, comm, config
        self.deltas = comm.Dup()  # apart: whoever looks for a snapshot must not get one
        self.lock = world.lock("x")
        self.x: Any = None
        self.activity: Activity | None = None
        self.under_way: Request | None = None
        self.reply: Request | None = None
        self.barrier: Request | None = None
        self.leaving = self.over = self.is_sent = False
        self.peer = self.piece = 0
        self.budget = 0.0
        self.round = 0
        self.num_changes = self.num_seen = 0  # pieces mixed into x: so far, at (2)
        self.partners = np.zeros(comm.size, np.int64)
        self.staleness = np.zeros(NUM_BINS, np.int64)

    # called by the learner
    def begin(self, theta: Any) -> None:
        """Start from `theta`, unless the activity runs."""
        if self.activity is not None:
            return
        if self.x is None:
            self.x = copy_of(theta)
            cuts = [
                index * len(theta) // self.config.pieces
                for index in range(self.config.pieces + 1)
            ]
            self.slices = [slice(*ends) for ends in pairwise(cuts)]
            longest = max(part.stop - part.start for part in self.slices)
            self.asking = copy_of(theta[:longest])
            self.answering = copy_of(theta[:longest])
        self.x[:] = theta
        self.num_seen = self.num_changes
        self.leaving = self.over = False
        self.barrier = None
        self.budget = 0.0  # a checkpoint of this moment holds no leave to mix
        self.activity = self.world.start(self.run, "mixing")

    def count_step(self) -> None:
        """Note that the learner has read x and may mix on. Under the lock."""
        most = max(1.0, self.config.mixes_per_step)
        self.budget = min(most, self.budget + self.config.mixes_per_step)
        late = -(-(self.num_changes - self.num_seen) // self.config.pieces)
        self.staleness[min(late, NUM_BINS - 1)] += 1
        self.num_seen = self.num_changes

    def end(self) -> None:
        """Block until no rank asks any more."""
        assert self.activity is not None
        with self.lock:
            self.leaving = True
        self.activity.join()
        self.activity = None

    # the activity
    def run(self) -> None:
        """Do what can be done next, until all ranks have left."""
        while not self.over:
            act = self.world.wait(self.next_act, "a snapshot, a delta or leave to mix")
            act()

    def next_act(self) -> Callable[[], None] | None:
        """Return what can be done now without waiting; None: nothing."""
        if self.under_way is not None:
            if self.under_way.Test():
                return self.receive_delta if self.is_sent else self.take_delta
        elif not self.leaving:
            if self.budget >= 1.0:
                return self.ask
        elif self.barrier is None:
            return self.leave
        if self.reply is not None:  # its buffer is in use
            if not self.reply.Test():
                return None
            self.reply = None
        # when the barrier is done nobody of this time asks: what comes is of the next
        if self.barrier is not None and self.barrier.Test():
            return self.stop
        message = self.comm.Improbe()
        return partial(self.answer, message) if message else None

    def ask(self) -> None:
        """Begin a meeting."""
        with self.lock:
            self.budget -= 1.0
        self.peer, self.piece = self.partner(), 0
        self.round += 1
        self.send_snapshot()

    def send_snapshot(self) -> None:
        """(3) for one piece."""
        part = self.slices[self.piece]
        snapshot = self.asking[: part.stop - part.start]
        with self.lock:
            snapshot[:] = self.x[part]
        self.under_way = self.comm.Isend(snapshot, self.peer, self.piece)
        self.is_sent = True

    def receive_delta(self) -> None:
        """The snapshot has gone: its buffer is free for the answer."""
        part = self.slices[self.piece]
        delta = self.asking[: part.stop - part.start]
        self.under_way = self.deltas.Irecv(delta, self.peer, self.piece)
        self.is_sent = False

    def take_delta(self) -> None:
        """(5) for one piece; go on with the next."""
        part = self.slices[self.piece]
        with self.lock:
            self.x[part] += self.asking[: part.stop - part.start]
            self.num_changes += 1
        self.piece += 1
        if self.piece < len(self.slices):
            self.send_snapshot()
        else:
            self.under_way = None
            self.partners[self.peer] += 1

    def answer(self, message: Message) -> None:
        """(4) for one piece."""
        part = self.slices[message.tag]
        buffer = self.answering[: part.stop - part.start]
        message.Recv(buffer)
        with self.lock:
            answer_(self.x[part], buffer, weight=self.config.weight)
            self.num_changes += 1
        self.reply = self.deltas.Isend(buffer, message.source, message.tag)
        if message.tag == len(self.slices) - 1:
            self.partners[message.source] += 1

    def leave(self) -> None:
        """Own meetings are over: begin to wait for those of the others."""
        self.barrier = self.comm.Ibarrier()

    def stop(self) -> None:
        """Nobody asks any more."""
        self.over = True

    def partner(self) -> int:
        """Return whom to ask in this round."""
        config, rank, size = self.config, self.comm.rank, self.comm.size
        if config.mixing == "random_pairs":
            order = permutation(config.seed, self.round, size, salt=rank + 1)
            return order[0] if order[0] != rank else order[1]
        order = tuple(range(size))
        if config.mixing == "random_ring":
            order = permutation(config.seed, self.round // config.ring_rounds, size)
        step = 1 if self.round % 2 == 0 else -1
        return order[(order.index(rank) + step) % size]


def answer_(x: Any, snapshot: Any, *, weight: float) -> None:
    """Move x towards a snapshot; turn the snapshot into the delta of its sender: (4).

    Args:
        x: (n,), a piece of the own model.
        snapshot: (n,), the same piece of the other's.

    >>> x, s = np.array([4.0]), np.array([0.0])
    >>> answer_(x, s, weight=0.25)
    >>> x, s
    (array([3.]), array([1.]))
    """
    snapshot *= -1.0
    snapshot += x
    snapshot *= weight
    x -= snapshot
