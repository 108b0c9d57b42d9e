"""The declared machine of the virtual world: what messages and computing cost.

Notation    L -> latency_s, B -> bandwidth_Bps of a link; n bytes; K ranks
            E -> enter_s; L', B' -> reduce_latency_s, reduce_Bps, else L, B
            R -> rendezvous_s, of messages longer than eager_bytes, else 0
Cost        message             L + R + n/B                                    (1)
            barrier             ceil(log2 K) (E + L)         (dissemination)   (2)
            broadcast           ceil(log2 K) (E + L + n/B)   (binomial tree)   (3)
            allreduce           ceil(log2 K) E, and the cheaper of
                     short      r (L' + n/B'), r = log2 K, or floor(log2 K) + 2
                                unless K is a power of two
                                                        (recursive doubling)   (4)
                     long       2 (K-1) L' + 2 (K-1)/K n/B'         (ring)     (5)

E is what our own software takes to find out that all have come; L' and B' are what a
reduction comes to, arithmetic included. `mpilm probe` measures them; without them a
reduction costs what its messages do. A link that rested lets burst_bytes pass in no
time (a token bucket). Where ranks of a node share its link, a group with one rank of
each node has it alone, and costs of its own (leader_...); and messages of all share it.
docs/virtual-world.md tells how costs, ports and links play together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

from msgspec import Meta

Time = Annotated[float, Meta(ge=0)]
Bandwidth = Annotated[float, Meta(gt=0)]


class Link(NamedTuple):
    """A way between two ranks."""

    latency_s: float
    bandwidth_Bps: float

    def after(self, fault: Link) -> Link:
        """Return the link with a fault: its latency more, at most its bandwidth.

        >>> Link(1.0, 10.0).after(Link(0.5, 4.0))
        Link(latency_s=1.5, bandwidth_Bps=4.0)
        """
        return Link(
            self.latency_s + fault.latency_s,
            min(self.bandwidth_Bps, fault.bandwidth_Bps),
        )


class Cost(NamedTuple):
    """Time of an operation; ports are busy for its second part only."""

    latency_s: float
    transfer_s: float

    @property
    def total_s(self) -> float:
        """Time from start to end."""
        return self.latency_s + self.transfer_s


class Collectives(NamedTuple):
    """What the collectives of a group cost.

    link      of barriers and broadcasts
    reduction of an allreduce: L', B'
    enter_s   E
    burst_s   time that burst_bytes take
    """

    link: Link
    reduction: Link
    enter_s: float = 0.0
    burst_s: float = 0.0

    def after(self, fault: Link) -> Collectives:
        """Return them over a link with a fault."""
        return self._replace(
            link=self.link.after(fault), reduction=self.reduction.after(fault)
        )


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Section [machine]: the machine that the virtual world plays.

    The figures are those of no particular machine (chosen, not tuned).
    """

    latency_s: Time = 10e-6
    """seconds before a message between two nodes begins to arrive"""
    bandwidth_Bps: Bandwidth = 5e9
    """bytes per second that a rank sends, and that it receives, between nodes"""
    ranks_per_node: Annotated[int, Meta(ge=1)] = 1
    """consecutive ranks that share a node"""
    node_latency_s: Time = 2e-6
    """the same latency inside a node, seconds"""
    node_bandwidth_Bps: Bandwidth = 20e9
    """the same bandwidth inside a node, bytes per second"""
    rendezvous_s: Time = 0.0
    """seconds that a message longer than eager_bytes takes more, between nodes"""
    burst_bytes: Annotated[int, Meta(ge=0)] = 0
    """bytes that pass at once after a pause, between nodes (a token bucket)"""
    enter_s: Time = 0.0
    """seconds of software in each round of entering a collective between nodes"""
    reduce_latency_s: Time = 0.0
    """latency of the rounds of an allreduce between nodes, seconds; 0: latency_s"""
    reduce_Bps: Annotated[float, Meta(ge=0)] = 0.0
    """bandwidth of an allreduce between nodes, bytes per second; 0: bandwidth_Bps"""
    leader_latency_s: Time = 0.0
    """latency_s of a group with one rank of each node, alone on its link"""
    leader_bandwidth_Bps: Annotated[float, Meta(ge=0)] = 0.0
    """bandwidth_Bps of such a group; 0: such groups cost what all others do. Above
    bandwidth_Bps: the ranks of a node share its link, bandwidth_Bps of it each"""
    leader_rendezvous_s: Time = 0.0
    """rendezvous_s of such a group"""
    leader_enter_s: Time = 0.0
    """enter_s of such a group"""
    leader_reduce_latency_s: Time = 0.0
    """reduce_latency_s of such a group; 0: leader_latency_s"""
    leader_reduce_Bps: Annotated[float, Meta(ge=0)] = 0.0
    """reduce_Bps of such a group; 0: leader_bandwidth_Bps"""
    node_rendezvous_s: Time = 0.0
    """rendezvous_s inside a node"""
    node_enter_s: Time = 0.0
    """enter_s of a group inside a node"""
    node_reduce_latency_s: Time = 0.0
    """reduce_latency_s inside a node; 0: node_latency_s"""
    node_reduce_Bps: Annotated[float, Meta(ge=0)] = 0.0
    """reduce_Bps inside a node; 0: node_bandwidth_Bps"""
    step_s: Time = 0.1
    """seconds that a rank computes for one minibatch"""
    update_s: Time = 0.0
    """seconds of the optimiser in a step, after the gradient"""
    mix_s: Time = 0.0
    """seconds in a step that the strategy itself computes: sums, copies, filters"""
    eval_s: Time = 0.0
    """seconds that a rank evaluates one sample (a token, a frame)"""
    jitter: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """steps and latencies are drawn from (1 - jitter, 1 + jitter) times their value"""
    eager_bytes: Annotated[int, Meta(ge=0)] = 65_536
    """a longer message is sent only once it is received, as MPI may have it"""

    def node(self, rank: int) -> int:
        """Return the node of a rank.

        >>> [Machine(ranks_per_node=2).node(rank) for rank in range(5)]
        [0, 0, 1, 1, 2]
        """
        return rank // self.ranks_per_node

    def link(self, *, same_node: bool, leaders: bool = False) -> Link:
        """Return the link between ranks of one node or of different ones.

        Args:
            leaders: of a group with one rank of each node.
        """
        if same_node:
            return Link(self.node_latency_s, self.node_bandwidth_Bps)
        if leaders and self.leader_bandwidth_Bps:
            return Link(self.leader_latency_s, self.leader_bandwidth_Bps)
        return Link(self.latency_s, self.bandwidth_Bps)

    def collectives(self, *, same_node: bool, leaders: bool = False) -> Collectives:
        """Return what collectives of one node or between nodes cost; args as of `link`.

        >>> Machine(latency_s=1.0, bandwidth_Bps=9.0, reduce_Bps=8.0).collectives(
        ...     same_node=False
        ... ).reduction
        Link(latency_s=1.0, bandwidth_Bps=8.0)
        """
        link = self.link(same_node=same_node, leaders=leaders)
        level = ""
        if same_node:
            level = "node_"
        elif leaders and self.leader_bandwidth_Bps:
            level = "leader_"
        latency_s, speed_Bps, enter_s = (
            getattr(self, level + key)
            for key in ("reduce_latency_s", "reduce_Bps", "enter_s")
        )
        reduction = Link(latency_s or link.latency_s, speed_Bps or link.bandwidth_Bps)
        burst_s = 0.0 if same_node else self.burst_bytes / reduction.bandwidth_Bps
        return Collectives(link, reduction, enter_s, burst_s)

    def message_link(
        self, msg_bytes: int, *, same_node: bool, leaders: bool = False
    ) -> Link:
        """Return the link of a message: R is part of its latency. Args as of `link`.

        Its bandwidth is that of a rank which sends alone.
        """
        link = self.link(same_node=same_node, leaders=leaders)
        if self.shares_link and not same_node:
            link = link._replace(bandwidth_Bps=self.leader_bandwidth_Bps)
        if msg_bytes <= self.eager_bytes:
            return link
        more_s = self.node_rendezvous_s if same_node else self.rendezvous_s
        if leaders and not same_node and self.leader_bandwidth_Bps:
            more_s = self.leader_rendezvous_s
        return link.after(Link(more_s, math.inf)) if more_s else link

    @property
    def shares_link(self) -> bool:
        """Whether a rank that sends alone has more than when all of its node do."""
        return (
            self.ranks_per_node > 1 and self.leader_bandwidth_Bps > self.bandwidth_Bps
        )

    def scaled(self, scale: float) -> Machine:
        """Return the machine on which messages `scale` times shorter take as long.

        >>> Machine(bandwidth_Bps=6.0).scaled(2.0).bandwidth_Bps
        3.0
        """
        return replace(
            self,
            bandwidth_Bps=self.bandwidth_Bps / scale,
            reduce_Bps=self.reduce_Bps / scale,
            node_bandwidth_Bps=self.node_bandwidth_Bps / scale,
            node_reduce_Bps=self.node_reduce_Bps / scale,
            leader_bandwidth_Bps=self.leader_bandwidth_Bps / scale,
            leader_reduce_Bps=self.leader_reduce_Bps / scale,
            burst_bytes=round(self.burst_bytes / scale),
            eager_bytes=int(self.eager_bytes / scale),
        )

    def spread(self, random: Callable[[], float]) -> float:
        """Return a factor of mean 1 drawn with `random` in [0, 1)."""
        if self.jitter == 0.0:
            return 1.0
        return 1.0 + self.jitter * (2.0 * random() - 1.0)


