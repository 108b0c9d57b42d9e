"""DivShare: fragments of the model to random ranks, asynchronously.

Source      S. Biswas et al., "Boosting Asynchronous Decentralized Learning with Model
            Fragmentation", WWW 2025, arXiv 2410.12918.
Notation    x_i -> theta, the model of rank i, (P,), cut into F -> fragments
            H   -> period, steps in a round;  J -> copies
Update      x_i    <- x_i - lr * P(g_i)                      every minibatch    (1)
            x_i[f] <- mean of x_i[f] and what came of f      a round's end      (2)
            queue  <- each f for J random other ranks, in random order          (3)
            (2) stands in fragments.py; what is left of the queue of the last round is
            dropped in (3): a slow link sends fewer fragments, and newer ones.
Messages    4 P J bytes a round at most, in F J messages, each acknowledged by 1 byte.

            rank i learner  | gradient |(1)| gradient |(1)(2)(3)| gradient |(1)| ...
                   service  ==x[f]==> .. ==x[f']==> ..          (of the new queue)
Invariants  (2) is a mean of models: with lr = 0 no number leaves the range that it has
            over the ranks. The sum over ranks is not conserved: who receives moves, who
            sends does not. Nobody waits for anybody.
Departs     from memory and summaries of others, beyond the abstract. All that has come
            counts, also twice from one rank, where the paper's inbox may keep the last
            one only. A fragment is read when it is sent, not when the round ends: it is
            never older than the network needs. Acknowledged, so that a checkpoint finds
            nothing in flight. Fragments are slices of the flat vector.
Cost        a copy of the model (the sums), two fragments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy, WireConfig
from mpilm.strategies.fragments import Fragments
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class DivshareConfig(WireConfig):
    """Section [strategy] of `divshare`."""

    period: Annotated[int, Meta(ge=1)] = 1
    """minibatches in a round"""
    fragments: Annotated[int, Meta(ge=1)] = 10
    """parts of a model, each of which goes its own way; at most its parameters"""
    copies: Annotated[int, Meta(ge=1)] = 1
    """ranks that a fragment goes to in a round; at most all others"""
    seed: Annotated[int, Meta(ge=0)] = 0
    """of the ranks and of the order"""


class Divshare(Strategy):
    """Wait-free SGD; fragments of the model go to random ranks in the background.

    steps     minibatches so far
    partners  int64 (K,), fragments of each rank that were mixed in
    weights   float64 (K,), as `metrics` has them
    """

    name = "divshare"
    Config = DivshareConfig
    lockstep = False
    saves = ("partners", "service.received", "service.sent", "steps", "weights")
    service: Fragments

    def __init__(self, world: World, config: DivshareConfig) -> None:
        super().__init__(world, config)
        self.steps = 0
        self.partners = np.zeros(self.comm.size, np.int64)
        self.weights = np.zeros(self.comm.size)

    def start(self, learner: Learner) -> None:
        super().start(learner)
        num_fragments = min(self.config.fragments, learner.layout.size)
        self.service = Fragments(
            self.world, self.comm, learner.theta, fragments=num_fragments
        )

    def step(self, learner: Learner) -> Any:
        self.service.begin()  # alone it does nothing
        loss = learner.gradient()
        with self.service.lock:
            learner.update()  # (1)
            self.steps += 1
            if self.comm.size > 1 and self.steps % self.config.period == 0:
                self.mix_()  # (2)
                self.service.queue = self.drawn(self.steps // self.config.period)  # (3)
        return loss

    def mix_(self) -> None:
        """Apply (2). Under the lock."""
        self.partners += self.service.counts.sum(axis=0)
        self.weights += self.service.mix_()

    def drawn(self, round_: int) -> list[tuple[int, int]]:
        """Return a queue of (fragment, rank), as (3) draws it."""
        config, rank = self.config, self.comm.rank
        draw = np.random.default_rng([config.seed, rank, round_])
        others = np.delete(np.arange(self.comm.size), rank)
        copies = min(config.copies, len(others))
        pairs = [
            (number, int(peer))
            for number in range(len(self.service.slices))
            for peer in draw.choice(others, copies, replace=False)
        ]
        return [pairs[place] for place in draw.permutation(len(pairs))]

    def finish(self, learner: Learner) -> None:
        """Send no more, but receive until nobody sends; mix what has come.

        Communicates: collective, one barrier, blocking.
        """
        super().finish(learner)
        if self.comm.size > 1 and self.service.counts.any():
            self.mix_()

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        return self.service.sent, self.service.received

    def conserved(self, learner: Learner) -> Any:
        """Return nothing: see the header's invariants."""
        return None

    def metrics(self) -> dict[str, Any]:
        return {
            "mixes": int(self.partners.sum()),
            "partners": self.partners.copy(),
            "rounds": self.steps // self.config.period,
            "weights": self.weights.copy(),
        }
