"""Communicators of the real world: mpi4py's, with progress, staging and accounting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from hashlib import blake2b
from time import sleep
from typing import Any, TypeVar

from mpi4py import MPI

from mpilm.errors import WorldError
from mpilm.world.base import (
    ANY_SOURCE,
    ANY_TAG,
    IN_PLACE,
    MAX,
    MIN,
    SUM,
    Comm,
    Message,
    Op,
    Request,
)
from mpilm.world.mpi.large import REDUCED, Several, num_bytes, pieces, posted
from mpilm.world.mpi.membership import guarded
from mpilm.world.mpi.requests import CollectiveQueue, Transfer, perform
from mpilm.world.mpi.resources import Resources
from mpilm.world.mpi.slow_links import collective_delay_s
from mpilm.world.mpi.staging import Stage
from mpilm.world.mpi.stall import Waiting
from mpilm.world.profiles import NO_FAULT

T = TypeVar("T")

# At a barrier, before a wait that others can see, which costs 3 us: 20 take some 10 us
# (AMD EPYC, Open MPI 5.0.11, 2026-11-26), and ranks in step have come by then.
FIRST_LOOKS = 20
OPS = {SUM: MPI.SUM, MAX: MPI.MAX, MIN: MPI.MIN}


class MpiComm(Comm):
    """One rank's end of an MPI communicator.

    members  the world ranks of the group, in its order
    key      the same number on all ranks of the group, another for each communicator
    entered  collectives that this rank has entered
    """

    def __init__(self, resources: Resources, handle: MPI.Comm, name: str) -> None:
        self.resources, self.handle, self.name = resources, handle, name
        self.rank, self.size = handle.rank, handle.size
        self.progress, self.staging = resources.progress, resources.staging
        self.meter = resources.meter
        self.traffic = resources.meter.traffic
        self.members = world_ranks(handle, resources.control)
        digest = blake2b(f"{name} {self.members}".encode(), digest_size=7).digest()
        self.key = int.from_bytes(digest, "big")
        self.entered = 0
        self._num_children = 0
        self._queue: CollectiveQueue | None = None
        resources.handles.append(handle)
        resources.inspector.register(self)

    # point to point
    @guarded
    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Request:
        return self._send(buf, dest, tag, waited_for=False)

    @guarded
    def Send(self, buf: Any, dest: int, tag: int = 0) -> None:
        self._send(buf, dest, tag, waited_for=True).Wait()

    @guarded
    def Irecv(self, buf: Any, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Request:
        return self._receive(buf, source, tag, waited_for=False)

    @guarded
    def Recv(self, buf: Any, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> None:
        self._receive(buf, source, tag, waited_for=True).Wait()

    @guarded
    def Sendrecv(  # noqa: PLR0917  (mpi4py's order)
        self,
        sendbuf: Any,
        dest: int,
        sendtag: int = 0,
        recvbuf: Any = None,
        source: int = ANY_SOURCE,
        recvtag: int = ANY_TAG,
    ) -> None:
        # first the send: docs/mpi-world.md, "Settings of Open MPI"
        send = self._send(sendbuf, dest, sendtag, waited_for=True)
        receive = self._receive(recvbuf, source, recvtag, waited_for=True)
        send.Wait()
        receive.Wait()

    def _send(self, buf: Any, dest: int, tag: int, *, waited_for: bool) -> Request:
        self._check(dest, "dest")
        stage = self.staging.stage(buf, fetch=True)
        stage.arrived()
        nbytes, peer = stage.host.nbytes, self.members[dest]
        self.meter.count(sent=nbytes, messages=1)
        what = f"rank {peer} to receive a message (tag {tag})"
        faults = self.resources.faults
        if faults is not None and faults.profile:
            link = faults.link(self.members[self.rank], peer)
            if link is not NO_FAULT:
                start = partial(posted, self.handle.Isend, stage.host, dest, tag)
                return self.resources.slow_links.send(
                    start,
                    self.key,
                    peer,
                    link,
                    what,
                    stage=stage,
                    waited_for=waited_for,
                )
        return Transfer(
            self.progress,
            posted(self.handle.Isend, stage.host, dest, tag),
            what,
            nbytes=nbytes,
            stages=(stage,),
            waited_for=waited_for,
        )

    def _receive(self, buf: Any, source: int, tag: int, *, waited_for: bool) -> Request:
        peer = self._peer(source)
        stage = self.staging.stage(buf, fetch=False)
        stage.arrived()
        self.meter.count(messages=1)
        sender = "any rank" if source == ANY_SOURCE else f"rank {self.members[source]}"
        kind = "any tag" if tag == ANY_TAG else f"tag {tag}"
        return Transfer(
            self.progress,
            posted(self.handle.Irecv, stage.host, peer, _tag(tag)),
            f"a message from {sender} ({kind})",
            status=MPI.Status(),
            nbytes=stage.host.nbytes,
            stages=(stage,),
            target=stage,
            waited_for=waited_for,
        )

    @guarded
    def Improbe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Message | None:
        self.progress.check()
        status = MPI.Status()
        message = self.handle.Improbe(self._peer(source), _tag(tag), status)
        return None if message is None else MpiMessage(self, message, status)

    # collective
    @guarded
    def Iallreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Request:
        send, recv, stages = self._reduction("Iallreduce", sendbuf, recvbuf)
        if self.progress.background:
            if self._queue is None:
                self._queue = CollectiveQueue(self.progress, f"mpilm {self.name}")
            call = partial(self._reduce, send, recv, op)
            work = partial(perform, self._enter, "Iallreduce", call, stages, recv)
            return self._queue.submit("Iallreduce", work, stages)
        for stage in stages:
            stage.arrived()
        self.entered += 1
        reduce = self.handle.Iallreduce
        return Transfer(
            self.progress,
            Several([reduce(x, y, OPS[op]) for x, y in pieces(send, recv.host)]),
            "Iallreduce",
            nbytes=recv.host.nbytes,
            stages=stages,
            target=recv,
            waiting=Waiting("Iallreduce", self, self.entered),
        )

    @guarded
    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> None:
        send, recv, stages = self._reduction("Allreduce", sendbuf, recvbuf)
        self._do("Allreduce", partial(self._reduce, send, recv, op), stages, recv)

    @guarded
    def Bcast(self, buf: Any, root: int = 0) -> None:
        self._check(root, "root")
        stage = self.staging.stage(buf, fetch=self.rank == root)
        nbytes = stage.host.nbytes if self.size > 1 else 0
        if self.rank == root:
            self.meter.count(sent=nbytes, messages=1)
        else:
            self.meter.count(received=nbytes, messages=1)

        def call() -> None:
            for piece, _ in pieces(stage.host, stage.host):
                self.handle.Bcast(piece, root)

        self._do("Bcast", call, (stage,), None if self.rank == root else stage)

    @guarded
    def Ibarrier(self) -> Request:
        self.meter.count(messages=1)
        if self._queue is not None and not self._queue.idle:
            return self._queue.submit("Ibarrier", partial(self._enter, "Ibarrier"))
        self.entered += 1
        return Transfer(
            self.progress,
            self.handle.Ibarrier(),
            "Ibarrier",
            waiting=Waiting("Ibarrier", self, self.entered),
        )

    @guarded
    def Barrier(self) -> None:
        self.meter.count(messages=1)
        self._do("Barrier", lambda: None)  # to enter is all there is to it

    @guarded
    def allgather(self, value: T) -> list[T]:
        self.meter.count(messages=1)
        return self._do("allgather", lambda: self.handle.allgather(value))

    # groups
    @guarded
    def Dup(self) -> MpiComm:
        name = self._child_name("Dup")
        return MpiComm(self.resources, self._do("Dup", self.handle.Dup), name)

    @guarded
    def Split(self, color: int | None, key: int = 0) -> MpiComm | None:
        name = self._child_name("Split")
        number = MPI.UNDEFINED if color is None else color
        handle = self._do("Split", lambda: self.handle.Split(number, key))
        if handle == MPI.COMM_NULL:
            return None
        return MpiComm(self.resources, handle, name)

    @guarded
    def Split_node(self) -> MpiComm:
        name = self._child_name("Split_node")
        handle = self._do(
            "Split_node",
            lambda: self.handle.Split_type(MPI.COMM_TYPE_SHARED, self.rank),
        )
        return MpiComm(self.resources, handle, name)

    # how
    def _enter(self, name: str, msg_bytes: int = 0) -> AbstractContextManager[None]:
        """Enter a collective: block until all ranks have, and a slow link's delay.

        The barrier is polled with pauses, and the inspector knows of the wait. What is
        returned lets it know of MPI's own call, too: a link may break in that.
        """
        self.entered += 1
        if self.size == 1:
            return nullcontext()
        request = self.handle.Ibarrier()
        if not any(request.Test() for _ in range(FIRST_LOOKS)):
            self.progress.wait(request.Test, Waiting(name, self, self.entered))
        faults = self.resources.faults
        delay_s = collective_delay_s(faults, self.members, self.rank, name, msg_bytes)
        if delay_s > 0.0:
            sleep(delay_s)
        inside = Waiting(name, self, self.entered, inside=True)
        return self.resources.inspector.watching(inside)

    def _do(
        self,
        name: str,
        call: Callable[[], T],
        stages: Sequence[Stage] = (),
        target: Stage | None = None,
    ) -> T:
        """Make a blocking collective call; return its result.

        It runs on this thread, unless the queue is busy: collectives of a communicator
        must start in the same order on all ranks.
        """
        work = partial(perform, self._enter, name, call, stages, target)
        if self._queue is not None and not self._queue.idle:
            job = self._queue.submit(name, work, stages)
            job.Wait()
            return job.result
        if not self.progress.is_learner():
            return work()
        for stage in stages:
            stage.begin()
        end_watch = self.progress.watch(name) if self.progress.watch else None
        self.meter.begin()
        self.meter.block()
        try:
            return work()
        finally:
            self.meter.unblock()
            self.meter.end()
            if end_watch is not None:
                end_watch()

    def _reduction(
        self, name: str, sendbuf: Any, recvbuf: Any
    ) -> tuple[Any, Stage, list[Stage]]:
        """Return what MPI sends, where it receives, and all stages; count it."""
        in_place = sendbuf is IN_PLACE
        recv = self.staging.stage(recvbuf, fetch=in_place)
        moved = 2 * recv.host.nbytes * (self.size - 1) // self.size
        self.meter.count(sent=moved, received=moved, messages=1)
        if in_place:
            return MPI.IN_PLACE, recv, [recv]
        send = self.staging.stage(sendbuf, fetch=True)
        if (send.host.size, send.host.dtype) != (recv.host.size, recv.host.dtype):
            raise WorldError(f"{name}: the two buffers differ in length or type")
        return send.host, recv, [send, recv]

    def _reduce(self, send: Any, recv: Stage, op: Op) -> None:
        # what a reduction in place leaves when a rank dies in it is nobody's model
        is_kept = send is MPI.IN_PLACE and self.resources.has_ulfm
        kept = recv.host.copy() if is_kept else None
        try:
            for x, y in pieces(send, recv.host, REDUCED):
                self.handle.Allreduce(x, y, OPS[op])
        except MPI.Exception:
            if kept is not None:
                recv.host[:] = kept
            raise

    def _child_name(self, kind: str) -> str:
        """Return the same name on all ranks of this group, for a new group."""
        self._num_children += 1
        return f"{self.name}/{kind}{self._num_children}"

    def _peer(self, source: int) -> int:
        if source == ANY_SOURCE:
            return MPI.ANY_SOURCE
        self._check(source, "source")
        return source

    def _check(self, rank: int, what: str) -> None:
        if not 0 <= rank < self.size:
            raise WorldError(f"{what} {rank} is not one of {self.size} ranks")


class MpiMessage(Message):
    """A matched message; nobody else can receive it."""

    def __init__(self, comm: MpiComm, message: MPI.Message, status: MPI.Status) -> None:
        self.comm, self.message, self.resources = comm, message, comm.resources
        self.source, self.tag = status.Get_source(), status.Get_tag()
        self.nbytes = num_bytes(status)

    @guarded
    def Recv(self, buf: Any) -> None:
        comm = self.comm
        stage = comm.staging.stage(buf, fetch=False)
        if stage.host.nbytes < self.nbytes:
            raise WorldError(
                f"a message of {self.nbytes} bytes from rank"
                f" {comm.members[self.source]} (tag {self.tag}) does not fit into"
                f" {stage.host.nbytes} bytes"
            )
        stage.arrived()
        comm.meter.count(messages=1)
        transfer = Transfer(
            comm.progress,
            posted(self.message.Irecv, stage.host),
            f"a message from rank {comm.members[self.source]} (tag {self.tag})",
            status=MPI.Status(),
            nbytes=stage.host.nbytes,
            stages=(stage,),
            target=stage,
            waited_for=True,
        )
        transfer.Wait()


def world_ranks(handle: MPI.Comm, world: MPI.Comm) -> list[int]:
    """Return the ranks in `world` of a communicator's group, in its order."""
    group, world_group = handle.Get_group(), world.Get_group()
    ranks = group.Translate_ranks(list(range(group.size)), world_group)
    group.Free()
    world_group.Free()
    return ranks


def _tag(tag: int) -> int:
    return MPI.ANY_TAG if tag == ANY_TAG else tag
