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

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from mpilm.convert import convert, unknown
from mpilm.errors import CheckpointError, ConfigError, MpilmError
from mpilm.learner.flat import copy_of
from mpilm.strategies.adpsgd import Adpsgd
from mpilm.strategies.allreduce import Allreduce, OverlappedSum
from mpilm.strategies.async_sgd import AsyncSgd
from mpilm.strategies.base import Learner, Strategy
from mpilm.strategies.bmuf import Bmuf
from mpilm.strategies.delay_by_one import DelayByOne
from mpilm.strategies.dpsgd import Dpsgd
from mpilm.strategies.gossip_bmuf import GossipBmuf
from mpilm.strategies.model_averaging import ModelAveraging
from mpilm.world.base import Comm, World

INNER: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        Allreduce,
        ModelAveraging,
        Bmuf,
        GossipBmuf,
        Dpsgd,
        DelayByOne,
        Adpsgd,
        AsyncSgd,
    )
}
PREFIX = "inner/"  # of the inner strategy's state


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig:
    """Section [strategy] of `hierarchical`."""

    inner: str = "adpsgd"
    """strategy between the leaders of the nodes"""
    node_size: Annotated[int, Meta(ge=0)] = 0
    """consecutive ranks that make a node; 0: those that share a machine"""
    bucket_bytes: Annotated[int, Meta(ge=1)] = 2_000_000
    """bytes of gradient reduced by one call inside a node"""
    settings: dict[str, Any] = field(default_factory=dict)
    """of the inner strategy: a table [strategy.settings]"""

    def __post_init__(self) -> None:
        if self.inner not in INNER:
            problem = unknown("name", self.inner, INNER)
            raise ConfigError(f"strategy.inner: {problem}")
        object.__setattr__(self, "settings", asdict(self.inner_config))

    @property
    def inner_config(self) -> Any:
        """The inner strategy's settings, checked."""
        kind = INNER[self.inner].Config
        return convert(kind, self.settings, "strategy.settings")


