"""Gossip SGD with periodic global averages (Gossip-PGA).

Source      Y. Chen et al., "Accelerating Gossip SGD with Periodic Global Averaging",
            ICML 2021, arXiv 2105.09080; topologies: mpilm/strategies/topology.py.
Notation    H   -> period, steps from one global average to the next
            W   mixing matrix of the step, (K, K): that of `dpsgd`
            g_i -> grad, gradient of rank i's minibatch at theta_i, (P,)
Update      theta_i <- theta_i - lr * P(g_i)                                   (1)
            theta_i <- (1/K) sum_j theta_j      in every H-th step             (2)
            theta_i <- sum_j W_ij theta_j       in all others                  (3)
Messages    (3): one model of 4P bytes to and from each neighbour; (2): one Allreduce of
            4P bytes. Both block.

            rank 0: step |=mix=| step |=mix=| step |==average==| step |=mix=|
            rank 1: step |=mix=| step |=mix=| step |==average==| step |=mix=|
Invariants  H = 1 is `model_averaging` with period 1, to the bit.
            (2) and (3) preserve the mean of all models; after (2) all ranks are equal.
            The topology's rounds are counted without (2): the exponential graph keeps
            its cycle, whatever H.
Departs     the period is fixed: the adaptive one (Gossip-AGA) is not here. From memory:
            no text could be had.
Cost        one extra copy of the model for one neighbour, two for more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, WireConfig
from mpilm.strategies.dpsgd import Dpsgd
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class GossipPgaConfig(WireConfig):
    """Section [strategy] of `gossip_pga`."""

    period: Annotated[int, Meta(ge=1)] = 6
    """steps from one global average to the next"""
    topology: Literal["fixed_ring", "random_ring", "exponential", "random_pairs"] = (
        "exponential"
    )
    """who averages with whom in the other steps"""
    seed: Annotated[int, Meta(ge=0)] = 0
    """of the random topologies"""


class GossipPga(Dpsgd):
    """Gossip after every step, and now and then the mean of all.

    steps         minibatches so far
    num_averages  global averages so far: `steps` is `round` and these
    """

    name = "gossip_pga"
    Config = GossipPgaConfig
    synchronises = True
    takes_rows = False
    saves = (*Dpsgd.saves, "num_averages", "steps")

    def __init__(self, world: World, config: GossipPgaConfig) -> None:
        super().__init__(world, config)
        self.steps = self.num_averages = 0

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()  # (1)
        self.steps += 1
        if self.steps % self.config.period == 0:
            self.mean_(learner.theta)  # (2)
            self.num_averages += 1
            self.synchronised(slice(0, learner.layout.size), learner.theta)
        else:
            self.finish_mean(self.start_mean(learner.theta))  # (3)
        return loss

    def metrics(self) -> dict[str, Any]:
        """Return the counts of (2) and (3) together."""
        gossip, averages = super().metrics(), self.averages(self.num_averages)
        return {key: value + averages[key] for key, value in gossip.items()}

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        averaged = self.num_averages * self.allreduced_bytes(layout.size)
        sent, received = super().moved_bytes(layout)
        return sent + averaged, received + averaged
