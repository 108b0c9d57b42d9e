"""What a strategy may ask of the world around its rank: messages, time, activities.

Two worlds implement this page: `mpi.MpiWorld` (real MPI ranks) and
`virtual.VirtualWorld` (N ranks in one process, in virtual time). The same strategy
code runs in both, so it never imports mpi4py, torch, threading or time.

Buffers are 1-D contiguous arrays, numpy or torch (CPU or CUDA), of float32, float64,
int32, int64 or uint8. Methods carry their mpi4py names and mean what MPI means by
them: a buffer handed to a non-blocking call is not touched until its request is done.

Hand-over rule. Only calls that block (`Wait`, `Recv`, `Send`, `Allreduce`, `Bcast`,
`Barrier`, `sleep`, `wait`, `compute`, taking a held lock, `join`) let another
activity run. Starting a non-blocking call never does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from mpilm.errors import MpilmError, WorldError

T = TypeVar("T")
Notify = Callable[[Any], None]

ANY_SOURCE = -1
ANY_TAG = -1


class Op(Enum):
    """Reduction operators."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"


class InPlace(Enum):
    """Type of `IN_PLACE`, the send buffer that means: reduce the receive buffer."""

    IN_PLACE = "in place"


SUM, MAX, MIN = Op.SUM, Op.MAX, Op.MIN
IN_PLACE = InPlace.IN_PLACE


@dataclass
class Traffic:
    """What one rank has communicated so far.

    Point-to-point calls count their payload. Collectives count what a
    bandwidth-optimal algorithm moves per rank, whatever the library really does:
    an Allreduce of n bytes over K ranks 2n(K-1)/K each way, a Bcast n received on
    every rank but the root and n sent by the root.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    messages: int = 0  # calls: one per send, receive or collective
    blocked_s: float = 0.0  # the learner waited for communication
    in_flight_s: float = 0.0  # at least one of the learner's calls was under way
    # is called with the seconds of each wait of the learner, as it ends
    on_blocked: Callable[[float], None] | None = field(
        default=None, compare=False, repr=False
    )

    @property
    def overlap(self) -> float:
        """Share of communication time hidden behind other work, 0 to 1."""
        if self.in_flight_s <= 0.0:
            return 0.0
        return min(1.0, max(0.0, 1.0 - self.blocked_s / self.in_flight_s))


class Request(ABC):
    """A non-blocking operation under way.

    left  once a sum is done: what of the own vector did not travel; None: all did
    """

    left: Any = None

    @abstractmethod
    def Test(self) -> bool:
        """Return whether it is done. Never blocks."""

    @abstractmethod
    def Wait(self) -> None:
        """Block until it is done."""


class Message(ABC):
    """A matched incoming message (from `Comm.Improbe`), not yet received."""

    source: int
    tag: int
    nbytes: int

    @abstractmethod
    def Recv(self, buf: Any) -> None:
        """Receive it into `buf` (as long as the message, or longer). Blocking."""


class Comm(ABC):
    """A communicator: a group of ranks with a message space of its own.

    `rank` and `size` speak of this group. Collectives are called by all its ranks in
    the same order. The `traffic` of a communicator made by `Dup` or `Split` is that of
    the world it came from.
    """

    rank: int
    size: int
    traffic: Traffic
    item_bytes = 4  # of a float32 on its way

    @property
    def exact(self) -> Comm:
        """The same without a wire format (wire.py)."""
        return self

    def left_of(self, vector: Any) -> Any:
        """Return what of a vector does not travel in the wire format; None: all does.

        It is for its sender to keep: a new vector, float32.
        """
        return None

    # point to point
    @abstractmethod
    def Isend(self, buf: Any, dest: int, tag: int = 0) -> Request:
        """Start sending `buf`."""

    @abstractmethod
    def Irecv(self, buf: Any, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Request:
        """Start receiving into `buf`."""

    @abstractmethod
    def Improbe(self, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> Message | None:
        """Return the next incoming message, or None if there is none yet."""

    def Send(self, buf: Any, dest: int, tag: int = 0) -> None:
        """Send `buf`. Blocking."""
        self.Isend(buf, dest, tag).Wait()

    def Recv(self, buf: Any, source: int = ANY_SOURCE, tag: int = ANY_TAG) -> None:
        """Receive into `buf`. Blocking."""
        self.Irecv(buf, source, tag).Wait()

    def Sendrecv(  # noqa: PLR0917 - as in mpi4py
        self,
        sendbuf: Any,
        dest: int,
        sendtag: int = 0,
        recvbuf: Any = None,
        source: int = ANY_SOURCE,
        recvtag: int = ANY_TAG,
    ) -> None:
        """Send and receive at once, free of deadlock. Blocking."""
        receive = self.Irecv(recvbuf, source, recvtag)
        self.Isend(sendbuf, dest, sendtag).Wait()
        receive.Wait()

    # collective
    @abstractmethod
    def Iallreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Request:
        """Start reducing over all ranks; `sendbuf` may be `IN_PLACE`."""

    @abstractmethod
    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: Op = SUM) -> Any:
        """Reduce over all ranks; `sendbuf` may be `IN_PLACE`. Blocking.

        Returns:
            what of a sum's own vector did not travel; None: all did (`Request.left`).
        """

    def allreduced_bytes(self, num_elements: int) -> int:
        """Return what a sum of so many float32 moves on this rank, each way."""
        return 2 * self.item_bytes * num_elements * (self.size - 1) // self.size

    @abstractmethod
    def Bcast(self, buf: Any, root: int = 0) -> None:
        """Copy `buf` of rank `root` to all ranks. Blocking."""

    @abstractmethod
    def Ibarrier(self) -> Request:
        """Start a barrier: done when all ranks have started theirs."""

    def Barrier(self) -> None:
        """Wait until all ranks have come here. Blocking."""
        self.Ibarrier().Wait()

    @abstractmethod
    def allgather(self, value: T) -> list[T]:
        """Return every rank's small Python object. Blocking; for set-up only."""

    # groups
    @abstractmethod
    def Dup(self) -> Comm:
        """Return the same group with a message space of its own. Collective."""

    @abstractmethod
    def Split(self, color: int | None, key: int = 0) -> Comm | None:
        """Return the group of ranks with my `color` (None: no group). Collective."""

    @abstractmethod
    def Split_node(self) -> Comm:
        """Return the group of ranks that share my machine. Collective."""


