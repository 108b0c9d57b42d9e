"""The stall inspector: who has not come to a collective that others wait in?

Every rank counts, for every communicator, the collectives it has entered. A rank that
has waited too long asks all others for their count, over a communicator kept for this:

    rank 0   Allreduce #7 ....... 60 s ... ask -----> <--- answers   "for ranks 2, 5"
    rank 2   (computes)                      | #6 -->|
    rank 5   (dead)                          |       no answer

Progress threads ask and answer, so a rank whose learner is stuck still answers, and a
rank that does not answer is named all the same. Nothing here ever blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np

from mpilm.errors import say
from mpilm.world.mpi.clock import clock
from mpilm.world.parts import named_ranks

QUESTION, ANSWER = 1, 2  # tags: (token, communicator, 0), (token, entered, waited_us)
ANSWER_S = 2.0  # a live progress thread answers within milliseconds; chosen, not tuned
SENIOR = 0.75  # a lower rank that has waited for this share of our time will report

Answer = tuple[int, float]  # collectives entered, seconds waited in the last one


class Watched(Protocol):
    """A communicator, as far as the inspector looks at it.

    key      the same number on all ranks of the group, another for each communicator
    members  the world ranks of the group, in its order
    entered  collectives that this rank has entered
    """

    rank: int
    size: int
    key: int
    members: list[int]
    entered: int


@dataclass(eq=False)
class Waiting:
    """A wait that the inspector watches.

    what      for people
    comm      the communicator, if it is a collective
    number    which of its collectives, from 1
    """

    what: str
    comm: Watched | None = None
    number: int = 0
    since_s: float = 0.0
    report_s: float = 0.0  # when to report next
    asked_s: float = 0.0  # 0: no question is open
    token: int = 0
    answers: dict[int, Answer] = field(default_factory=dict)  # by rank in `comm`


class StallInspector:
    """Reports waits that last too long; one per world.

    Args:
        control: communicator of the same ranks as the world, for questions only.
        stall_s: seconds of waiting before the first report; 0: never.
        abort_s: seconds of waiting before `abort`; 0: never.
        abort: ends all ranks.
    """

    def __init__(
        self,
        control: Any,
        *,
        stall_s: float,
        abort_s: float,
        abort: Callable[[], None],
    ) -> None:
        self.control, self.rank = control, control.rank
        self.stall_s, self.abort_s, self.abort = stall_s, abort_s, abort
        self.comms: WeakValueDictionary[int, Watched] = WeakValueDictionary()
        self._waits: dict[int, Waiting] = {}
        self._sends: list[tuple[Any, np.ndarray]] = []
        self._token = 0
        self._num_open = 0  # questions that were not answered yet

    @property
    def idle(self) -> bool:
        """Whether all questions asked here were answered."""
        return self._num_open == 0

    def register(self, comm: Watched) -> None:
        """Answer questions about `comm`."""
        self.comms[comm.key] = comm

    def waiting_for(self, what: str) -> Waiting:
        """Return a wait that is no collective."""
        return Waiting(what)

    @contextmanager
    def watching(self, waiting: Waiting | None) -> Iterator[None]:
        """Watch the wait that the block is; None: watch nothing."""
        limits = [s for s in (self.stall_s, self.abort_s) if s > 0.0]
        if waiting is None or not limits:
            yield
            return
        waiting.since_s = clock()
        waiting.report_s = waiting.since_s + min(limits)
        self._waits[id(waiting)] = waiting
        try:
            yield
        finally:
            del self._waits[id(waiting)]

    def tick(self, now_s: float) -> None:
        """Answer questions, and see to waits that last too long. Never blocks."""
        self.answer()
        self._sends = [(sent, data) for sent, data in self._sends if not sent.Test()]
        for waiting in list(self._waits.values()):
            if now_s < waiting.report_s:
                continue
            if waiting.comm is None:
                self._report(waiting, now_s, waiting.what)
            elif not waiting.asked_s:
                self._ask(waiting, now_s)
            elif (
                len(waiting.answers) == waiting.comm.size - 1
                or now_s > waiting.asked_s + ANSWER_S
            ):
                self._judge(waiting, waiting.comm, now_s)

    def answer(self) -> None:
        """Take all control messages that have come; answer the questions."""
        from mpi4py import MPI

        status = MPI.Status()
        while (message := self.control.Improbe(status=status)) is not None:
            data = np.empty(3, np.int64)
            message.Recv(data)
            source, (token, first, second) = status.Get_source(), data.tolist()
            if status.Get_tag() == QUESTION:
                self._send(source, ANSWER, token, *self._standing(first))
            else:
                self._num_open -= 1
                self._take_answer(source, token, (first, second * 1e-6))

    def _standing(self, key: int) -> tuple[int, int]:
        """Return how many collectives are entered here, and microseconds waited."""
        comm = self.comms.get(key)
        if comm is None:
            return 0, 0
        for waiting in list(self._waits.values()):
            if waiting.comm is comm and waiting.number == comm.entered:
                return comm.entered, int((clock() - waiting.since_s) * 1e6)
        return comm.entered, 0

    def _take_answer(self, source: int, token: int, answer: Answer) -> None:
        for waiting in list(self._waits.values()):
            if waiting.comm is not None and waiting.token == token:
                waiting.answers[waiting.comm.members.index(source)] = answer

    def _send(self, dest: int, tag: int, *values: int) -> None:
        data = np.array(values, np.int64)
        self._sends.append((self.control.Isend(data, dest, tag), data))

    def _ask(self, waiting: Waiting, now_s: float) -> None:
        self._token += 1
        waiting.token, waiting.asked_s, waiting.answers = self._token, now_s, {}
        assert waiting.comm is not None
        for member in waiting.comm.members:
            if member != self.rank:
                self._send(member, QUESTION, waiting.token, waiting.comm.key, 0)
                self._num_open += 1

    def _judge(self, waiting: Waiting, comm: Watched, now_s: float) -> None:
        """Report the ranks that are missing, unless a lower rank will."""
        senior_s = SENIOR * (waiting.asked_s - waiting.since_s)
        waiting.asked_s = 0.0
        missing, silent = [], []
        for rank, member in enumerate(comm.members):
            if rank == comm.rank:
                continue
            entered, waited_s = waiting.answers.get(rank, (0, 0.0))
            if entered < waiting.number:
                missing.append(member)
                if rank not in waiting.answers:
                    silent.append(member)
            elif rank < comm.rank and waited_s >= senior_s:
                self._postpone(waiting, now_s)
                return
        if not missing:  # they came while we asked
            self._postpone(waiting, now_s)
            return
        text = f"in {waiting.what} for {named_ranks(missing)}"
        if silent:
            text += f" (no answer from {named_ranks(silent)})"
        self._report(waiting, now_s, text)

    def _report(self, waiting: Waiting, now_s: float, text: str) -> None:
        waited_s = now_s - waiting.since_s
        if not waiting.comm:
            text = f"for {text}"
        ends = 0.0 < self.abort_s <= waited_s
        if ends:
            text += "; aborting"
        say(f"rank {self.rank}: waiting {waited_s:.0f} s {text}")
        if ends:
            self.abort()
        self._postpone(waiting, now_s)

    def _postpone(self, waiting: Waiting, now_s: float) -> None:
        """Report again after as long as it has lasted, or when it is time to abort."""
        waiting.report_s = 2 * now_s - waiting.since_s
        abort_at_s = waiting.since_s + self.abort_s
        if now_s < abort_at_s < waiting.report_s:
            waiting.report_s = abort_at_s