def message(link: Link, msg_bytes: int) -> Cost:
    """Return the cost (1) of one message.

    >>> message(Link(1e-6, 1e9), 1000).total_s
    2e-06
    """
    return Cost(link.latency_s, msg_bytes / link.bandwidth_Bps)


def barrier(how: Collectives, num_ranks: int) -> Cost:
    """Return the cost (2) of a barrier.

    >>> barrier(as_messages(Link(1.0, 1.0)), 5)
    Cost(latency_s=3.0, transfer_s=0.0)
    """
    return Cost(rounds_up(num_ranks) * (how.enter_s + how.link.latency_s), 0.0)


def broadcast(how: Collectives, num_ranks: int, msg_bytes: int) -> Cost:
    """Return the cost (3) of a broadcast.

    >>> broadcast(as_messages(Link(1.0, 10.0)), 8, 100)
    Cost(latency_s=3.0, transfer_s=30.0)
    """
    rounds = rounds_up(num_ranks)
    latency_s = how.enter_s + how.link.latency_s
    return Cost(rounds * latency_s, rounds * msg_bytes / how.link.bandwidth_Bps)


def allreduce(how: Collectives, num_ranks: int, msg_bytes: int) -> Cost:
    """Return the cost of an allreduce: of entering it, and the cheaper of (4) and (5).

    >>> allreduce(as_messages(Link(1.0, 10.0)), 4, 10)
    Cost(latency_s=2.0, transfer_s=2.0)
    >>> allreduce(as_messages(Link(1.0, 10.0)), 4, 1000)
    Cost(latency_s=6.0, transfer_s=150.0)
    """
    latency_s, speed_Bps = how.reduction
    entering_s = rounds_up(num_ranks) * how.enter_s
    transfer_s = msg_bytes / speed_Bps
    rounds, steps = rounds_of_doubling(num_ranks), 2 * (num_ranks - 1)
    doubling = Cost(entering_s + rounds * latency_s, rounds * transfer_s)
    ring = Cost(entering_s + steps * latency_s, steps / num_ranks * transfer_s)
    return min(doubling, ring, key=lambda cost: cost.latency_s + cost.transfer_s)


def as_messages(link: Link) -> Collectives:
    """Return collectives that cost what their messages do."""
    return Collectives(link, link)


def rounds_of_doubling(num_ranks: int) -> int:
    """Return r of (4).

    >>> [rounds_of_doubling(size) for size in (1, 2, 3, 4, 5)]
    [0, 1, 3, 2, 4]
    """
    whole = num_ranks.bit_length() - 1  # floor(log2 K)
    return whole if num_ranks == 1 << whole else whole + 2


def rounds_up(num_ranks: int) -> int:
    """Return ceil(log2 K).

    >>> [rounds_up(size) for size in (1, 2, 3, 4, 5)]
    [0, 1, 2, 2, 3]
    """
    return (num_ranks - 1).bit_length()