class Hierarchical(Strategy):
    """A strategy of nodes.

    node     the ranks of this node; rank 0 is its leader
    leaders  the leaders of all nodes; None on other ranks
    node_of  number of the node of every rank
    inner    the strategy between the leaders; None on other ranks
    heard    the leader's metrics, as its node last heard of them
    """

    name = "hierarchical"
    Config = HierarchicalConfig

    def __init__(self, world: World, config: HierarchicalConfig) -> None:
        super().__init__(world, config)
        kind, comm = INNER[config.inner], self.comm
        self.node = cut(comm, config.node_size)
        self.leaders = comm.Split(0 if self.node.rank == 0 else None, comm.rank)
        leader = self.node.allgather(comm.rank)[0]
        leader_of = comm.allgather(leader)
        order = sorted(set(leader_of))
        self.node_of = [order.index(leader) for leader in leader_of]
        self.inner: Strategy | None = None
        if self.leaders is not None:
            self.inner = kind(world.within(self.leaders), config.inner_config)
        facts = self.inner.pace if self.inner else None
        told = comm.allgather(facts)[0]  # rank 0 leads its node
        assert told is not None
        self.pace = replace(told, node=self.node)
        self.lockstep, self.synchronises = kind.lockstep, kind.synchronises
        self.steps = 0
        self.heard: dict[str, Any] = {}
        self.parts: list[slice] = []  # synchronised in this step, for `ema`
        self.seen: Any = None  # their values, (P,)
        self.number = np.zeros(1, np.int64)

    def require(self, learner: Learner) -> None:
        """Raise unless all nodes have as many ranks, and the inner strategy can train.

        Raises:
            ConfigError, WorldError: one line with the remedy.
        """
        size, sizes = len(self.node_of), np.bincount(self.node_of)
        wish = self.config.node_size
        if sizes.min() != sizes.max() or (wish > size > 1):
            whole = " or ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            problem = f"{size} ranks make no whole nodes of {wish}"
            if not wish:
                found = ", ".join(map(str, sizes))
                problem = f"the machines have different numbers of ranks ({found})"
            raise ConfigError(
                f"strategy.node_size: {problem}; nodes of {whole} would do, or as many"
                " ranks on each machine"
            )
        if self.inner is None:
            return
        try:
            self.inner.require(self.super_learner(learner))
        except MpilmError as error:
            name = f"{self.config.inner} between {len(sizes)} nodes"
            raise type(error)(f"strategy hierarchical, {name}: {error}") from error

    def start(self, learner: Learner) -> None:
        if self.inner is not None:
            self.inner.start(self.super_learner(learner))
        self.bcast_(learner.theta)

    def step(self, learner: Learner) -> Any:
        observed = self.on_synchronised is not None
        if observed and self.seen is None:
            self.seen = copy_of(learner.theta)
        super_learner = self.super_learner(learner)
        if self.inner is None:
            loss = super_learner.gradient()  # (1)
        else:
            self.inner.on_synchronised = self.note if observed else None
            loss = self.inner.step(super_learner)  # (1), (2)
        self.bcast_(learner.theta)  # (3)
        if observed:
            self.show()
        self.steps += 1
        return loss

    def super_learner(self, learner: Learner) -> Any:
        """Return the node as a learner; alone, the learner itself."""
        if self.node.size == 1:
            return learner
        return SuperLearner(self, learner)

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

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the final model of the inner strategy into `out`, (P,).

        Communicates: collective, what the inner strategy does among the leaders, and a
        Bcast of 4P bytes and the metrics in every node; blocking.
        """
        if self.inner is not None:
            self.inner.final_model_(self.super_learner(learner), out)
            self.heard = self.inner.metrics()
        self.bcast_(out)
        self.heard = self.node.allgather(self.heard)[0]

    # for the observer
    def note(self, where: slice, model: Any) -> None:
        """Keep a part of the model that the leaders have just synchronised."""
        self.parts.append(where)
        self.seen[where] = model

    def show(self) -> None:
        """Show the observer on every rank of the node what the leader has noted.

        Communicates: collective in the node, a Bcast of 8 bytes and, if there is
        anything, of 16 bytes a part and of the parts; blocking.
        """
        self.number[0] = len(self.parts)
        self.bcast_(self.number)
        ends = np.zeros(2 * int(self.number[0]), np.int64)
        if len(ends) == 0:
            return
        if self.parts:
            ends[:] = [end for part in self.parts for end in (part.start, part.stop)]
        self.bcast_(ends)
        for start, stop in ends.reshape(-1, 2).tolist():
            self.bcast_(self.seen[start:stop])
            self.synchronised(slice(start, stop), self.seen[start:stop])
        self.parts.clear()

    # metrics and state
    def metrics(self) -> dict[str, Any]:
        """Return the counts of this rank; a leader has those of its node.

        A rank that is no leader mixes with nobody. Its `shares` and `rounds` are those
        of its node when the final model was last made.
        """
        if max(self.node_of) == 0:
            return self.averages(self.steps)
        own = self.heard if self.inner is None else self.inner.metrics()
        found = dict(own) if self.inner is not None else {}
        if "partners" in found:
            found["partners"] = self.of_leaders(found["partners"])
        if "weights" in own:
            found |= {"rounds": own["rounds"], "weights": self.of_ranks(own)}
        return found

    def of_leaders(self, counts: Any) -> Any:
        """Return counts of leaders as counts of all ranks, int64 (K,)."""
        spread = np.zeros(len(self.node_of), np.int64)
        for number, count in enumerate(counts):
            spread[self.node_of.index(number)] = count
        return spread

    def of_ranks(self, own: dict[str, Any]) -> Any:
        """Return the shares that ranks had: each 1/m of its node's, float64 (K,)."""
        shares = np.array(own["weights"], np.float64)
        mine = self.node_of[self.comm.rank]
        shares[mine] = own["rounds"] - shares.sum()  # the node's own, on the diagonal
        spread = shares[self.node_of] / self.node.size
        spread[self.comm.rank] = 0.0
        return spread

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"steps": self.steps, "node_of": np.array(self.node_of)}
        if self.inner is not None:
            state |= {PREFIX + k: v for k, v in self.inner.state().items()}
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned.

        Raises:
            CheckpointError: the nodes were others.
        """
        if state["node_of"].tolist() != self.node_of:
            sizes = np.bincount(state["node_of"])
            raise CheckpointError(
                f"the checkpoint was made with {len(sizes)} nodes of {sizes[0]} ranks:"
                f" set strategy.node_size = {sizes[0]}"
            )
        self.steps = int(state["steps"])
        if self.inner is not None:
            own = {
                name.removeprefix(PREFIX): value
                for name, value in state.items()
                if name.startswith(PREFIX)
            }
            self.inner.load_state(own)


class SuperLearner:
    """A node as one learner: the leader's model, the mean gradient of all its ranks.

    On the other ranks it takes part in `gradient`, and nothing else.
    """

    def __init__(self, strategy: Hierarchical, learner: Learner) -> None:
        self.strategy, self.learner = strategy, learner
        self.theta, self.grad = learner.theta, learner.grad
        self.layout = learner.layout

    @property
    def samples(self) -> int:
        """Samples that the leader has processed."""
        return self.learner.samples

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.learner.lr

    def gradient(
        self, ready: Callable[[slice], None] | None = None, *, scale: float = 1.0
    ) -> Any:
        """Set `grad` to `scale` times the node's mean; return the own mean loss (1).

        Communicates: collective in the node, as `allreduce`; a Bcast of 4P bytes before
        it if the inner strategy has moved theta; blocking.
        """
        strategy, learner = self.strategy, self.learner
        node, config = strategy.node, strategy.config
        if strategy.pace.moves_first:
            strategy.bcast_(learner.theta)
        reduction = OverlappedSum(node, learner, config.bucket_bytes)
        share = 1.0 / node.size
        loss = learner.gradient(ready=reduction.segment_is_ready, scale=share)
        reduction.finish()
        if scale != 1.0:
            learner.grad *= scale
        if ready is not None:
            for segment in reversed(self.layout.segments):
                ready(segment.slice)
        return loss

    def update(self) -> None:
        """Take one step of the leader's optimiser."""
        self.learner.update()

    def moments(self) -> dict[str, Any]:
        """Return the leader's moment vectors."""
        return self.learner.moments()


def cut(comm: Comm, node_size: int) -> Comm:
    """Return the ranks of my node; see `HierarchicalConfig.node_size`. Collective."""
    if node_size == 0:
        return comm.Split_node()
    found = comm.Split(comm.rank // node_size, comm.rank)
    assert found is not None
    return found
