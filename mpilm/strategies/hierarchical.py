"""Hierarchical training: all-reduce inside a node, another strategy between nodes.

Source      W. Zhang et al., "A Highly Efficient Distributed Deep Learning System For
            Automatic Speech Recognition", Interspeech 2019 (H-ADPSGD).
Notation    node     ranks that share a machine, or `node_size` consecutive ones; its
                     first rank is the leader. m ranks each, N nodes: K = m N
            super-learner  a node, as the inner strategy sees it (`SuperLearner`)
Update      grad  <- (1/m) sum of grad over the node                           (1)
            theta <- one step of the inner strategy among the N leaders        (2)
            theta <- theta of the leader                     all of the node   (3)
Messages    inside a node, every step: the gradient's Iallreduce behind the backward
            pass, as in `allreduce`, and a Bcast of 4P bytes (3); a second one before
            the gradient, where the inner strategy changes theta there (`moves_first`).
            Between leaders: those of the inner strategy.

            leader   | gradient ....... | inner strategy | theta ==>
            others   | gradient ....... |                  theta <== | gradient
                           ==(1)==>
Invariants  after every step all ranks of a node hold the same theta.
            One node: `allreduce`, to the bit. node_size = 1: the inner strategy, to the
            bit. inner = allreduce: `allreduce`, to rounding.
Departs     from the paper, which says little more than the above: the optimiser runs on
            the leader only.
Lockstep    The ranks of a node are in lockstep whatever the inner strategy is: what
            decides if there is another step is asked of the leader (`agree`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from mpilm.convert import convert
from mpilm.errors import MpilmError
from mpilm.learner.flat import Layout
from mpilm.storage.merged import Merged
from mpilm.storage.saved import State, nested, under
from mpilm.strategies.allreduce import summed_bytes
from mpilm.strategies.base import ITEM_BYTES, Learner, Strategy
from mpilm.strategies.nodes import Nodes, Relay
from mpilm.strategies.registry import INNER, find
from mpilm.strategies.rest import bcast_rest
from mpilm.strategies.super_learner import SuperLearner
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig:
    """Section [strategy] of `hierarchical`; `wire` stands in `settings`."""

    inner: str = "adpsgd"
    """strategy between the leaders of the nodes"""
    node_size: Annotated[int, Meta(ge=0)] = 0
    """consecutive ranks that make a node; 0: those that share a machine"""
    bucket_bytes: Annotated[int, Meta(ge=1)] = 2_000_000
    """bytes of gradient reduced by one call inside a node"""
    settings: dict[str, Any] = field(default_factory=dict)
    """of the inner strategy: a table [strategy.settings]"""

    def __post_init__(self) -> None:
        find(self.inner, INNER, "strategy.inner")
        object.__setattr__(self, "settings", asdict(self.inner_config))

    @property
    def inner_config(self) -> Any:
        """The inner strategy's settings, checked."""
        kind = find(self.inner, INNER).Config
        return convert(kind, self.settings, "strategy.settings")


