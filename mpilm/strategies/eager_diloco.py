"""Blocks of local steps, an outer momentum, and the others' updates one block late.

Source      S. Kale et al., "Eager Updates For Overlapped Communication and Computation
            in DiLoCo", arXiv 2502.12996, 2025; DiLoCo: A. Douillard et al., arXiv
            2311.08105. The filter: block_momentum.py, with its equation numbers.
Notation    t       block;  K -> comm.size
            g_i     -> momentum.start_point, where rank i began the block, (P,)
            D_i(t)  -> own, what rank i learned in block t, (P,)
            D(t)    -> mean, the mean of all D_j(t), (P,)
Update      D_i(t) = theta_i - g_i                          at a block's end  (10)
            G_i    = D(t-1) + (D_i(t) - D_i(t-1)) / K                         (11)
            (3) to (7) with G_i for G;  theta_i <- g_i                        (12)
            In (11) a rank's own update is of this block and those of the others of the
            last: of the first block only D_i(0) / K is there.
Messages    one Allreduce of 4P bytes a block, under way during the whole next block.

            step step |=D_i(0)==> step step step <==D(0)=| (11) |=D_i(1)==> step ...
            In another wire format than float32 D_i(t) without `left` travels; `left`
            is learned in the next block.
Invariants  all is received at a fixed step: when messages arrive changes no bit.
            In the mean over ranks (9) holds, if (1 - 1/K) D_i of the last block, which
            is in no model yet, is added: nothing is lost.
Departs     written from a summary of others and from memory. The final model is
            the mean of the ranks' W, never the look-ahead; what the others learned in
            the last block is not in it. One rank has no outer step: it is `local`.
Cost        five extra copies of the model: g, Delta, own, mean, and what is sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import Layout
from mpilm.storage.saved import State
from mpilm.strategies.base import Learner, Strategy, UpdateWireConfig
from mpilm.strategies.block_momentum import ALL, BlockMomentum
from mpilm.vectors import copy_of, to_array
from mpilm.world.base import Request, World


@dataclass(frozen=True, kw_only=True)
class EagerDilocoConfig(UpdateWireConfig):
    """Section [strategy] of `eager_diloco`."""

    period: Annotated[int, Meta(ge=1)] = 30
    """minibatches in a block"""
    eta: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.2
    """outer momentum"""
    zeta: Annotated[float, Meta(gt=0.0)] = 0.8
    """outer learning rate"""
    momentum: Literal["classical", "nesterov"] = "nesterov"
    """where the next block starts: at the filtered model, or ahead of it"""


class EagerDiloco(Strategy):
    """Local steps in blocks, and an outer step that waits for nobody's last update.

    steps      minibatches so far
    moved      bytes of all reductions begun, each way
    momentum   the filter of this rank; None: there is one rank
    own        D_i of the last block, (P,); zero before
    mean       D of the last block, (P,), once it is received; zero before
    under_way  the reduction, until it is waited for
    left       (P,), what of the last own update is in no mean yet; None: nothing
    """

    name = "eager_diloco"
    Config = EagerDilocoConfig
    lasting = ("left", "mean", "momentum.delta", "momentum.start_point", "own", "steps")

    def __init__(self, world: World, config: EagerDilocoConfig) -> None:
        super().__init__(world, config)
        self.steps = self.moved = 0
        self.momentum: BlockMomentum | None = None
        self.own: Any = None
        self.mean: Any = None
        self.left: Any = None
        self.under_way: list[Request] = []
        self.saves = ("left", "mean", "moved", "own", "steps")
        if world.size > 1:
            self.saves += ("momentum.delta", "momentum.start_point")

    def start(self, learner: Learner) -> None:
        super().start(learner)
        if self.comm.size > 1:
            config, theta = self.config, learner.theta
            self.momentum = BlockMomentum(
                theta, eta=config.eta, zeta=config.zeta, momentum=config.momentum
            )
            self.own, self.mean = copy_of(theta), copy_of(theta)
            self.own[:] = 0.0
            self.mean[:] = 0.0
            if self.comm.exact is not self.comm:
                self.left = copy_of(self.own)

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()
        self.steps += 1
        if self.momentum is not None and self.steps % self.config.period == 0:
            self.end_block_(learner.theta, self.momentum)
        return loss

    def end_block_(self, theta: Any, momentum: BlockMomentum) -> None:
        """Apply (10) to (12); send what this block came to.

        Communicates: waits for the last block's Allreduce, and starts one of 4P bytes.
        """
        self.receive()
        update = theta - momentum.start_point  # (10)
        if self.left is not None:
            update += self.left
            self.left[:] = 0.0
        goal = update - self.own
        goal /= self.comm.size
        goal += self.mean  # (11)
        goal += momentum.start_point
        momentum.filter_(ALL, goal)
        theta[:] = momentum.start_point  # (12)
        self.own = update
        self.under_way = [self.comm.Iallreduce(self.own, self.mean)]
        self.moved += self.allreduced_bytes(len(theta))

    def receive(self) -> None:
        """Wait for the mean that is under way, if there is one."""
        while self.under_way:
            request = self.under_way.pop()
            request.Wait()
            self.mean /= self.comm.size
            if request.left is not None:
                self.own -= request.left
                self.left[:] = request.left
                self.left *= 1.0 - 1.0 / self.comm.size  # its K-th part is in g by (11)

    def finish(self, learner: Learner) -> None:
        self.receive()

    def state(self) -> State:
        """Return the state; it waits for what is under way, on all ranks alike."""
        self.receive()
        return super().state()

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the mean of all W into `out`.

        Communicates: collective, one Allreduce of 4P bytes, blocking.
        """
        self.receive()
        if self.momentum is None:
            out[:] = learner.theta
            return
        self.momentum.model_(out)
        self.mean_(out)

    def metrics(self) -> dict[str, Any]:
        return self.averages(self.steps // self.config.period)

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        return self.moved, self.moved

    def conserved(self, learner: Learner) -> Any:
        """Return (9), what was learned since, and what is in no model yet."""
        if self.momentum is None:
            return super().conserved(learner)
        theta, g, own = (
            np.asarray(to_array(vector), np.float64)
            for vector in (learner.theta, self.momentum.start_point, self.own)
        )
        late = (1.0 - 1.0 / self.comm.size) * own
        if self.left is not None:
            late += to_array(self.left)
        return self.momentum.conserved() + (theta - g) + late
