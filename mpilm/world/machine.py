"""The declared machine of the virtual world: what messages and computing cost.

Notation    L -> latency_s, B -> bandwidth_Bps of a link; n bytes; K ranks
Cost        message             L + n/B                                        (1)
            barrier             ceil(log2 K) L               (dissemination)   (2)
            broadcast           ceil(log2 K) (L + n/B)       (binomial tree)   (3)
            allreduce, short    r (L + n/B), r = log2 K, or floor(log2 K) + 2
                                unless K is a power of two
                                                        (recursive doubling)   (4)
            allreduce, long     2 (K-1) L + 2 (K-1)/K n/B           (ring)     (5)

An allreduce takes the cheaper of (4) and (5). docs/virtual-world.md tells how costs
and ports play together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    step_s: Time = 0.1
    """seconds that a rank computes for one minibatch"""
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

    def link(self, *, same_node: bool) -> Link:
        """Return the link between ranks of one node or of different ones."""
        if same_node:
            return Link(self.node_latency_s, self.node_bandwidth_Bps)
        return Link(self.latency_s, self.bandwidth_Bps)

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


def barrier(link: Link, num_ranks: int) -> Cost:
    """Return the cost (2) of a barrier.

    >>> barrier(Link(1.0, 1.0), 5)
    Cost(latency_s=3.0, transfer_s=0.0)
    """
    return Cost(_rounds_up(num_ranks) * link.latency_s, 0.0)


def broadcast(link: Link, num_ranks: int, msg_bytes: int) -> Cost:
    """Return the cost (3) of a broadcast.

    >>> broadcast(Link(1.0, 10.0), 8, 100)
    Cost(latency_s=3.0, transfer_s=30.0)
    """
    rounds = _rounds_up(num_ranks)
    return Cost(rounds * link.latency_s, rounds * msg_bytes / link.bandwidth_Bps)


def allreduce(link: Link, num_ranks: int, msg_bytes: int) -> Cost:
    """Return the cost of an allreduce: the cheaper of (4) and (5).

    >>> allreduce(Link(1.0, 10.0), 4, 10)
    Cost(latency_s=2.0, transfer_s=2.0)
    >>> allreduce(Link(1.0, 10.0), 4, 1000)
    Cost(latency_s=6.0, transfer_s=150.0)
    """
    whole = num_ranks.bit_length() - 1  # floor(log2 K)
    rounds = whole if num_ranks == 1 << whole else whole + 2
    transfer_s = msg_bytes / link.bandwidth_Bps
    doubling = Cost(rounds * link.latency_s, rounds * transfer_s)
    steps = 2 * (num_ranks - 1)
    ring = Cost(steps * link.latency_s, steps / num_ranks * transfer_s)
    return min(doubling, ring, key=lambda cost: cost.latency_s + cost.transfer_s)


def _rounds_up(num_ranks: int) -> int:
    return (num_ranks - 1).bit_length()  # ceil(log2 K)
