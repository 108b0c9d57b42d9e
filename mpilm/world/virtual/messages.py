"""Messages from rank to rank in the virtual world, and the requests for them.

    sender's port    |--n/B--|                 a next message waits for the port
    flight           |----L----|
    receiver's port            |--n/B--|       later, if the port is busy
                                       delivered; matched in the order of delivery

A port that has rested begins `burst_s` before its message, and ends no earlier than
that: burst_bytes pass in no time. Where ranks share their node's link (links.py) the
two links take the place of the ports.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mpilm.errors import WorldError
from mpilm.vectors import copy_of
from mpilm.world.base import ANY_SOURCE, ANY_TAG, Message
from mpilm.world.buffers import described, write_
from mpilm.world.machine import Link
from mpilm.world.virtual.collectives import Group
from mpilm.world.virtual.engine import NETWORK
from mpilm.world.virtual.links import Flow, SharedLink
from mpilm.world.virtual.request import VirtualRequest


class Envelope(NamedTuple):
    """What a message says on the outside; ranks are those of the world."""

    source: int
    dest: int
    tag: int
    nbytes: int


class Endpoint:
    """One rank's end of a communicator, as messages see it.

    arrived    messages that nobody has asked for yet, in the order of delivery
    receives   receives without their message yet, in the order of posting
    """

    def __init__(self, group: Group, rank: int) -> None:
        self.group, self.rank = group, rank
        self.engine, self.machine = group.engine, group.machine
        self.state = group.states[rank]
        self.traffic = self.state.traffic
        self.arrived: list[VirtualMessage] = []
        self.receives: list[ReceiveRequest] = []


class VirtualMessage(Message):
    """A message on its way, or waiting for its receiver.

    comm  the receiver's end
    """

    def __init__(
        self, comm: Endpoint, source: int, tag: int, buf: Any, link: Link
    ) -> None:
        self.comm, self.source, self.tag, self.link = comm, source, tag, link
        self.nbytes, self.dtype = described(buf)
        self.data = copy_of(buf)
        self.transfer_s = self.nbytes / link.bandwidth_Bps
        self.burst_s = 0.0
        self.tail_s = 0.0  # with a burst: when its last byte can arrive
        self.send: SendRequest | None = None  # completed by the receiver
        self.num_parts = 2  # over a shared link: its tail, and its place in the link

    @property
    def envelope(self) -> Envelope:
        """The outside of it, in ranks of the world."""
        source = self.comm.group.states[self.source].rank
        return Envelope(source, self.comm.state.rank, self.tag, self.nbytes)

    def depart(self, request: SendRequest, burst_bytes: int) -> None:
        """Take the sender's port, in the order of calls, and fly to the receiver's."""
        engine, sender = request.engine, request.state
        now_s = engine.now_s
        if burst_bytes:
            self.burst_s = burst_bytes / self.link.bandwidth_Bps
        start_s = max(now_s - self.burst_s, sender.send_free_s)
        sender.send_free_s = start_s + self.transfer_s
        flight_s = self.link.latency_s * self.comm.machine.spread(sender.link_random)
        arrival_s = self._arrival_s(request, max(start_s, now_s) + flight_s)
        if self.burst_s:
            self.tail_s = max(sender.send_free_s, now_s) + flight_s
        engine.at(arrival_s, NETWORK, self.arrive, None)
        if self.send is None:
            left_s = max(sender.send_free_s, now_s) + request.late_s()
            engine.at(left_s, NETWORK, request.complete, None)

    def depart_together(
        self, request: SendRequest, out: SharedLink, into: SharedLink
    ) -> None:
        """Take its share of the link of the sender's node, then of the receiver's."""
        engine, sender = request.engine, request.state
        dest = self.comm.state
        flight_s = self.link.latency_s * self.comm.machine.spread(sender.link_random)

        def begun() -> None:
            arrival_s = self._arrival_s(request, engine.now_s + flight_s)
            flow = Flow(self.nbytes, self.link.bandwidth_Bps, passed=self._part)
            engine.at(arrival_s, NETWORK, lambda _: into.put(dest, flow), None)

        def passed() -> None:
            tail_s = self._arrival_s(request, engine.now_s + flight_s)
            engine.at(tail_s, NETWORK, self._part, None)
            if self.send is None:
                left_s = engine.now_s + request.late_s()
                engine.at(left_s, NETWORK, request.complete, None)

        flow = Flow(self.nbytes, self.link.bandwidth_Bps, begun=begun, passed=passed)
        out.put(sender, flow)

    def _part(self, _: Any = None) -> None:
        """Deliver it when both have come: its last byte, and its turn in the link."""
        self.num_parts -= 1
        if self.num_parts == 0:
            self.deliver(None)

    def _arrival_s(self, request: SendRequest, arrival_s: float) -> float:
        """Return when it can arrive: messages do not overtake each other."""
        engine, sender, dest = request.engine, request.state, self.comm.state.rank
        if engine.rare is not None:
            free_s = engine.rare.free_s(sender.rank, dest, engine.now_s)
            arrival_s = max(arrival_s, free_s)
        arrival_s = max(arrival_s, sender.last_arrival_s.get(dest, 0.0))
        sender.last_arrival_s[dest] = arrival_s
        return arrival_s

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

    def __init__(self, comm: Endpoint, message: VirtualMessage) -> None:
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

    def __init__(self, comm: Endpoint, buf: Any, source: int, tag: int) -> None:
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


def wanted(message: VirtualMessage, source: int, tag: int) -> bool:
    """Return whether a receive from `source` with `tag`, or wildcards, matches."""
    return source in (ANY_SOURCE, message.source) and tag in (ANY_TAG, message.tag)
