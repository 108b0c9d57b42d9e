"""Asynchronous SGD: a parameter server sharded over ranks.

Source      J. Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012 (Downpour
            SGD); Q. Ho et al., "More Effective Distributed ML via a Stale Synchronous
            Parallel Parameter Server", NIPS 2013 (the bound); the baseline of T. Xiao
            et al., "Fast Parallel Training of Neural Language Models", IJCAI 2017.
Notation    x      -> service.values, on each rank a shard of the model
            w_hat  -> theta, the copy that the gradient is taken at, (P,)
            u      -> what is pushed, (P,)
            m      -> momentum;  s -> staleness_bound
            P      the optimiser of [optim], its moments this rank's own; plain SGD: g
Update      worker  w_hat <- x, when its clock is at most s ahead              (1)
                    g at w_hat;  u = lr * P(g)                       pushed.py (2)
            server  v <- m v + u;  x <- x - v         on arrival of each u     (3)
            ahead   others' shards of step t + 1 are pulled before the gradient of step
                    t:  w_hat <- x of then - the own u of t                (4)
Messages    8 bytes and 4P/S back for every other shard in (1), 4P/S there in (3).
            S servers: three messages for each of S K pairs a step.

            Of row tables only the rows that the minibatch reads: row_server.py. Of
            hidden matrices all is pulled, and pushed what units.py chooses.

            rank i: pull ...... | gradient | push, pull ......
            rank j:     serve ==>       serve    <== apply, serve ==>
            In another wire format than float32 u + e is pushed to the other ranks, and
            e is what of it did not travel.
Invariants  every push is applied once. Size 1 without momentum is `local`, to the bit.
            s >= 0: a rank begins step c when all others have finished step c - s.
Departs     from the papers in: all ranks are workers and servers; the learning rate is
            the worker's; so is the optimiser, where there is more to it than lr * g:
            momentum, clipping, weight decay, AdamW, ...
Length      some 310 lines: row tables, units, other numbers of ranks and what is
            conserved take a method each beside (1) to (3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.storage.merged import Merged
from mpilm.strategies.base import ITEM_BYTES, Learner, Strategy, WireConfig
from mpilm.strategies.parameter_server import ParameterServer
from mpilm.strategies.pushed import Pushed
from mpilm.strategies.row_server import RowServer
from mpilm.strategies.rows import from_shards, num_servers, shards_of
from mpilm.strategies.shared_rows import require_resting_rows
from mpilm.strategies.units import Units, unit_matrices
from mpilm.vectors import copy_of, fill_, to_array
from mpilm.world.base import World


@dataclass(frozen=True, kw_only=True)
class AsyncSgdConfig(WireConfig):
    """Section [strategy] of `async_sgd`."""

    staleness_bound: Annotated[int, Meta(ge=-1)] = -1
    """steps that a rank may be ahead of the slowest; -1: any number"""
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """of the server's update, beside that of [optim]"""
    servers: Annotated[int, Meta(ge=0)] = 0
    """ranks that hold a shard; 0: of more than 4, as many as have `shard_bytes`"""
    shard_bytes: Annotated[int, Meta(ge=1)] = 131_072
    """least bytes of a shard unless `servers` is set, of more than 4 ranks"""
    ahead: bool = False
    """the next model is pulled beside the gradient, and lacks others' pushes since"""
    units: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """share of a hidden matrix's units that is pushed: those with the largest step"""
    units_random: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """share of units pushed beside them, drawn anew in every step"""
    unsent: Literal["dropped", "kept"] = "dropped"
    """the other units' steps: dropped, or kept and added to the next"""

    def __post_init__(self) -> None:
        if self.units + self.units_random > 1.0:
            raise ValueError(
                f"units + units_random = {self.units + self.units_random:g}: at most 1"
            )


ROW_SAVES = ("service.sent", "service.received")


