"""Asynchronous SGD: a parameter server sharded over all ranks.

Source      J. Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012 (Downpour
            SGD); Q. Ho et al., "More Effective Distributed ML via a Stale Synchronous
            Parallel Parameter Server", NIPS 2013 (the bound); the baseline of T. Xiao
            et al., "Fast Parallel Training of Neural Language Models", IJCAI 2017.
Notation    x      -> server.values, on each rank a shard of the model
            w_hat  -> theta, the copy that the gradient is taken at, (P,)
            u      -> what is pushed, (P,)
            m      -> momentum;  s -> staleness_bound
Update      worker  w_hat <- x, when its clock is at most s ahead              (1)
                    g at w_hat;  u = lr * g                                    (2)
            server  v <- m v + u;  x <- x - v         on arrival of each u     (3)
Messages    8 bytes and 4P/K back for every other shard in (1), 4P/K there in (3).

            rank i: pull ...... | gradient | push, pull ......
            rank j:     serve ==>       serve    <== apply, serve ==>
Invariants  every push is applied once. Size 1 without momentum is `local`, to the bit.
            s >= 0: a rank begins step c when all others have finished step c - s.
Departs     from the papers in: all ranks are workers and servers; the learning rate is
            the worker's; `local_optimizer` pushes what the learner's own optimiser
            does, whatever it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from mpilm.learner.flat import copy_of, fill_, to_array
from mpilm.strategies.base import NUM_BINS, Learner, Strategy
from mpilm.strategies.parameter_server import ParameterServer
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class AsyncSgdConfig:
    """Section [strategy] of `async_sgd`."""

    staleness_bound: Annotated[int, Meta(ge=-1)] = -1
    """steps that a rank may be ahead of the slowest; -1: any number"""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """of the server's update"""
    local_optimizer: bool = False
    """push the steps of [optim] (with clipping) instead of lr times the gradient"""


class AsyncSgd(Strategy):
    """SGD on stale copies of one model that is spread over the ranks."""

    name = "async_sgd"
    Config = AsyncSgdConfig
    lockstep = False

    def __init__(self, world: World, config: AsyncSgdConfig) -> None:
        super().__init__(world, config)
        self.pace.moves_first = True
        self.server: ParameterServer | None = None
        self.clock = 0
        self.kept: Any = None  # w_hat, beside the learner's update of it

    def start(self, learner: Learner) -> None:
        super().start(learner)
        self.server = ParameterServer(
            self.world,
            self.comm,
            learner.layout,
            momentum=self.config.momentum,
            bound=self.config.staleness_bound,
        )
        self.server.load(learner.theta)

    @property
    def is_local(self) -> bool:
        """One rank without a server's momentum: the learner does it all."""
        return self.comm.size == 1 and not self.config.momentum

    def step(self, learner: Learner) -> Any:
        if self.is_local:
            loss = learner.gradient()
            learner.update()
            return loss
        server = self.started()
        server.begin()
        server.pull(learner.theta, self.clock)  # (1)
        loss = learner.gradient()
        server.push(self.pushed(learner))  # (2), (3)
        self.clock += 1
        return loss

    def pushed(self, learner: Learner) -> Any:
        """Return u: the learning rate times the gradient, or the local step."""
        if not self.config.local_optimizer:
            learner.grad *= learner.lr
            return learner.grad
        if self.kept is None:
            self.kept = copy_of(learner.theta)
        self.kept[:] = learner.theta
        learner.update()
        self.kept -= learner.theta
        return self.kept

    def retire(self, learner: Learner) -> None:
        """Tell all ranks not to wait for this one any more (`staleness_bound`)."""
        if not self.is_local:
            self.started().begin()  # a rank without a step serves as well
            self.started().retire(self.clock)

    def finish(self, learner: Learner) -> None:
        """Serve until nobody asks; theta is the model of the servers. Collective."""
        if self.is_local:
            return
        self.retire(learner)
        self.started().end()
        self.final_model_(learner, learner.theta)

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the shards of all ranks into `out`, (P,).

        Communicates: collective, a Bcast of every shard, 4P bytes, blocking.
        """
        if self.is_local:
            out[:] = learner.theta
            return
        server = self.started()
        out[server.own] = server.values
        for rank, shard in enumerate(server.shards):
            if shard.stop > shard.start:
                self.comm.Bcast(out[shard], root=rank)

    def started(self) -> ParameterServer:
        """Return the server; `start` made it."""
        assert self.server is not None, "start() comes before the first step"
        return self.server

    def metrics(self) -> dict[str, Any]:
        server = self.server
        size = self.comm.size
        partners = server.partners.copy() if server else np.zeros(size, np.int64)
        staleness = server.staleness.copy() if server else np.zeros(NUM_BINS, np.int64)
        return {
            "mixes": int(partners.sum()),
            "partners": partners,
            "staleness": staleness,
        }

    def state(self) -> dict[str, Any]:
        state = {"clock": self.clock, **self.metrics()}
        if not self.is_local:
            server = self.started()
            state["shard"] = to_array(server.values)
            if self.config.momentum:
                state["velocity"] = to_array(server.velocity)
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        server = self.started()
        self.clock = int(state["clock"])
        server.partners[:] = state["partners"]
        server.staleness[:] = state["staleness"]
        if not self.is_local:
            fill_(server.values, state["shard"])
            if self.config.momentum:
                fill_(server.velocity, state["velocity"])
