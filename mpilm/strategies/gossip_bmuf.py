"""Random gossip BMUF: every component is averaged in its own small random group.

Source      Y. Huang et al., "A Random Gossip BMUF Process for Neural Language
            Modeling", ICASSP 2020, arXiv 1909.09010 (the abstract; see Departs).
Notation    c        component: a layer, or a slice; S -> the group of c in this block
            w_i      -> snapshot, model of rank i at the end of the block, (P,)
            g_i      -> momentum.start_point, where rank i began its block, (P,)
            Delta_i  -> momentum.delta, filtered update of rank i, (P,)
            k        -> group_size;  K -> comm.size
            eta, zeta, period, delay as in `bmuf`
Update      for every component, on every rank i of its group S:
            wbar    = (1/|S|) sum_(j in S) w_j;  gbar = (1/|S|) sum_(j in S) g_j   (1)
            G_i     = wbar - gbar                                              (2)
            Delta_i <- eta Delta_i + zeta G_i                                  (3)
            W_i     = gbar + Delta_i                  classical                (4)
                    = gbar + zeta G_i                 nesterov                 (5)
            g_i     <- W_i                            classical                (6)
                    <- W_i + eta Delta_i              nesterov                 (7)
            theta_i <- theta_i + (g_i - w_i)          `delay` steps after (1)  (8)
            (1) stands in mixing.py, (2) to (7) in block_momentum.py, (8) in blocks.py.
Messages    every rank knows the groups of every block and component: they are drawn
            from (seed, block, component). Members send each other w and g (Isend,
            Irecv): 8P (|S|-1) bytes sent per rank and block, and no global barrier.

            rank 0: step step |--c0 with 3--|--c1 with 2--| step step
            rank 1: step step |--c0 with 2--|--c1 with 3--| step step
            delay:  step step |=snapshot=> step step <=mean=| (8)
Invariants  k = K: `bmuf`, to rounding. Mixing preserves the mean of w and of g.
            A slow rank delays its partners of a block; with several components and
            messages too long to be sent eagerly also those who wait for its partners.
Departs     the abstract leaves open what a neighbourhood is (here: the ranks cut into
            groups of k), what is mixed (here: `mix`), the momentum and the final model
            (here: the mean of all W_i). Where K is no multiple of k the groups are
            ceil(K/k) of as equal sizes as can be, none larger than k; only k = 2 and an
            odd K make one group of 3, as one rank alone would not be mixed. The mean
            dilutes what a rank learned to groups/K on average, so the automatic eta is
            1 - groups/K: 1 - 1/k where K is a multiple of k. Of row tables two members
            average the rows that one of them has touched since its last block of this
            component (row_mixing.py): w, g and Delta of others stay, and are filtered.
Length      some 270 lines: four options (components, mix, delay, leave_out) and row
            tables meet in the mean of one part, which is one screen.
Cost        two extra copies of the model, and |S|-1 of its largest component to receive
            into; with `delay` one more for w and |S|-1 for every mixed vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, WireConfig
from mpilm.strategies.blocks import AUTOMATIC, BlockStrategy, check_blocks
from mpilm.strategies.leave_out import LOSS_BYTES, Losses
from mpilm.strategies.mixing import Mean
from mpilm.strategies.row_mixing import RowMean, agree_in_pairs
from mpilm.strategies.shared_rows import require_resting_rows
from mpilm.strategies.topology import num_groups, random_group
from mpilm.vectors import SparseVector, copy_of
from mpilm.world.base import World

VECTORS = {"models": 1, "starts": 2, "momenta": 3}
NUM_TAGS = 8191  # MPI promises tags up to 32,767; messages of one tag stay in order


@dataclass(frozen=True, kw_only=True)
class GossipBmufConfig(WireConfig):
    """Section [strategy] of `gossip_bmuf`."""

    period: Annotated[int, Meta(ge=1)] = 10
    """minibatches in a block"""
    group_size: Annotated[int, Meta(ge=2)] = 2
    """ranks that average a component with each other, at most (but see Departs)"""
    components: Literal["layers", "whole"] | Annotated[int, Meta(ge=1)] = "layers"
    """parts with groups of their own: layers, the whole model, or so many slices"""
    filter: bool = True
    """block momentum; without it plain gossip averaging"""
    eta: Annotated[float, Meta(ge=-1.0, lt=1.0)] = AUTOMATIC
    """block momentum; -1: 1 - groups/ranks, mostly 1 - 1/group_size"""
    zeta: Annotated[float, Meta(gt=0.0)] = 1.0
    """block learning rate"""
    momentum: Literal["classical", "nesterov"] = "nesterov"
    """where the next block starts: at the filtered model, or ahead of it"""
    mix: Literal["models", "starts", "momenta"] = "starts"
    """models only; also start points; also the filtered updates: more bytes each"""
    delay: Annotated[int, Meta(ge=0)] = 0
    """steps that the learner computes on while means are under way; below period"""
    seed: Annotated[int, Meta(ge=0)] = 1
    """of the random groups"""
    leave_out: Annotated[float, Meta(ge=0.0)] = 0.0
    """nats above the lowest loss in a group that leave another out; 0: none is"""

    def __post_init__(self) -> None:
        check_blocks(self)


@dataclass(frozen=True)
class Started:
    """The means of a part under way, of a component's number."""

    number: int
    means: list[Mean | RowMean]
    losses: Losses | None