class AsyncSgd(Strategy):
    """SGD on stale copies of one model that is spread over the ranks."""

    name = "async_sgd"
    Config = AsyncSgdConfig
    survives = True
    lockstep = False
    takes_rows = True
    saves: tuple[str, ...] = (
        "clock",
        "service.values",
        "service.velocity",
        "service.error",
        "service.partners",
        "service.staleness",
        "service.num_pulls",
        "service.num_served",
        "service.num_ends",
    )
    service: ParameterServer

    def __init__(self, world: World, config: AsyncSgdConfig) -> None:
        super().__init__(world, config)
        self.pace.moves_first = True
        self.clock = 0
        self.own_steps = Pushed()
        self.read: Any = None  # (P,), the next model, with `ahead`
        self.last: Any = None  # (P,), u of the last push, with `ahead`
        self.units: Units | None = None  # all are pushed

    def start(self, learner: Learner) -> None:
        super().start(learner)
        config, layout = self.config, learner.layout
        place = (self.world, self.comm, layout)
        settings: dict[str, Any] = {
            "momentum": config.momentum,
            "bound": config.staleness_bound,
            "servers": self.num_servers(layout, self.comm.size),
        }
        if config.units < 1.0:
            self.units = Units(layout, config, self.comm.rank, like=learner.grad)
            if self.units.kept is not None:
                self.saves = (*self.saves, "units.kept")
        if layout.tables or self.units:
            self.saves = (*self.saves, *ROW_SAVES)
            units = self.units.matrices if self.units else ()
            self.service = RowServer(*place, **settings, units=units)
        else:
            self.service = ParameterServer(*place, **settings)
        if not self.is_local:
            self.service.load(learner.theta)
        if config.ahead:
            self.read, self.last = copy_of(learner.theta), copy_of(learner.theta)

    def num_servers(self, layout: Layout, size: int) -> int:
        """Return how many of `size` ranks hold a shard."""
        config, num_bytes = self.config, ITEM_BYTES * layout.size
        return config.servers or num_servers(size, num_bytes, config.shard_bytes)

    @property
    def is_local(self) -> bool:
        """One rank without a server's momentum: the learner does it all."""
        return self.comm.size == 1 and not self.config.momentum

    def step(self, learner: Learner) -> Any:
        if self.is_local:
            loss = learner.gradient()
            learner.update()
            return loss
        service = self.service
        service.begin()
        if isinstance(service, RowServer):
            return self.step_of_rows(service, learner)
        if service.asked:
            service.take(learner.theta, self.read, self.last)  # (1), (4)
        else:
            service.pull(learner.theta, self.clock)  # (1)
        if not self.config.ahead:
            loss = learner.gradient()
            service.push(self.pushed(learner))  # (2), (3)
        else:
            service.ask(self.read, self.clock + 1)
            loss = learner.gradient()
            u = self.pushed(learner)
            service.settle()  # the push before has been beside the gradient, too
            self.last[:] = u
            service.push(self.last)
        self.clock += 1
        return loss

    def step_of_rows(self, service: RowServer, learner: Learner) -> Any:
        """Take a step that moves only the rows that it reads, or the chosen units."""
        ids = {}
        if learner.layout.tables:
            ids = {name: to_array(read) for name, read in learner.draw().items()}
        service.pull_part(learner.theta, ids, self.clock)  # (1)
        loss = learner.gradient()
        u, rows = self.pushed_rows(learner)
        if self.units:
            rows |= self.units.chosen(u, self.clock)
        service.push_part(u, rows)  # (2), (3)
        self.clock += 1
        return loss

    def pushed(self, learner: Learner) -> Any:
        """Return u, (P,): (2)."""
        return self.own_steps.of(learner)

    def pushed_rows(self, learner: Learner) -> tuple[Any, dict[str, Any]]:
        """Return u before the row tables, and of the rows in `rows`: (2)."""
        return self.own_steps.of_rows(learner)

    def require(self, learner: Learner) -> None:
        super().require(learner)
        servers, size = self.config.servers, self.comm.size
        if servers > size:
            raise ConfigError(
                f"strategy.servers: {servers} of {size} ranks cannot hold a shard: at"
                f" most {size}"
            )
        require_resting_rows(self.name, learner)
        if self.config.ahead:
            self.require_ahead(learner)
        if self.config.units < 1.0 and not unit_matrices(learner.layout):
            raise ConfigError(
                f"strategy.units = {self.config.units:g}: the model has no hidden"
                " matrix to push a part of; take 1"
            )

    def require_ahead(self, learner: Learner) -> None:
        """Raise if `ahead` cannot be: what it reads and adds are whole plain steps."""
        config = self.config
        for is_set, other in (
            (config.momentum, f"momentum = {config.momentum:g}"),
            (
                config.staleness_bound >= 0,
                f"staleness_bound = {config.staleness_bound}",
            ),
            (config.units < 1.0, f"units = {config.units:g}"),
            (learner.layout.tables, "model.sparse = true"),
        ):
            if is_set:
                raise ConfigError(
                    f"strategy.ahead = true: not together with {other}; take ahead ="
                    " false"
                )

    def finish(self, learner: Learner) -> None:
        """Serve until nobody asks; theta is the model of the servers.

        Communicates: collective, one barrier and a Bcast of every shard; blocking.
        """
        super().finish(learner)
        if not self.is_local:
            self.collect(learner.theta)

    def final_model_(self, learner: Learner, out: Any) -> None:
        """Write the shards of all ranks into `out`, (P,).

        Communicates: collective, a Bcast of every shard, 4P bytes, blocking.
        """
        if self.is_local:
            out[:] = learner.theta
        else:
            self.collect(out)

    def collect(self, out: Any) -> None:
        """Write the shards of all ranks into `out`, (P,).

        Communicates: collective, a Bcast of every shard, 4P bytes, blocking.
        """
        service = self.service
        out[service.own] = service.values
        for rank, shard in enumerate(service.shards):
            if shard.stop > shard.start:
                self.comm.Bcast(out[shard], root=rank)

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        sent, received = self.service.moved_bytes()
        own = ITEM_BYTES * (self.service.own.stop - self.service.own.start)
        finished = self.service.num_ends  # as often `finish` has assembled the model
        others = ITEM_BYTES * layout.size - own
        return sent + finished * own, received + finished * others

    @property
    def inherited(self) -> tuple[str, ...]:
        return () if self.is_local else ("service.values", "service.velocity")

    def survive(self, learner: Learner) -> None:
        """Keep w_hat, a copy of the shards of those that have died, a step old."""

    def take_over(self, learner: Learner, merged: Merged) -> None:
        """Cut the model, and the velocity of its shards, into as many as are here.

        After a death theta is the mean of all w_hat; shards whose ranks are left are
        put in their places, the others stay restored from these copies; their velocity
        begins at 0. In another wire format than float32 the last errors are dropped.

        Communicates: collective, with `momentum` or after a death Allreduces of 4P
        bytes, blocking.
        """
        if self.is_local:
            return
        service, layout = self.service, learner.layout
        servers = self.num_servers(layout, merged.size)
        before = shards_of(layout, merged.size, servers)
        if not all(merged.places):
            values_P = from_shards(self.comm, merged, "service/values", before)
            for where, place in zip(before, merged.places, strict=True):
                if place:
                    fill_(learner.theta[where], values_P[where])
        service.load(learner.theta)
        if self.config.momentum:
            whole_P = from_shards(self.comm, merged, "service/velocity", before)
            fill_(service.velocity, whole_P[service.own])

    def conserved(self, learner: Learner) -> Any:
        """Return the own shard's (1 - m) x - m v, to which (3) adds -u."""
        if self.is_local:
            return super().conserved(learner)
        service, m = self.service, self.config.momentum
        kept = np.zeros(learner.layout.size)
        kept[service.own] = (1.0 - m) * to_array(service.values)
        if m:
            kept[service.own] -= m * to_array(service.velocity)
        if service.error is not None:
            kept -= to_array(service.error)
        return kept

    def metrics(self) -> dict[str, Any]:
        partners = self.service.partners.copy()
        return {
            "mixes": int(partners.sum()),
            "partners": partners,
            "staleness": self.service.staleness.copy(),
        }
