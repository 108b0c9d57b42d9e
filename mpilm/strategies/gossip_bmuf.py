"""Random gossip BMUF: every component is averaged in its own small random group.

Source      Y. Huang et al., "A Random Gossip BMUF Process for Neural Language
            Modeling", ICASSP 2020, arXiv 1909.09010 (the abstract; see Departs).
Notation    c        component: a layer, or a slice; S -> the group of c in this block
            w_i      -> theta, model of rank i after the block, (P,)
            g_i      -> start, the point rank i began its block from, (P,)
            Delta_i  -> delta, filtered update of rank i, (P,)
            k        -> group_size;  K -> comm.size
            eta, zeta, period as in `bmuf`
Update      for every component, on every rank i of its group S:
            wbar    = (1/|S|) sum_(j in S) w_j                                 (1)
            gbar    = (1/|S|) sum_(j in S) g_j                                 (2)
            Delta_i <- eta Delta_i + zeta (wbar - gbar)                        (3)
            W_i     = gbar + Delta_i                  classical                (4)
                    = gbar + zeta (wbar - gbar)       nesterov                 (5)
            g_i     <- W_i (+ eta Delta_i: nesterov);  w_i <- g_i              (6)
Messages    every rank knows the groups of every block and component: they are drawn
            from (seed, block, component). Members send each other w and g (Isend,
            Irecv): 8P (k-1) bytes sent per rank and block, and no global barrier.

            rank 0: step step |--c0 with 3--|--c1 with 2--| step step
            rank 1: step step |--c0 with 2--|--c1 with 3--| step step
            delay:  step step |=snapshot=> step step <=apply=|
Invariants  k = K: `bmuf`, to rounding. Mixing preserves the mean of w and of g.
            A slow rank delays its partners of a block; with several components and
            messages too long to be sent eagerly also those who wait for its partners.
Departs     the abstract leaves open what a neighbourhood is (here: the ranks cut into
            groups of k), what is mixed (here: `mix`), the momentum (here: 1 - 1/k for a
            mean over k models) and the final model (here: the mean of all W_i). Groups
            are larger than k where K is no multiple of it. Under nesterov (5) is `bmuf`
            written with start points only.
            With `delay` d the learner goes on from a snapshot s while messages are
            under way; d steps later theta <- theta + (g_i - s).
Cost        two extra copies of the model, and k-1 of its largest component to receive
            into; with `delay` one more for s and (k-1) for every mixed vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy
from mpilm.strategies.bmuf import AUTOMATIC, check_eta
from mpilm.strategies.topology import random_groups
from mpilm.vectors import chunked, copy_of, fill_, to_array
from mpilm.world.base import Comm, Request, World

VECTORS = {"models": 1, "starts": 2, "momenta": 3}
NUM_TAGS = 8192  # MPI promises tags up to 32,767; messages of one tag stay in order


@dataclass(frozen=True, kw_only=True)
class GossipBmufConfig:
    """Section [strategy] of `gossip_bmuf`."""

    period: Annotated[int, Meta(ge=1)] = 10
    """minibatches in a block"""
    group_size: Annotated[int, Meta(ge=2)] = 2
    """ranks that average a component with each other"""
    components: Literal["layers", "whole"] | Annotated[int, Meta(ge=1)] = "layers"
    """parts with groups of their own: layers, the whole model, or so many slices"""
    filter: bool = True
    """block momentum; without it plain gossip averaging"""
    eta: Annotated[float, Meta(ge=-1.0, lt=1.0)] = AUTOMATIC
    """block momentum; -1: 1 - 1/group_size"""
    zeta: Annotated[float, Meta(gt=0.0)] = 1.0
    """block learning rate"""
    momentum: Literal["classical", "nesterov"] = "nesterov"
    """where the next block starts: at the filtered model, or ahead of it"""
    mix: Literal["models", "starts", "momenta"] = "starts"
    """models only; also start points; also the filtered updates: more bytes each"""
    delay: Annotated[int, Meta(ge=0)] = 0
    """steps that the learner computes on while messages are under way; below period"""
    seed: Annotated[int, Meta(ge=0)] = 1
    """of the random groups"""

    def __post_init__(self) -> None:
        check_eta(self.eta)
        if self.delay >= self.period:
            raise ValueError(
                f"delay: {self.delay} steps are not less than period = {self.period}"
            )


def filter_(
    wbar: Any, gbar: Any, delta: Any, *, eta: float, zeta: float, nesterov: bool
) -> None:
    """Apply (3) to (5) in place: `gbar` becomes W_i; `wbar` is used up.

    >>> import numpy as np
    >>> wbar, gbar, delta = np.ones(1), np.zeros(1), np.ones(1)
    >>> filter_(wbar, gbar, delta, eta=0.5, zeta=1.0, nesterov=False)
    >>> float(gbar[0]), float(delta[0])
    (1.5, 1.5)
    """
    wbar -= gbar
    wbar *= zeta
    delta *= eta
    delta += wbar  # (3)
    gbar += wbar if nesterov else delta  # (5), (4)


def cut(layout: Layout, components: str | int) -> list[tuple[slice, ...]]:
    """Return the slices of each component.

    Tied weights lie in the flat vector once, so they are in one component.

    >>> cut(Layout.of([("a", (3,), "a"), ("b", (4,), "b")]), 2)
    [(slice(0, 3, None),), (slice(3, 7, None),)]
    """
    if components == "layers":
        return list(layout.components.values())
    count = 1 if components == "whole" else int(components)
    ends = [index * layout.size // count for index in range(count + 1)]
    return [(slice(*pair),) for pair in pairwise(ends)]


class Exchange:
    """Some vectors of one part of the model, on the way to and from its group."""

    def __init__(
        self, comm: Comm, members: list[int], tag: int, vectors: list[Any]
    ) -> None:
        self.comm, self.members, self.tag = comm, members, tag
        self.peers = [member for member in members if member != comm.rank]
        self.vectors = vectors
        self.sends = [
            [comm.Isend(vector, peer, tag + n) for peer in self.peers]
            for n, vector in enumerate(vectors)
        ]
        self.inboxes: dict[int, list[Any]] = {}
        self.receives: dict[int, list[Request]] = {}

    def receive(self, n: int, inbox: list[Any]) -> None:
        """Start receiving vector `n`, one buffer of `inbox` for each peer."""
        self.inboxes[n] = inbox
        self.receives[n] = [
            self.comm.Irecv(buffer, peer, self.tag + n)
            for buffer, peer in zip(inbox, self.peers, strict=True)
        ]

    def mean(self, n: int) -> Any:
        """Return the group's mean of vector `n`, in the first buffer of its inbox.

        Members add up in the order of ranks (a + b = b + a): all get the same bits. The
        rank's own vector may be overwritten afterwards.

        Communicates: waits for what was started of vector `n`.
        """
        for request in self.receives[n] + self.sends[n]:
            request.Wait()
        found = dict(zip(self.peers, self.inboxes[n], strict=True))
        found[self.comm.rank] = self.vectors[n]
        first, *others = (found[member] for member in self.members)
        if first is self.vectors[n] and others:
            first, others[0] = others[0], first
        total = first
        for vector in others:
            total += vector
        total *= 1.0 / len(self.members)
        return total


class GossipBmuf(Strategy):
    """Block momentum on means over small random groups, one for each component.

    parts        (component, slice), all of the model
    start_point  g_i, (P,)
    delta        Delta_i, (P,)
    snapshot     the w_i that was sent, (P,), with `delay` only
    inbox        buffers to receive into: [vector][peer]
    exchanges    what is under way: (slice, exchange)
    applies_at   step at whose end the means sent for are applied; -1: none
    """

    name = "gossip_bmuf"
    Config = GossipBmufConfig
    synchronises = True

    def __init__(self, world: World, config: GossipBmufConfig) -> None:
        super().__init__(world, config)
        size, group_size = world.size, min(config.group_size, world.size)
        self.steps = 0
        self.eta = 1.0 - 1.0 / group_size if config.eta == AUTOMATIC else config.eta
        self.delay = config.delay if size > 1 else 0
        self.num_vectors = VECTORS[config.mix] if config.filter else 1
        self.max_peers = -(-size // max(1, size // group_size)) - 1
        self.partners = np.zeros(size, np.int64)
        self.weights = np.zeros(size)
        self.parts: list[tuple[int, slice]] = []
        self.start_point: Any = None
        self.delta: Any = None
        self.snapshot: Any = None
        self.inbox: list[list[Any]] = []
        self.exchanges: list[tuple[slice, Exchange]] = []
        self.applies_at = -1

    @property
    def stride(self) -> int:
        return int(self.config.period)

    def require(self, learner: Learner) -> None:
        size, group_size = self.world.size, self.config.group_size
        if group_size > size > 1:
            raise ConfigError(
                f"strategy.group_size: groups of {group_size} cannot be made of {size}"
                f" ranks: at most {size}, or more ranks"
            )
        count, parameters = self.config.components, learner.layout.size
        if isinstance(count, int) and count > parameters:
            raise ConfigError(
                f"strategy.components: {count} slices of {parameters} parameters:"
                f' at most {parameters}, "layers" or "whole"'
            )

    def start(self, learner: Learner) -> None:
        super().start(learner)
        components = cut(learner.layout, self.config.components)
        self.parts = [
            (number, where)
            for number, slices in enumerate(components)
            for where in slices
        ]
        if self.config.filter:
            self.start_point = copy_of(learner.theta)
            self.delta = copy_of(learner.theta)
            self.delta *= 0.0
        if self.delay:
            self.snapshot = copy_of(learner.theta)
        longest = max(where.stop - where.start for _, where in self.parts)
        space = learner.theta if self.delay else learner.theta[:longest]
        self.inbox = [
            [copy_of(space) for _ in range(self.max_peers)]
            for _ in range(self.num_vectors if self.delay else 1)
        ]

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()
        self.steps += 1
        if self.steps == self.applies_at:
            self.apply(learner)
        if self.steps % self.config.period == 0:
            self.end_block(learner)
        return loss

    def end_block(self, learner: Learner) -> None:
        """Mix every component, or with `delay` start to.

        Communicates: pairwise inside the groups; blocking, or with `delay` not.
        """
        own = learner.theta
        if self.delay:
            self.snapshot[:] = own
            own = self.snapshot
        vectors = [own, self.start_point, self.delta][: self.num_vectors]
        self.exchanges = [
            (where, self.exchange(number, [vector[where] for vector in vectors]))
            for number, where in self.parts
        ]
        if self.delay:
            self.applies_at = self.steps + self.delay
            for where, exchange in self.exchanges:
                for n in range(self.num_vectors):
                    peers = self.inbox[n][: len(exchange.peers)]
                    exchange.receive(n, [buffer[where] for buffer in peers])
            return
        for where, exchange in self.exchanges:
            buffers = self.inbox[0][: len(exchange.peers)]
            for n, vector in enumerate(exchange.vectors):
                length = where.stop - where.start
                exchange.receive(n, [buffer[:length] for buffer in buffers])
                vector[:] = exchange.mean(n)  # (1), (2)
            self.filter_part(where, exchange.vectors[0])
        self.exchanges = []

    def exchange(self, component: int, vectors: list[Any]) -> Exchange:
        """Start sending a part to the group of its component in this block."""
        block, size = self.steps // self.config.period, self.comm.size
        group_size = min(self.config.group_size, size)
        groups = random_groups(self.config.seed, block, component, size, group_size)
        members = next(group for group in groups if self.comm.rank in group)
        for peer in members:
            if peer != self.comm.rank:
                self.partners[peer] += 1
                self.weights[peer] += 1.0 / len(members) / len(self.parts)
        tag = component % NUM_TAGS * len(VECTORS)
        return Exchange(self.comm, members, tag, vectors)

    def collect(self) -> None:
        """Wait for what is under way: wbar lies in the inbox, gbar in `start_point`."""
        for _, exchange in self.exchanges:
            exchange.mean(0)
            for n in range(1, self.num_vectors):
                exchange.vectors[n][:] = exchange.mean(n)
        self.exchanges = []

    def apply(self, learner: Learner) -> None:
        """Let the learner go on from g_i plus what it learned since the snapshot."""
        self.collect()
        self.applies_at = -1
        learner.theta -= self.snapshot
        for _, where in self.parts:
            self.filter_part(where, self.inbox[0][0][where])
        learner.theta += self.inbox[0][0]

    def filter_part(self, where: slice, wbar: Any) -> None:
        """Turn wbar of a part into its next start point; keep that in `start_point`."""
        config = self.config
        if not config.filter:
            self.synchronised(where, wbar)
            return
        start_point, delta = self.start_point[where], self.delta[where]
        nesterov = config.momentum == "nesterov"
        if self.eta == 0.0 and config.zeta == 1.0:  # no rounding is left of the filter
            start_point[:] = wbar
            self.synchronised(where, start_point)
            return
        settings = {"eta": self.eta, "zeta": config.zeta}
        for parts in chunked(wbar, start_point, delta):
            filter_(*parts, **settings, nesterov=nesterov)
        self.synchronised(where, start_point)
        for w, g, d in chunked(wbar, start_point, delta):
            if nesterov:
                w[:] = d
                w *= self.eta
                g += w  # (6)
            w[:] = g

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the mean over ranks of W_i into `out`; without the filter of theta.

        Communicates: collective, one Allreduce of 4P bytes, blocking; with `delay`
        it waits for what is under way.
        """
        config, nesterov = self.config, self.config.momentum == "nesterov"
        if not config.filter:
            out[:] = learner.theta
        elif self.applies_at > 0:  # received, not yet applied
            self.collect()
            out[:] = self.inbox[0][0]
            out -= self.start_point
            out *= config.zeta
            out += self.start_point
            if not nesterov:
                out += self.eta * self.delta
        else:
            out[:] = self.delta
            out *= -self.eta if nesterov else 0.0
            out += self.start_point
        self.mean_(out)

    def finish(self, learner: Learner) -> None:
        self.collect()

    def metrics(self) -> dict[str, Any]:
        rounds = self.steps // self.config.period
        return {
            "mixes": rounds,
            "partners": self.partners.copy(),
            "rounds": rounds,
            "weights": self.weights.copy(),
        }

    def state(self) -> dict[str, Any]:
        """Return the state; it waits for what is under way, on all ranks alike."""
        self.collect()
        state: dict[str, Any] = {
            "steps": self.steps,
            "applies_at": self.applies_at,
            "partners": self.partners.copy(),
            "weights": self.weights.copy(),
        }
        return state | {name: to_array(v) for name, v in self.vectors().items()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.applies_at = int(state["applies_at"])
        self.partners[:] = state["partners"]
        self.weights[:] = state["weights"]
        for name, vector in self.vectors().items():
            fill_(vector, state[name])

    def vectors(self) -> dict[str, Any]:
        """Return the vectors that a checkpoint holds, by name."""
        found: dict[str, Any] = {}
        if self.config.filter:
            found |= {"start_point": self.start_point, "delta": self.delta}
        if self.applies_at > 0:
            found |= {"snapshot": self.snapshot, "wbar": self.inbox[0][0]}
        return found
