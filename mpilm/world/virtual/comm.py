"""Communicators of the virtual world.

A send buffer is copied at the call and a receive buffer written at completion: a
program that touches a buffer too early shows wrong numbers here, as under MPI.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, TypeVar

from mpilm.errors import LeftBehindError, WorldError
from mpilm.world.base import (
    ANY_SOURCE,
    ANY_TAG,
    IN_PLACE,
    SUM,
    Comm,
    Message,
    Op,
    Request,
)
from mpilm.world.buffers import described
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.profiles import NO_FAULT
from mpilm.world.virtual.collectives import (
    Allgather,
    Broadcast,
    Call,
    Collective,
    CollectiveRequest,
    Group,
    Reduction,
)
from mpilm.world.virtual.engine import Died, Engine, RankState
from mpilm.world.virtual.links import SharedLink
from mpilm.world.virtual.messages import (
    Endpoint,
    Envelope,
    ReceiveRequest,
    SendRequest,
    VirtualMessage,
    wanted,
)

T = TypeVar("T")


class Network:
    """The communicators of one simulation and the machine they run on."""

    def __init__(self, engine: Engine, machine: Machine, faults: Faults) -> None:
        self.engine, self.machine, self.faults = engine, machine, faults
        self.communicators: list[Communicator] = []
        self._links: dict[int, tuple[SharedLink, SharedLink]] = {}  # by node

    def links(self, state: RankState) -> tuple[SharedLink, SharedLink]:
        """Return the link that a rank shares, out of its node and into it."""
        if state.node not in self._links:
            self._links[state.node] = (
                SharedLink(self.engine, self.machine, "send_free_s"),
                SharedLink(self.engine, self.machine, "receive_free_s"),
            )
        return self._links[state.node]

    def undelivered(self) -> list[Envelope]:
        """Return the messages that nobody received."""
        return [
            message.envelope
            for communicator in self.communicators
            if not communicator.is_void
            for comm in communicator.comms
            for message in comm.arrived
        ]


class Communicator(Group):
    """A group with a message space of its own, and its collectives under way.

    comms  its ends, by rank
    open   collectives that not all ranks have entered, by number
    """

    def __init__(
        self, network: Network, states: Sequence[RankState], kind: str
    ) -> None:
        num_nodes = len({state.node for state in states})
        same_node = num_nodes == 1
        machine = network.machine
        # one rank of each node, where nodes have several
        self.leaders = machine.ranks_per_node > 1 and num_nodes == len(states)
        fault = network.faults.link_within([state.rank for state in states])
        how = machine.collectives(same_node=same_node, leaders=self.leaders)
        how = how.after(fault)
        name = f"{kind} (communicator {len(network.communicators)})"
        super().__init__(network.engine, states, machine, how, name)
        self.network, self.faults = network, network.faults
        self.comms = [VirtualComm(self, rank) for rank in range(len(states))]
        self.open: dict[int, Collective] = {}
        network.communicators.append(self)

    def free_s(self, state: RankState) -> float:
        free_s = super().free_s(state)
        if not self.machine.shares_link:
            return free_s
        links = self.network.links(state)
        return max([free_s, *(link.free_s(state.rank) for link in links)])


class VirtualComm(Endpoint, Comm):
    """One rank's end of a communicator."""

    group: Communicator

    def __init__(self, group: Communicator, rank: int) -> None:
        super().__init__(group, rank)
        self.size = len(group.states)
        self.generation = self.state.generation
        self.num_collectives = 0

    # point to point
    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Request:
        self.engine.active(self.state).catch_up()
        self._require_alive()
        self._check(dest, "dest")
        state, machine = self.state, self.machine
        peer = self.group.comms[dest]
        nbytes, _ = described(buf)
        same_node = state.node == peer.state.node
        link = machine.message_link(
            nbytes, same_node=same_node, leaders=self.group.leaders
        )
        fault = self.group.faults.link(state.rank, peer.state.rank)
        if fault is not NO_FAULT:
            link = link.after(fault)
        message = VirtualMessage(peer, self.rank, tag, buf, link)
        request = SendRequest(self, message)
        if nbytes > machine.eager_bytes:
            message.send = request
        if same_node or not machine.shares_link:
            message.depart(request, 0 if same_node else machine.burst_bytes)
        else:
            network = self.group.network
            out, into = network.links(state)[0], network.links(peer.state)[1]
            message.depart_together(request, out, into)
        self.traffic.bytes_sent += message.nbytes
        self.traffic.messages += 1
        return request

    def Irecv(self, buf: Any, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Request:
        self._require_alive()
        if source != ANY_SOURCE:
            self._check(source, "source")
        described(buf)
        request = ReceiveRequest(self, buf, source, tag)
        self.traffic.messages += 1
        message = self._take(source, tag)
        if message is None:
            self.receives.append(request)
        else:
            message.put(buf)
            request.complete()
        return request

    def Improbe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Message | None:
        if source != ANY_SOURCE:
            self._check(source, "source")
        self._require_alive()
        message = self._take(source, tag)
        if message is None:
            self.engine.polled()
        return message

    def _take(self, source: int, tag: int) -> VirtualMessage | None:
        rare, found, sources = self.engine.rare, [], set[int]()
        for index, message in enumerate(self.arrived):
            if message.source not in sources and wanted(message, source, tag):
                found.append(index)
                if rare is None or source != ANY_SOURCE:
                    break
                sources.add(message.source)
        if not found:
            return None
        is_other = len(found) > 1 and rare is not None and rare.happens("other_order")
        index = rare.draw.choice(found) if is_other and rare else found[0]
        self.state.num_taken += 1
        return self.arrived.pop(index)

    def _require_alive(self) -> None:
        """Raise if a rank has died and is not left behind yet; or if dead itself."""
        activity = self.engine.active(self.state)
        if self.state.is_dead:
            raise Died
        self.state.require_alive(activity)
        if self.generation != self.state.generation:
            raise LeftBehindError(
                f"{self.group.name}: is of ranks before others died or joined"
            )

    def _check(self, rank: int, what: str) -> None:
        if not 0 <= rank < self.size:
            raise WorldError(f"{what} {rank} is not one of {self.size} ranks")

    # collective
    def _come(
        self, kind: type[Collective], call: Call, value: Any = None, buf: Any = None
    ) -> CollectiveRequest:
        if not self.state.num_in_flight:  # else of a sum that the optimiser waits for
            self.engine.active(self.state).catch_up()
        self._require_alive()
        number = self.num_collectives
        self.num_collectives += 1
        open_ = self.group.open
        collective = open_.get(number)
        if collective is None:
            collective = open_[number] = kind(self.group, call, self.rank)
        request = collective.come(self.rank, call, value, buf)
        if collective.num_missing == 0:
            del open_[number]
        return request

    def _reduce(self, kind: str, sendbuf: Any, recvbuf: Any, op: Op) -> Request:
        nbytes, dtype = described(recvbuf)
        if sendbuf is IN_PLACE:
            sendbuf = recvbuf
        elif described(sendbuf) != (nbytes, dtype):
            raise WorldError(f"{kind}: the two buffers differ in length or type")
        moved = 2 * nbytes * (self.size - 1) // self.size
        self.traffic.bytes_sent += moved
        self.traffic.bytes_received += moved
        self.traffic.messages += 1
        call = Call(kind, nbytes, dtype, op)
        return self._come(Reduction, call, sendbuf, recvbuf)

    def Iallreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Request:
        return self._reduce("Iallreduce", sendbuf, recvbuf, op)

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> None:
        self._reduce("Allreduce", sendbuf, recvbuf, op).Wait()

    def Bcast(self, buf: Any, root: int = 0) -> None:
        self._check(root, "root")
        nbytes, dtype = described(buf)
        if self.size > 1:
            if self.rank == root:
                self.traffic.bytes_sent += nbytes
            else:
                self.traffic.bytes_received += nbytes
        self.traffic.messages += 1
        call = Call("Bcast", nbytes, dtype, root=root)
        self._come(Broadcast, call, buf, buf).Wait()

    def Ibarrier(self) -> Request:
        self.traffic.messages += 1
        return self._come(Allgather, Call("Ibarrier"))

    def Barrier(self) -> None:
        self.traffic.messages += 1
        self._come(Allgather, Call("Barrier")).Wait()

    def close(self) -> None:
        """Wait until all ranks have come here; counted nowhere. Blocking."""
        request = self._come(Allgather, Call("close"))
        request.is_learners = False
        request.wait(counts=False)

    def allgather(self, value: T) -> list[T]:
        self.traffic.messages += 1
        brought = value if type(value) in PLAIN else Pickled(value)
        exchange = self._exchange("allgather", brought)
        return [v.copy() if type(v) is Pickled else v for v in exchange.values]

    def _exchange(self, kind: str, value: Any) -> Allgather:
        request = self._come(Allgather, Call(kind), value)
        request.Wait()
        assert isinstance(request.collective, Allgather)
        return request.collective

    # groups
    def Dup(self) -> VirtualComm:
        def combine(_: list[Any]) -> Communicator:
            return Communicator(self.group.network, self.group.states, "Dup")

        group = self._exchange("Dup", None).combined(combine)
        return group.comms[self.rank]

    def Split(self, color: int | None, key: int = 0) -> VirtualComm | None:
        comms = self._exchange("Split", (color, key)).combined(self._split)
        return comms[self.rank]

    def Split_node(self) -> VirtualComm:
        comm = self.Split(self.state.node, self.rank)
        assert comm is not None
        return comm

    def _split(self, choices: list[tuple[int | None, int]]) -> list[VirtualComm | None]:
        members: dict[int, list[tuple[int, int]]] = {}
        for rank, (color, key) in enumerate(choices):
            if color is not None:
                members.setdefault(color, []).append((key, rank))
        comms: list[VirtualComm | None] = [None] * self.size
        for color in sorted(members):
            ranks = [rank for _, rank in sorted(members[color])]
            states = [self.group.states[rank] for rank in ranks]
            group = Communicator(self.group.network, states, "Split")
            for rank, comm in zip(ranks, group.comms, strict=True):
                comms[rank] = comm
        return comms


PLAIN = {int, float, bool, str, bytes, type(None)}


class Pickled:
    """A Python value as it was when it was sent."""

    def __init__(self, value: Any) -> None:
        self.data = pickle.dumps(value)

    def copy(self) -> Any:
        """Return a copy of the value for one receiver."""
        return pickle.loads(self.data)
