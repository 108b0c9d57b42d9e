"""A service: a background activity that asks and answers until all ranks have ended.

    rank 0   begin | ask, answer ..... | end: the last own answer, Ibarrier | stop
    rank 1   begin | ask, answer .................... | end: Ibarrier ..... | stop

A rank that has nothing more to ask goes on answering: nobody waits for an answer that
does not come, whatever the order in which ranks end. When the barrier is done all ranks
have had their answers, and none is on its way. The rank that learns of it first may
begin again and ask before another has stopped, so questions change between two
communicators from one end to the next: what comes early waits for the next `begin`.

`Pairwise` (adpsgd), `Fragments` (divshare), `ParameterServer` (async_sgd) and `Counter`
(samples and the pool's leases, on rank 0 only) are services.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

from mpilm.world.base import Activity, Comm, Message, Request, World

Work = Callable[[], None]


class Service(ABC):
    """One rank's part of a service; messages to it arrive on `comm`.

    Args:
        world: this rank's world.
        comm: a communicator for the questions; collectives may use it as well.
        name: for debuggers and reports.

    comm       where questions go until the next `end`
    lock       guards what learner and activity share; its release lets both look again
    waits_for  what the activity waits for, in reports of stalls and deadlocks
    ended_by   the call that ends it, in the report of a program that forgot it
    is_ending  this rank asks nothing new
    """

    waits_for = "a question"
    ended_by = "strategy.finish(learner)"

    def __init__(self, world: World, comm: Comm, name: str) -> None:
        self.world, self.comm, self.name = world, comm, name
        self._next_comm: Comm | None = None  # made at the first `end`: a collective
        self.lock = world.lock(name)
        self.is_ending = False
        self._activity: Activity | None = None
        self._barrier: Request | None = None
        self._is_over = False

    @property
    def is_running(self) -> bool:
        """Whether the activity runs."""
        return self._activity is not None

    # what a service does
    @abstractmethod
    def answer(self, message: Message) -> None:
        """Take a message that has arrived; answer it, if it asks for that."""

    def own_work(self) -> Work | None:
        """Return what can be done now without another message; None: nothing.

        That is to ask, to take an answer, to answer what was held back.
        """
        return None

    @property
    def is_asking(self) -> bool:
        """Whether an answer is still to come: the end waits for it."""
        return False

    @property
    def can_answer(self) -> bool:
        """Whether another message can be taken: not while a buffer is in use."""
        return True

    @property
    def open_requests(self) -> list[Request]:
        """What it has started and not waited for: nothing, once it has ended."""
        return []

    def renew(self) -> None:
        """Make ready to serve once more; `begin` calls it before the activity runs."""

    # called by the learner
    def begin(self) -> None:
        """Start to serve, unless it runs or there is nobody else. Not collective."""
        if self.is_running or self.comm.size == 1:
            return
        self.is_ending = self._is_over = False
        self._barrier = None
        self.renew()
        self._activity = self.world.start(self._run, self.name)
        self._activity.ended_by = self.ended_by

    def retire(self) -> None:
        """Serve, and let nobody wait for this rank to ask: its learner is still.

        Not collective; what it communicates is the service's.
        """
        self.begin()

    def end(self) -> None:
        """Ask no more; serve until nobody asks; nothing stays in flight.

        A rank on which it does not run takes part in the barrier.

        Raises:
            Exception: what `answer`, or another method, raised in the activity.

        Communicates: collective, one barrier (and once a Dup), blocking.
        """
        activity, self._activity = self._activity, None
        if activity is None:
            self.comm.Ibarrier().Wait()  # the others' is one: MPI keeps the two apart
        else:
            with self.lock:
                self.is_ending = True
            activity.join()
        self.comm, self._next_comm = self._next_comm or self.comm.Dup(), self.comm

    # the activity
    def _run(self) -> None:
        while not self._is_over:
            work = self.world.wait(self._next_work, self.waits_for)
            work()

    def _next_work(self) -> Work | None:
        """Return what can be done now without waiting."""
        work = self.own_work()
        if work is not None:
            return work
        if self.is_ending and self._barrier is None and not self.is_asking:
            return self._announce_end
        if not self.can_answer:
            return None
        if self._barrier is not None and self._barrier.Test():
            return self._stop
        message = self.comm.Improbe()
        return partial(self.answer, message) if message else None

    def _announce_end(self) -> None:
        self._barrier = self.comm.Ibarrier()

    def _stop(self) -> None:
        self._is_over = True


class OneAtATime(Service):
    """A service that has one request of its own under way, and one answer.

    under_way   what it waits for; None: it may begin anew
    is_sending  that is a message of its own on its way; else the answer to it
    reply       the answer to another rank on its way; None: it may take a message
    """

    def __init__(self, world: World, comm: Comm, name: str) -> None:
        super().__init__(world, comm, name)
        self.under_way: Request | None = None
        self.is_sending = False
        self.reply: Request | None = None

    @property
    def open_requests(self) -> list[Request]:
        return [request for request in (self.under_way, self.reply) if request]

    @property
    def is_asking(self) -> bool:
        return self.under_way is not None

    @property
    def can_answer(self) -> bool:
        if self.reply is not None and self.reply.Test():
            self.reply = None
        return self.reply is None