class GossipBmuf(BlockStrategy):
    """Block momentum on means over small random groups, one for each component.

    inboxes   buffers to receive into: [vector][source], with `delay` (P,) each, else
              one list as long as the largest part
    partners  int64 (K,): parts that were averaged with each rank
    weights   float64 (K,): what its models weighed in this rank's, summed over blocks
    """

    name = "gossip_bmuf"
    takes_rows = True
    Config = GossipBmufConfig

    def __init__(self, world: World, config: GossipBmufConfig) -> None:
        size = world.size
        self.group_size = min(config.group_size, size)
        self.num_groups = num_groups(size, self.group_size)
        super().__init__(world, config, parts=config.components, filtered=config.filter)
        self.saves += ("partners", "weights")
        self.num_vectors = VECTORS[config.mix] if config.filter else 1
        self.partners = SparseVector(size, np.int64)
        self.weights = SparseVector(size, np.float64)
        self.inboxes: list[list[Any]] = []

    def automatic_eta(self, size: int) -> float:
        groups = num_groups(size, min(self.config.group_size, size))
        return 1.0 - groups / size

    def require(self, learner: Learner) -> None:
        super().require(learner)
        size, group_size = self.world.size, self.config.group_size
        if group_size > size > 1:
            raise ConfigError(
                f"strategy.group_size: groups of {group_size} cannot be made of {size}"
                f" ranks: at most {size}, or more ranks"
            )
        require_resting_rows(self.name, learner)
        if learner.layout.tables and self.config.leave_out:
            raise ConfigError(
                "strategy.leave_out: takes whole models; with model.sparse = true it"
                " must be 0"
            )
        count, parameters = self.config.components, learner.layout.size
        if isinstance(count, int) and learner.layout.tables:
            raise ConfigError(
                f"strategy.components = {count}: slices cut the rows of model.sparse ="
                ' true: take "layers" or "whole"'
            )
        if isinstance(count, int) and count > parameters:
            raise ConfigError(
                f"strategy.components: {count} slices of {parameters} parameters:"
                f' at most {parameters}, "layers" or "whole"'
            )

    def start(self, learner: Learner) -> None:
        super().start(learner)
        if learner.layout.tables:  # rows are received where they are needed
            self.saves += ("rows.moved", "rows.touched")
            return
        most = -(-self.comm.size // self.num_groups) - 1  # other members of a group
        if self.delay:
            count, space, buffers = self.num_vectors, learner.theta, [self.wbar]
        else:
            lengths = [w.stop - w.start for part in self.components for w in part]
            count, space, buffers = 1, learner.theta[: max(lengths)], []
        while len(buffers) < count * most:
            buffers.append(copy_of(space))
        self.inboxes = [buffers[n * most : (n + 1) * most] for n in range(count)]

    def start_mean(self, number: int, where: slice) -> Started:
        """Start the means over a component's group of the vectors that `mix` says.

        Communicates: pairwise inside the group, 4 bytes for each element and vector to
            each other member; not blocking. With row tables it waits for the members'
            bits, and only some rows travel.
        """
        vectors, momentum = [self.snapshot], self.momentum
        if momentum is not None:
            vectors += [momentum.start_point, momentum.delta][: self.num_vectors - 1]
        members = self.group(number)
        tag = number % NUM_TAGS * len(VECTORS)
        means: list[Mean | RowMean]
        if self.rows.touched is not None:
            pairs = agree_in_pairs(self.rows, where, members, tag)
            means = [
                RowMean(self.comm, vector, pairs, tag + n, piecewise=not self.delay)
                for n, vector in enumerate(vectors)
            ]
        else:
            whole = [
                Mean(self.comm, vector[where], members, tag=tag + n)
                for n, vector in enumerate(vectors)
            ]
            if self.delay:  # or MPI moves nothing while the learner computes
                for mean, inbox in zip(whole, self.inboxes, strict=True):
                    mean.receive([buffer[where] for buffer in inbox])
            means = [*whole]
        others = [member for member in members if member != self.comm.rank]
        losses = None
        if self.leaving:
            judged = NUM_TAGS * len(VECTORS) + number % NUM_TAGS
            losses = Losses(self.comm, self.leaving.loss, others, judged)
            self.moved += LOSS_BYTES * len(others)
        self.moved += sum(mean.num_bytes for mean in means)
        return Started(number, means, losses)

    def end_mean(self, started: Started, where: slice) -> None:
        """Write wbar (1); replace g and Delta by their means, as far as they are mixed.

        Communicates: waits for the other members. Blocking.
        """
        left_out: set[int] = set()
        if started.losses and self.leaving:
            left_out = started.losses.left_out(self.leaving)
            if self.comm.rank in left_out:
                self.leaving.out_C[started.number] = 1
        for n, mean in enumerate(started.means):
            if isinstance(mean, RowMean):
                if self.delay and n == 0:
                    self.wbar[where] = self.snapshot[where]
                mean.finish_(self.wbar if n == 0 else None)
                continue
            if not self.delay:
                buffers = self.inboxes[0]
                mean.receive([buffer[: len(mean.vector)] for buffer in buffers])
            # else over its own vector: w itself is theta, and so wbar, without `delay`
            out = self.wbar[where] if self.delay and n == 0 else None
            if left_out:
                mean.finish_without_(left_out, out)
            else:
                mean.finish_(out)
        others = started.means[0].sources
        num_parts = sum(map(len, self.components))
        self.partners[others] += 1
        self.weights[others] += 1.0 / (1 + len(others)) / num_parts

    def group(self, component: int) -> list[int]:
        """Return the ranks that average a component in the block that ends now."""
        block = self.steps // self.config.period
        return random_group(
            self.config.seed,
            block,
            component,
            self.comm.size,
            group_size=self.group_size,
            rank=self.comm.rank,
        )

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the mean over ranks of W_i into `out`; without the filter of theta.

        Communicates: collective, one Allreduce of 4P bytes, blocking; with `delay`
        it waits for what is under way.
        """
        self.filtered_model_(learner, out)
        self.mean_(out)

    @property
    def copied(self) -> tuple[str, ...]:
        return ("momentum.delta", "momentum.start_point") if self.filtered else ()

    @property
    def exchanged(self) -> Any:
        return self.partners.copy()

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        moved = self.moved + self.rows.moved
        return moved, moved

    def metrics(self) -> dict[str, Any]:
        rounds = self.steps // self.config.period
        return {
            "mixes": rounds,
            "partners": self.partners.copy(),
            "rounds": rounds,
            "weights": self.weights.copy(),
            **({"left_out": self.leaving.num_rounds} if self.leaving else {}),
        }