class Activity(ABC):
    """Work that runs beside the learner on the same rank.

    ended_by  the call without which it goes on for ever; "": it ends by itself
    finished  whether it has returned
    """

    ended_by: str = ""
    finished: bool = False

    @abstractmethod
    def join(self) -> None:
        """Block until it has returned; raise what it raised."""


class World(ABC):
    """One rank's world. Every rank holds one; `comm` reaches all of them."""

    comm: Comm
    background: bool  # whether activities may communicate beside the learner
    is_virtual = False  # whether its seconds are those of a declared machine
    eval_s = 0.0  # seconds that evaluating a sample takes in virtual time
    can_shrink = False  # whether it can go on without ranks that have died
    last_words: Callable[[], str] = str  # after the line on a wait that ends a run
    can_grow = False  # whether it can go on with more ranks
    joins = False  # whether this rank came when the others were at work

    @property
    def rank(self) -> int:
        """Rank in `comm`."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """Number of ranks in `comm`."""
        return self.comm.size

    @property
    def traffic(self) -> Traffic:
        """What this rank has communicated so far."""
        return self.comm.traffic

    @abstractmethod
    def now_s(self) -> float:
        """Seconds since the world began (virtual seconds in the virtual world)."""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Let `seconds` pass. Blocking."""

    @abstractmethod
    def wait(self, ready: Callable[[], T | None], what: str) -> T:
        """Block until `ready()` returns something other than None or False; return it.

        `ready` is asked again whenever something of this rank may have changed: a
        message arrived, a request was done, another activity of the rank went on. It
        must be quick and must not block. `what` stands in reports of stalls and
        deadlocks: "a gradient from rank 3".
        """

    def device(self, kind: str = "auto") -> str:
        """Return the torch device of this rank's learner: "cpu" or "cuda:N".

        Args:
            kind: "auto" takes a GPU if there is one.
        """
        return "cpu" if kind == "auto" else kind

    @abstractmethod
    def lock(self, name: str) -> AbstractContextManager[Any]:
        """Return a new mutual exclusion between the activities of this rank."""

    @abstractmethod
    def start(self, work: Callable[[], None], name: str) -> Activity:
        """Run `work` beside the learner.

        Raises:
            WorldError: the MPI library was built or started without THREAD_MULTIPLE.
        """

    @abstractmethod
    def compute(self, work: Callable[[Notify], T], ready: Notify | None = None) -> T:
        """Run `work` as this rank's computing; it takes as long as the world says.

        The real world runs it and then adds the declared delays of this rank (a
        straggler sleeps (k-1) times what the work took). The virtual world runs it in
        no time and lets the declared step time pass.

        Args:
            work: called with `notify`; it must not block. It may call
                `notify(part)` as soon as a part of its result is complete.
            ready: called with each notified part, at the time the part is complete in
                this world (on a straggler: late). May start non-blocking calls.
        """

    def within(self, comm: Comm) -> World:
        """Return this world as the ranks of `comm` see it, for something that runs
        among them only.

        Clock, locks, activities and computing are this world's. To close it does
        nothing: that is left to this world.
        """
        return Within(self, comm)

    def shrink(self) -> list[int]:
        """Go on without the ranks that have died, after a `RanksDiedError`.

        `comm` is a new one, and with it rank and size. What was made of the old one
        (communicators, requests, activities) is no more.

        Returns:
            the ranks here, by the numbers that they had until now; empty: one of them
            has come to `close`, so all is done.

        Raises:
            WorldError: this world cannot.

        Communicates: collective among the ranks that are left.
        """
        raise WorldError("this world cannot go on without the ranks that have died")

    def agree(self, is_well: bool) -> bool:
        """Return whether all is well on all ranks, and none has died; the same on all.

        It ends whoever dies in it. What a rank has begun with the others after `shrink`
        it takes for done when they agree; else all call `shrink` again.

        Raises:
            WorldError: this world cannot.

        Communicates: collective among the ranks that are left, blocking.
        """
        raise WorldError("this world cannot go on without the ranks that have died")

    @property
    def recruits(self) -> tuple[int, int]:
        """How many ranks this one has asked for, and how many of them are ready."""
        return 0, 0

    def recruit(self, command: Sequence[str]) -> None:
        """Ask for one more rank; it starts while the others go on.

        Args:
            command: the program, which makes a world of its own that `joins`; in the
                virtual world the rank runs what all others run.

        Raises:
            WorldError: this world cannot.
        """
        raise WorldError(
            "no rank is added: that takes Open MPI under mpirun --with-ft ulfm"
        )

    def grow(self) -> int:
        """Take in the first rank that is ready, of those that rank 0 asked for.

        `comm` is a new one, in which it comes last. What was made of the old one is no
        more, as after `shrink`.

        Returns:
            the number of ranks before.

        Raises:
            WorldError: this world cannot.

        Communicates: collective among the ranks before, and with the new one, which
            makes its world meanwhile.
        """
        raise WorldError(
            "no rank is added: that takes Open MPI under mpirun --with-ft ulfm"
        )

    @abstractmethod
    def close(self) -> None:
        """End background work. Collective."""

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Run a set-up block on every rank and fail on all of them or on none.

        The block holds no communication. If it raises an `MpilmError` or `OSError` on
        any rank, every rank raises the first rank's message.

        Communicates: collective, one small allgather, blocking.
        """
        failure: str | None = None
        try:
            yield
        except (MpilmError, OSError) as error:
            failure = str(error)
        failures = self.comm.allgather(failure)
        failed = [(rank, text) for rank, text in enumerate(failures) if text]
        if failed:
            rank, text = failed[0]
            prefix = "" if len(failed) == self.size else f"rank {rank}: "
            raise MpilmError(prefix + text, everywhere=True)


class Within(World):
    """A world of some ranks of another, `outer`; see `World.within`."""

    def __init__(self, outer: World, comm: Comm) -> None:
        self.outer, self.comm = outer, comm
        self.background, self.is_virtual = outer.background, outer.is_virtual
        self.eval_s = outer.eval_s

    def now_s(self) -> float:
        return self.outer.now_s()

    def sleep(self, seconds: float) -> None:
        self.outer.sleep(seconds)

    def wait(self, ready: Callable[[], T | None], what: str) -> T:
        return self.outer.wait(ready, what)

    def device(self, kind: str = "auto") -> str:
        return self.outer.device(kind)

    def lock(self, name: str) -> AbstractContextManager[Any]:
        return self.outer.lock(name)

    def start(self, work: Callable[[], None], name: str) -> Activity:
        return self.outer.start(work, name)

    def compute(self, work: Callable[[Notify], T], ready: Notify | None = None) -> T:
        return self.outer.compute(work, ready)

    def close(self) -> None:
        """Do nothing: the outer world ends background work."""


def require_ended(activities: Iterable[Activity]) -> None:
    """Raise if one of these would never end: nobody told it to.

    Raises:
        WorldError: one line that names the call that is missing.
    """
    for activity in activities:
        if activity.ended_by and not activity.finished:
            raise WorldError(
                f"the program ended while ranks still exchange in the background:"
                f" {activity.ended_by} was not called before"
            )


def require_background(world: World, name: str) -> None:
    """Raise unless activities may communicate beside the learner.

    Raises:
        WorldError: one line with the remedy.
    """
    if not world.background:
        raise WorldError(
            f"strategy {name} needs MPI_THREAD_MULTIPLE, which this MPI library or its"
            " start-up does not give; use a synchronous strategy (allreduce,"
            " model_averaging, bmuf) or another MPI build"
        )
