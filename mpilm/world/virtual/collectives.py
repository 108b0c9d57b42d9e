"""Collectives of the virtual world: one object that all ranks of a group come to.

It starts when the last rank has come and all their ports are free, and ends on all
ranks at once, after the cost that `machine` declares. What it computes is computed
once and shared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mpilm.errors import WorldError
from mpilm.vectors import copy_of
from mpilm.world import machine as costs
from mpilm.world.base import Op
from mpilm.world.buffers import reduce_, write_
from mpilm.world.machine import Collectives, Cost, Machine
from mpilm.world.parts import named_ranks
from mpilm.world.virtual.engine import NETWORK, Engine, RankState
from mpilm.world.virtual.request import VirtualRequest


class Group:
    """The ranks of a communicator, in order, and what connects them.

    name  of the communicator, in reports of deadlocks
    how   what its collectives cost: by the slowest link between two of its ranks
    is_void  a rank of it has died: nothing of it happens any more
    """

    def __init__(
        self,
        engine: Engine,
        states: Sequence[RankState],
        machine: Machine,
        how: Collectives,
        name: str,
    ) -> None:
        self.engine, self.states = engine, states
        self.machine, self.how, self.name = machine, how, name
        self.is_void = False

    def free_s(self, state: RankState) -> float:
        """Return when nothing of a rank is on its way any more."""
        return max(state.send_free_s, state.receive_free_s)


class Call(NamedTuple):
    """What a rank called; all ranks of the group must call the same."""

    kind: str
    nbytes: int = 0
    dtype: str = ""
    op: Op | None = None
    root: int | None = None

    def __str__(self) -> str:
        text = self.kind
        if self.dtype:
            text += f" of {self.nbytes} bytes of {self.dtype}"
        if self.op is not None:
            text += f" ({self.op.value})"
        if self.root is not None:
            text += f" from root {self.root}"
        return text


class CollectiveRequest(VirtualRequest):
    """One rank's part in a collective."""

    def __init__(self, collective: Collective, rank: int, buf: Any) -> None:
        group = collective.group
        super().__init__(group.engine, group.states[rank])
        self.collective, self.rank, self.buf = collective, rank, buf

    def __str__(self) -> str:
        collective = self.collective
        group = collective.group
        missing = [
            group.states[rank].rank
            for rank, request in enumerate(collective.requests)
            if request is None
        ]
        return f"{named_ranks(missing)} in {collective.call} on {group.name}"


class Collective(ABC):
    """One collective operation of a group, from the first call to the end."""

    data: Any = None  # the shared result, while it is needed

    def __init__(self, group: Group, call: Call, first: int) -> None:
        self.group, self.call, self.first = group, call, first
        self.requests: list[CollectiveRequest | None] = [None] * len(group.states)
        self.num_missing = len(group.states)

    def come(self, rank: int, call: Call, value: Any, buf: Any) -> CollectiveRequest:
        """Enter a rank with what it brings; start when it was the last one.

        Raises:
            WorldError: it calls something else than the others.
        """
        if call != self.call:
            states = self.group.states
            raise WorldError(
                f"calls {call} on {self.group.name} where rank"
                f" {states[self.first].rank} called {self.call}"
            )
        request = CollectiveRequest(self, rank, buf)
        self.requests[rank] = request
        self.bring(rank, value)
        self.num_missing -= 1
        if self.num_missing == 0:
            self._start()
        return request

    def _start(self) -> None:
        group = self.group
        engine, states = group.engine, group.states
        if len(states) == 1:
            self._finish(None)
            return
        cost = self.cost()
        start_s = engine.now_s - group.how.burst_s
        for state in states:
            start_s = max(start_s, group.free_s(state))
        free_s = start_s + cost.transfer_s
        for state in states:
            state.send_free_s = state.receive_free_s = free_s
        latency_s = cost.latency_s * group.machine.spread(states[0].link_random)
        end_s = max(free_s, engine.now_s) + latency_s
        engine.at(end_s, NETWORK, self._finish, None)

    def _finish(self, _: Any) -> None:
        if self.group.is_void:
            return
        requests, self.requests = self.requests, []  # no cycle: memory is freed at once
        engine, num_late = self.group.engine, 0
        for request in requests:
            assert request is not None
            late_s = engine.rare.delay_s("spread_end") if engine.rare else 0.0
            if late_s > 0.0:
                num_late += 1
                engine.at(engine.now_s + late_s, NETWORK, self._end, request)
            else:
                self._end(request)
        if not num_late:
            self.data = None

    def _end(self, request: CollectiveRequest) -> None:
        """Let it be over on one rank."""
        if not self.group.is_void:
            self.hand_out(request)
            request.complete()

    @abstractmethod
    def bring(self, rank: int, value: Any) -> None:
        """Take what a rank brings."""

    def hand_out(self, request: CollectiveRequest) -> None:
        """Give a rank its result."""

    @abstractmethod
    def cost(self) -> Cost:
        """Return what it costs."""


class Allgather(Collective):
    """Small Python values (or none: a barrier); everybody sees all of them."""

    def __init__(self, group: Group, call: Call, first: int) -> None:
        super().__init__(group, call, first)
        self.values: list[Any] = [None] * len(group.states)
        self._combined: Any = None

    def bring(self, rank: int, value: Any) -> None:
        self.values[rank] = value

    def combined(self, combine: Callable[[list[Any]], Any]) -> Any:
        """Return `combine(values)`, computed by the first who asks."""
        if self._combined is None:
            self._combined = combine(self.values)
        return self._combined

    def cost(self) -> Cost:
        return costs.barrier(self.group.how, len(self.values))


class Broadcast(Collective):
    """The buffer of the root, to all."""

    def bring(self, rank: int, value: Any) -> None:
        if rank == self.call.root:
            self.data = copy_of(value)

    def hand_out(self, request: CollectiveRequest) -> None:
        if request.rank != self.call.root:
            write_(request.buf, self.data)

    def cost(self) -> Cost:
        return costs.broadcast(self.group.how, len(self.requests), self.call.nbytes)


class Reduction(Collective):
    """The buffers of all, folded in the order of ranks.

    A buffer is folded at once if all ranks before it have been, and copied otherwise.
    """

    def __init__(self, group: Group, call: Call, first: int) -> None:
        super().__init__(group, call, first)
        self.num_folded = 0
        self.early: dict[int, Any] = {}

    def bring(self, rank: int, value: Any) -> None:
        if rank != self.num_folded:
            self.early[rank] = copy_of(value)
            return
        self._fold(value)
        while self.early and self.num_folded in self.early:
            self._fold(self.early.pop(self.num_folded))

    def _fold(self, part: Any) -> None:
        if self.num_folded == 0:
            self.data = copy_of(part)
        else:
            assert self.call.op is not None
            reduce_(self.data, part, self.call.op)
        self.num_folded += 1

    def hand_out(self, request: CollectiveRequest) -> None:
        write_(request.buf, self.data)

    def cost(self) -> Cost:
        return costs.allreduce(self.group.how, len(self.requests), self.call.nbytes)
