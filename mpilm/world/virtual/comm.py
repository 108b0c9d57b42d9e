"""Communicators of the virtual world, and messages from rank to rank.

    sender's port    |--n/B--|                 a next message waits for the port
    flight           |----L----|
    receiver's port            |--n/B--|       later, if the port is busy
                                       delivered; matched in the order of delivery

A port that has rested begins `burst_s` before its message, and ends no earlier than
that: burst_bytes pass in no time.

A send buffer is copied at the call and a receive buffer written at completion: a
program that touches a buffer too early shows wrong numbers here, as under MPI.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from mpilm.errors import LeftBehindError, WorldError
from mpilm.vectors import copy_of
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
from mpilm.world.buffers import described, write_
from mpilm.world.faults import Faults
from mpilm.world.machine import Link, Machine
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
from mpilm.world.virtual.engine import (
    NETWORK,
    Died,
    Engine,
    RankState,
    VirtualRequest,
)

T = TypeVar("T")


class Envelope(NamedTuple):
    """What a message says on the outside; ranks are those of the world."""

    source: int
    dest: int
    tag: int
    nbytes: int


class Network:
    """The communicators of one simulation and the machine they run on."""

    def __init__(self, engine: Engine, machine: Machine, faults: Faults) -> None:
        self.engine, self.machine, self.faults = engine, machine, faults
        self.communicators: list[Communicator] = []

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


class VirtualMessage(Message):
    """A message on its way, or waiting for its receiver."""

    def __init__(
        self, comm: VirtualComm, source: int, tag: int, buf: Any, link: Link
    ) -> None:
        self.comm, self.source, self.tag = comm, source, tag
        self.nbytes, self.dtype = described(buf)
        self.data = copy_of(buf)
        self.transfer_s = self.nbytes / link.bandwidth_Bps
        self.burst_s = 0.0
        self.tail_s = 0.0  # with a burst: when its last byte can arrive
        self.send: SendRequest | None = None  # completed by the receiver

    @property
    def envelope(self) -> Envelope:
        """The outside of it, in ranks of the world."""
        source = self.comm.group.states[self.source].rank
        return Envelope(source, self.comm.state.rank, self.tag, self.nbytes)

    def arrive(self, _: Any) -> None:
        """Take the receiver's port, in the order of arrival."""
        if self.comm.group.is_void:
            return
        engine, state = self.comm.engine, self.comm.state
        start_s = max(engine.now_s - self.burst_s, state.receive_free_s)
        state.receive_free_s = start_s + self.transfer_s
        end_s = max(state.receive_free_s, engine.now_s, self.tail_s)
        engine.at(end_s, NETWORK, self.deliver, None)

    def deliver(self, _: Any) -> None:
        """Go to the first receive that wants it, or wait."""
        comm = self.comm
        if comm.group.is_void:
            return
        for index, receive in enumerate(comm.receives):
            if wanted(self, receive.source, receive.tag):
                del comm.receives[index]
                try:
                    self.put(receive.buf)
                except WorldError as error:
                    raise WorldError(f"rank {comm.state.rank}: {error}") from error
                receive.complete()
                return
        comm.arrived.append(self)
        comm.state.changed()

    def put(self, buf: Any) -> None:
        """Write it into a receive buffer; tell the sender if it waits for that.

        Raises:
            WorldError: it does not fit.
        """
        nbytes, dtype = described(buf)
        if self.nbytes > nbytes or self.dtype != dtype:
            raise WorldError(
                f"a message of {self.nbytes} bytes of {self.dtype} from rank"
                f" {self.envelope.source} (tag {self.tag}) does not fit into"
                f" {nbytes} bytes of {dtype}"
            )
        write_(buf, self.data)
        self.data = None
        self.comm.traffic.bytes_received += self.nbytes
        if self.send is not None:
            late_s = self.send.late_s()
            if late_s > 0.0:
                engine = self.comm.engine
                engine.at(engine.now_s + late_s, NETWORK, self.send.complete, None)
            else:
                self.send.complete()

    def Recv(self, buf: Any) -> None:
        comm = self.comm
        comm.engine.active(comm.state).may_block()
        comm.traffic.messages += 1
        self.put(buf)


class SendRequest(VirtualRequest):
    """A message that is being sent."""

    def __init__(self, comm: VirtualComm, message: VirtualMessage) -> None:
        super().__init__(comm.engine, comm.state)
        self.message, self.group = message, comm.group

    def is_void(self) -> bool:
        return self.group.is_void

    def late_s(self) -> float:
        """Return how long after its time it is complete, seconds."""
        return self.engine.rare.delay_s("late_send") if self.engine.rare else 0.0

    def __str__(self) -> str:
        envelope = self.message.envelope
        return (
            f"rank {envelope.dest} to receive a message"
            f" (tag {envelope.tag}, {envelope.nbytes} bytes)"
        )


class ReceiveRequest(VirtualRequest):
    """A receive that is posted."""

    def __init__(self, comm: VirtualComm, buf: Any, source: int, tag: int) -> None:
        super().__init__(comm.engine, comm.state)
        self.comm, self.buf, self.source, self.tag = comm, buf, source, tag

    def is_void(self) -> bool:
        return self.comm.group.is_void

    def __str__(self) -> str:
        states = self.comm.group.states
        any_source = self.source == ANY_SOURCE
        source = "any rank" if any_source else f"rank {states[self.source].rank}"
        tag = "any tag" if self.tag == ANY_TAG else f"tag {self.tag}"
        return f"a message from {source} ({tag})"


class VirtualComm(Comm):
    """One rank's end of a communicator.

    arrived    messages that nobody has asked for yet, in the order of delivery
    receives   receives without their message yet, in the order of posting
    """

    def __init__(self, group: Communicator, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, len(group.states)
        self.engine, self.machine = group.engine, group.machine
        self.state = group.states[rank]
        self.generation = self.state.generation
        self.traffic = self.state.traffic
        self.arrived: list[VirtualMessage] = []
        self.receives: list[ReceiveRequest] = []
        self.num_collectives = 0

    # point to point
    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Request:
        self.engine.active(self.state).catch_up()
        self._require_alive()
        self._check(dest, "dest")
        state, engine, machine = self.state, self.engine, self.machine
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
        now_s = engine.now_s
        if machine.burst_bytes and not same_node:
            message.burst_s = machine.burst_bytes / link.bandwidth_Bps
        start_s = max(now_s - message.burst_s, state.send_free_s)
        state.send_free_s = start_s + message.transfer_s
        flight_s = link.latency_s * machine.spread(state.link_random)
        arrival_s = max(start_s, now_s) + flight_s
        if message.burst_s:
            message.tail_s = max(state.send_free_s, now_s) + flight_s
        if engine.rare is not None:
            free_s = engine.rare.free_s(state.rank, peer.state.rank, now_s)
            arrival_s = max(arrival_s, free_s)
        arrival_s = max(arrival_s, state.last_arrival_s.get(peer.state.rank, 0.0))
        state.last_arrival_s[peer.state.rank] = arrival_s  # messages do not overtake
        engine.at(arrival_s, NETWORK, message.arrive, None)
        if message.nbytes > machine.eager_bytes:
            message.send = request
        else:
            left_s = max(state.send_free_s, now_s) + request.late_s()
            engine.at(left_s, NETWORK, request.complete, None)
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


def wanted(message: VirtualMessage, source: int, tag: int) -> bool:
    """Return whether a receive from `source` with `tag`, or wildcards, matches."""
    return source in (ANY_SOURCE, message.source) and tag in (ANY_TAG, message.tag)