class Hierarchical(Strategy):
    """A strategy of nodes.

    nodes         how the ranks are cut into nodes
    node          the ranks of this node; rank 0 is its leader
    inner         the strategy between the leaders; None on other ranks
    steps         taken so far
    num_bcasts    broadcasts of theta in the node so far
    node_metrics  the leader's metrics when the final model was last made
    relay         shows the observer what the leader saw synchronised
    """

    name = "hierarchical"
    Config = HierarchicalConfig
    saves = ("nodes.node_of", "num_bcasts", "steps")

    def __init__(self, world: World, config: HierarchicalConfig) -> None:
        super().__init__(world, config)
        self.nodes = Nodes(self.comm, config.node_size)
        self.node = self.nodes.mine
        kind = find(config.inner, INNER)
        self.inner: Strategy | None = None
        if self.nodes.leaders is not None:
            inner_world = world.within(self.nodes.leaders)
            self.inner = kind(inner_world, config.inner_config)
        pace = self.comm.allgather(self.inner.pace if self.inner else None)[0]
        assert pace is not None, "rank 0 leads its node"
        self.pace = replace(pace, node=self.node)
        self.lockstep, self.synchronises = kind.lockstep, kind.synchronises
        self.steps = self.num_bcasts = 0
        self.node_metrics: dict[str, Any] = {}
        self.relay = Relay(self.node)

    def start(self, learner: Learner) -> None:
        bcast_rest(self.comm, learner)
        if self.inner is not None:
            self.inner.start(self.super_learner(learner))
        self.bcast_(learner.theta)

    def step(self, learner: Learner) -> Any:
        observed = self.on_synchronised is not None
        super_learner = self.super_learner(learner)
        if self.inner is None:
            loss = super_learner.gradient()  # (1)
        else:
            self.inner.on_synchronised = self.relay.note if observed else None
            loss = self.inner.step(super_learner)  # (1), (2)
        self.bcast_(learner.theta)  # (3)
        self.num_bcasts += 2 if self.pace.moves_first else 1
        if observed:
            self.relay.show_(learner.theta, self.synchronised)
        self.steps += 1
        return loss

    def super_learner(self, learner: Learner) -> Any:
        """Return the node as a learner; alone, the learner itself."""
        if self.node.size == 1:
            return learner
        return SuperLearner(
            learner,
            self.node,
            bucket_bytes=self.config.bucket_bytes,
            moves_first=self.pace.moves_first,
        )

    def bcast_(self, vector: Any) -> None:
        """Replace `vector` by the leader's.

        Communicates: collective in the node, one Bcast of the vector, blocking.
        """
        if self.node.size > 1:
            self.node.Bcast(vector, root=0)

    def retire(self, learner: Learner) -> None:
        if self.inner is not None:
            self.inner.retire(self.super_learner(learner))

    def finish(self, learner: Learner) -> None:
        if self.inner is not None:
            self.inner.finish(self.super_learner(learner))
        self.bcast_(learner.theta)
        self.num_bcasts += 1

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the final model of the inner strategy into `out`, (P,).

        Communicates: collective, what the inner strategy does among the leaders, and a
        Bcast of 4P bytes and the metrics in every node; blocking.
        """
        if self.inner is not None:
            self.inner.final_model_(self.super_learner(learner), out)
            self.node_metrics = self.inner.metrics()
        self.bcast_(out)
        self.node_metrics = self.node.allgather(self.node_metrics)[0]

    def moved_bytes(self, layout: Layout) -> tuple[int, int] | None:
        found = self.inner.moved_bytes(layout) if self.inner is not None else (0, 0)
        if found is None or self.node.size == 1:
            return found
        model = ITEM_BYTES * layout.size
        sums = self.steps * summed_bytes(layout, self.config.bucket_bytes, self.node)
        is_leader = self.inner is not None
        sent = found[0] + sums + self.num_bcasts * model * is_leader
        return sent, found[1] + sums + self.num_bcasts * model * (not is_leader)

    def conserved(self, learner: Learner) -> Any:
        """Return what the inner strategy conserves; other ranks have nothing."""
        if self.inner is None:
            return np.zeros(learner.layout.size)
        return self.inner.conserved(self.super_learner(learner))

    def require(self, learner: Learner) -> None:
        """Raise unless the nodes are equal, and the inner strategy can train them."""
        self.require_takes_rows(learner)
        self.nodes.require_equal()
        if self.inner is None:
            return
        try:
            self.inner.require(self.super_learner(learner))
        except MpilmError as error:
            name = f"{self.config.inner} between {self.nodes.num_nodes} nodes"
            raise type(error)(f"strategy hierarchical, {name}: {error}") from error

    # metrics and state
    def metrics(self) -> dict[str, Any]:
        """Return the counts of this rank; a leader has those of its node.

        A rank that is no leader mixes with nobody. Its `weights` and `rounds` are those
        of its node when the final model was last made.
        """
        if self.nodes.num_nodes == 1:
            return self.averages(self.steps)
        own = self.node_metrics if self.inner is None else self.inner.metrics()
        found = dict(own) if self.inner is not None else {}
        if "partners" in found:
            found["partners"] = self.nodes.counts_of_ranks(found["partners"])
        if "weights" in own:
            weights = self.nodes.weights_of_ranks(own["weights"], own["rounds"])
            found |= {"rounds": own["rounds"], "weights": weights}
        return found

    def state(self) -> State:
        state = super().state()
        return state | nested("inner", self.inner.state() if self.inner else {})

    def load_state(self, state: State) -> None:
        """Take up what `state` returned.

        Raises:
            CheckpointError: the nodes were others, or settings of the inner strategy.
        """
        self.nodes.require_same(state["nodes/node_of"])
        inner = under("inner", state)
        super().load_state({k: v for k, v in state.items() if "inner/" not in k})
        if self.inner is not None:
            self.inner.load_state(inner)

    def take_over(self, learner: Learner, merged: Merged) -> None:
        """Let the inner strategy go on from what the leaders of the nodes have left."""
        try:
            if self.inner is not None:
                nodes = int(np.max(merged.nearest["nodes/node_of"])) + 1
                inner = replace(merged.under("inner"), size=nodes, held={})
                self.inner.take_over(self.super_learner(learner), inner)
        finally:
            self.bcast_(learner.theta)
