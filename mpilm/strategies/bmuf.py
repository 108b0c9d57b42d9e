"""Blockwise model-update filtering (BMUF): model averaging with a block momentum.

Source      K. Chen and Q. Huo, "Scalable Training of Deep Learning Machines by
            Incremental Block Training with Intra-Block Parallel Optimization and
            Blockwise Model-Update Filtering", ICASSP 2016.
Notation    W(t)    -> momentum.model_(), the filtered model after block t, (P,)
            W_g(t)  -> momentum.start_point, what theta is set to after it, (P,)
            Delta   -> momentum.delta, filtered update of a block, (P,)
            eta     block momentum, 0 <= eta < 1; zeta: block learning rate, > 0
            tau     -> period, minibatches in a block;  K -> comm.size
Update      Wbar(t)  = (1/K) sum_i theta_i                                     (1)
            G(t)     = Wbar(t) - W_g(t-1)                                      (2)
            Delta(t) = eta Delta(t-1) + zeta G(t)                              (3)
            W(t)     = W(t-1) + Delta(t)             CBM                       (4)
                     = W_g(t-1) + zeta G(t)          NBM, the same             (5)
            W_g(t)   = W(t)                  classical block momentum, CBM     (6)
                     = W(t) + eta Delta(t)   Nesterov block momentum, NBM      (7)
            theta_i <- theta_i + (W_g(t) - s_i),  s_i = theta_i in (1)         (8)
            (8) comes `delay` steps after (1); with none it is theta_i <- W_g(t).
            (2) to (7) stand in block_momentum.py, (8) in blocks.py.
Messages    one Allreduce of 4P bytes every block, blocking, or with `delay` under way
            while the learner goes on; with `stagger` one for each slice of the C
            components, spread over the block, together as many bytes.

            all at once   step step step step |====P====|
            staggered     step |=c1=| step |=c2=| step |=c3=| step |=c0=|
            delay         step step step step |==P==> step step <==| (8) step step
            Of row tables only rows updated by somebody in the block (shared_rows.py).
            In another wire format than float32 what travels is the update:
                u_i = theta_i - W_g(t-1) + e_i                                 (13)
                e_i <- what of u_i did not travel                              (14)
            and Wbar(t) = W_g(t-1) + (1/K) sum_i (u_i - e_i). All ranks have the same
            W_g(t) then, too, and in 4 bits an update loses less than a model would.
Invariants  eta = 0, zeta = 1: `model_averaging`, to the bit; so is every warm-up.
            CBM on a constant drift v per block: Delta -> zeta v / (1 - eta).
            NBM: W_g follows torch's Nesterov SGD with momentum eta and rate zeta on -G
            (so AdamW inside and NBM outside is DiLoCo, arXiv 2311.08105).
Departs     the implementations disagree on (2) under NBM; here G is measured from the
            start point W_g, as the paper writes it. The final model is W(t), never the
            look-ahead. Warm-up of plain averages, staggering, delay and wire formats
            are additions.
Cost        two extra copies of the model: W_g and Delta; with `delay`, or in another
            wire format than float32, two more: s_i and the mean; in that, e_i as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, UpdateWireConfig
from mpilm.strategies.blocks import AUTOMATIC, BlockStrategy, check_blocks, due
from mpilm.strategies.leave_out import left_out_of
from mpilm.strategies.rows import ShardPart
from mpilm.strategies.shared_rows import require_resting_rows
from mpilm.vectors import to_array, zeros
from mpilm.world.base import IN_PLACE, World


@dataclass(frozen=True, kw_only=True)
class BmufConfig(UpdateWireConfig):
    """Section [strategy] of `bmuf`."""

    period: Annotated[int, Meta(ge=1)] = 10
    """minibatches in a block"""
    eta: Annotated[float, Meta(ge=-1.0, lt=1.0)] = AUTOMATIC
    """block momentum; -1: 1 - 1/ranks, which suits the learning rate of one rank"""
    zeta: Annotated[float, Meta(gt=0.0)] = 1.0
    """block learning rate"""
    momentum: Literal["classical", "nesterov"] = "nesterov"
    """where the next block starts: at the filtered model, or ahead of it"""
    warmup: Annotated[int, Meta(ge=0)] = 0
    """blocks of plain averaging before the filter begins"""
    stagger: bool = False
    """synchronise one component after another over the block, not all at its end"""

    delay: Annotated[int, Meta(ge=0)] = 0
    """steps that the learner computes on while a mean is under way; below period"""
    leave_out: Annotated[float, Meta(ge=0.0)] = 0.0
    """nats above the lowest loss of a rank that leave another out; 0: none is"""

    def __post_init__(self) -> None:
        check_blocks(self)


class Bmuf(BlockStrategy):
    """Model averaging with block momentum.

    share  ranks for each that is in the mean under way
    error  e_i, (P,); None: all travels
    """

    name = "bmuf"
    Config = BmufConfig
    takes_rows = True

    def __init__(self, world: World, config: BmufConfig) -> None:
        parts = "layers" if config.stagger else "whole"
        super().__init__(world, config, parts=parts, filtered=True)
        self.share = 1.0
        self.error: Any = None
        self.saves += ("rows.moved", "rows.touched")
        self.lasting += ("steps",)
        if self.must_part:
            self.saves += ("error",)
            self.lasting += ("error",)

    @property
    def copied(self) -> tuple[str, ...]:
        return () if self.error is None else ("error",)

    def automatic_eta(self, size: int) -> float:
        return 1.0 - 1.0 / size

    def require(self, learner: Learner) -> None:
        super().require(learner)
        require_resting_rows(self.name, learner)
        if learner.layout.tables and self.config.leave_out:
            raise ConfigError(
                "strategy.leave_out: takes whole models; with model.sparse = true it"
                " must be 0"
            )

    def start(self, learner: Learner) -> None:
        super().start(learner)
        if self.must_part:
            self.error = zeros(len(learner.theta), learner.theta)

    def ending(self) -> list[int]:
        config, count = self.config, len(self.components)
        return due(self.steps, config.period, count, config.stagger)

    @property
    def must_part(self) -> bool:
        return self.comm.exact is not self.comm

    def start_mean(self, number: int, where: slice) -> Any:
        """Start the mean of a part over all ranks; without `delay` nothing yet.

        Returns:
            the part; what of it travels, `wbar` itself where that is all, None where it
            goes in pieces; its request.

        Communicates: collective, with `delay` an Iallreduce of the part; not blocking.
            With `leave_out` before it an Allreduce of 8K bytes, blocking.
        """
        self.share, is_out = 1.0, False
        if self.leaving and self.comm.size > 1:
            is_out_K, moved = left_out_of(self.comm, self.leaving)
            self.moved += moved
            self.share = self.comm.size / int((~is_out_K).sum())
            is_out = bool(self.leaving.out_C[number])
            if is_out:
                self.snapshot[where] = 0.0
        part, vector = self.rows.agree(where), self.wbar[where]
        if part.rows and not self.apart:
            return part, None, None
        if part.rows:
            vector = part.of(self.snapshot)
        elif self.apart:
            vector[:] = self.snapshot[where]
        if self.error is not None:
            if not is_out:
                vector -= self.part_of(self.start_point, part, where)
            vector += self.part_of(self.error, part, where)  # (13)
        self.moved += self.allreduced_bytes(len(vector))
        request = self.comm.Iallreduce(IN_PLACE, vector) if self.delay else None
        return part, vector, request

    def end_mean(self, started: Any, where: slice) -> None:
        """Write the mean into `wbar`; what did not travel is the error.

        A row that does not travel counts as travelled at g, where all ranks have it.

        Communicates: collective; without `delay` one Allreduce of the part. Blocking.
        """
        part, vector, request = started
        if vector is None:
            self.average_pieces_(part)
            return
        left = None
        if request is not None:
            request.Wait()
            left = request.left
        elif self.comm.size > 1:
            left = self.comm.Allreduce(IN_PLACE, vector)
        vector /= self.comm.size
        if self.share != 1.0:
            vector *= self.share
        if left is not None:
            part.set_(self.error, left)  # (14)
            vector += self.part_of(self.start_point, part, where)
        if part.rows:
            sent = part.of(self.snapshot)
            for held in (self.snapshot, self.wbar) if self.apart else ():
                held[where] = self.start_point[where]
            if self.apart:
                part.set_(self.snapshot, sent)
            part.set_(self.wbar, vector)

    @property
    def start_point(self) -> Any:
        """W_g(t-1), (P,)."""
        assert self.momentum is not None
        return self.momentum.start_point

    @staticmethod
    def part_of(vector: Any, part: ShardPart, where: slice) -> Any:
        """Return what of a vector travels."""
        return part.of(vector) if part.rows else vector[where]

    def average_pieces_(self, part: ShardPart) -> None:
        """Write the mean of some rows into `wbar`, which is theta, piece by piece."""
        for piece in part.pieces():
            vector = piece.of(self.wbar)
            self.mean_(vector)
            piece.set_(self.wbar, vector)
            self.moved += self.allreduced_bytes(len(vector))

    def is_plain(self, step: int) -> bool:
        return step <= self.config.warmup * self.config.period

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write W(t) into `out`, what the last whole block came to.

        Communicates: with `delay` it waits for what is under way.
        """
        self.filtered_model_(learner, out)

    def conserved(self, learner: Learner) -> Any:
        found = super().conserved(learner)
        if found is not None and self.error is not None:
            found = found + to_array(self.error)
        return found

    def metrics(self) -> dict[str, Any]:
        out = {"left_out": self.leaving.num_rounds} if self.leaving else {}
        return self.averages(self.steps // self.config.period) | out

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        moved = self.moved + self.rows.moved
        return moved, moved
