"""The stall inspector: who has not come to a collective that others wait in?

Every rank counts, for every communicator, the collectives it has entered. A rank that
has waited longer than its waits so far let one expect (world/waits.py) asks all others
for their count, over a communicator kept for this:

    rank 0   Allreduce #7 ....... 60 s ... ask -----> <--- answers   "for ranks 2, 5"
    rank 2   (computes)                      | #6 -->|
    rank 5   (dead)                          |       no answer

Progress threads ask and answer, so a rank whose learner is stuck still answers, and a
rank that does not answer is named all the same. One that does not answer for very long
(suspended, cut off, dead without anybody's notice) ends all. Nothing here ever blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np

from mpilm.errors import say
from mpilm.world.mpi.clock import clock
from mpilm.world.parts import named_ranks
from mpilm.world.waits import LEAST, WaitLimits

NOBODYS = -1  # the communicator in a question about a wait that is no collective
QUESTION, ANSWER = 1, 2  # tags: (token, communicator, 0), (token, entered, waited_us)
ANSWER_S = 2.0  # a live progress thread answers within milliseconds; chosen, not tuned
SENIOR = 0.75  # a lower rank that has waited for this share of our time will report
AFTER_S = 5.0  # the lowest rank that is left ends the run, the others so much later
# A process that was suspended itself must not take that time for the others' silence.
MOST_TICK_S = 1.0

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


@dataclass(eq=False, slots=True)
class Waiting:
    """A wait that the inspector watches.

    what      for people
    comm      the communicator, if it is a collective
    number    which of its collectives, from 1
    inside    all have come; it is MPI's own call that lasts
    """

    what: str
    comm: Watched | None = None
    number: int = 0
    inside: bool = False
    since_s: float = 0.0
    report_s: float = 0.0  # when to report next; 0: by the limit of its kind
    asked_s: float = 0.0  # 0: no question is open
    token: int = 0
    answers: dict[int, Answer] | None = None  # by rank in the world

    @property
    def kind(self) -> tuple[str, int, bool]:
        """Waits of one kind are alike: the same call on the same communicator."""
        if self.comm is None:
            return self.what.partition(" (")[0], NOBODYS, False
        return self.what, self.comm.key, self.inside


class Watch(AbstractContextManager[None]):
    """One wait, while it lasts; every collective makes one, so it costs 1 us."""

    __slots__ = ("limits", "waiting", "waits")

    def __init__(
        self, waiting: Waiting, waits: dict[int, Waiting], limits: WaitLimits
    ) -> None:
        self.waiting, self.waits, self.limits = waiting, waits, limits

    def __enter__(self) -> None:
        waiting = self.waiting
        waiting.since_s, waiting.report_s = clock(), 0.0
        self.waits[id(waiting)] = waiting

    def __exit__(self, *_: object) -> None:
        waiting = self.waiting
        del self.waits[id(waiting)]
        self.limits.note(waiting.kind, clock() - waiting.since_s)


class StallInspector:
    """Reports waits that last too long; one per world.

    Args:
        control: communicator of the same ranks as the world, for questions only.
        stall_s: seconds of waiting before the first report, as long as waits of that
            kind are not known; 0: never.
        abort_s: seconds of waiting before `abort`; 0: never.
        silence_s: seconds for which a rank has not answered, while others wait, before
            `abort`; 0: never.
        abort: ends all ranks.
        last_words: what people are told then, after a comma.
    """

    def __init__(
        self,
        control: Any,
        *,
        stall_s: float,
        abort_s: float,
        silence_s: float,
        abort: Callable[[], None],
        last_words: Callable[[], str],
    ) -> None:
        self.control, self.rank = control, control.rank
        self.stall_s, self.abort_s, self.abort = stall_s, abort_s, abort
        self.silence_s, self.last_words = silence_s, last_words
        self.limits = WaitLimits(stall_s)
        self._silent_s: dict[int, float] = {}  # by world rank that owes an answer
        self._ticked_s = clock()
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

    def watching(self, waiting: Waiting | None) -> AbstractContextManager[None]:
        """Watch the wait that the block is; None: watch nothing."""
        if waiting is None or not (self.stall_s or self.abort_s or self.silence_s):
            return nullcontext()
        return Watch(waiting, self._waits, self.limits)

    def tick(self, now_s: float) -> None:
        """Answer questions, and see to waits that last too long. Never blocks."""
        self.answer()
        self._sends = [(sent, data) for sent, data in self._sends if not sent.Test()]
        passed_s, self._ticked_s = now_s - self._ticked_s, now_s
        for member in self._silent_s:
            self._silent_s[member] += min(passed_s, MOST_TICK_S)
        for waiting in list(self._waits.values()):
            if now_s < (waiting.report_s or self._first_report_s(waiting, now_s)):
                if self.silence_s and self._silent_s and waiting.report_s:
                    self._end_if_silent(waiting)
            elif self.control.size == 1:
                self._report(waiting, now_s, waiting.what)
            elif not waiting.asked_s:
                self._ask(waiting, now_s)
            elif (
                len(waiting.answers or ()) == len(self._others(waiting))
                or now_s > waiting.asked_s + ANSWER_S
            ):
                self._judge(waiting, now_s)

    def _first_report_s(self, waiting: Waiting, now_s: float) -> float:
        """Return when to look at a wait for the first time."""
        limits = [s for s in (self.abort_s, self.silence_s) if s > 0.0]
        if self.stall_s:
            if now_s - waiting.since_s < LEAST * min([self.stall_s, *limits]):
                return math.inf
            limits.append(self.limits.limit_s(waiting.kind))
        return waiting.since_s + min(limits)

    def _others(self, waiting: Waiting) -> list[int]:
        """Return the world ranks to ask about a wait: who may be missing, or all."""
        found = range(self.control.size)
        members = found if waiting.comm is None else waiting.comm.members
        return [member for member in members if member != self.rank]

    def _end_if_silent(self, waiting: Waiting) -> None:
        """End all ranks if one owes an answer for too long, and somebody waits."""
        others = self._others(waiting)
        silent = [r for r in others if self._silent_s.get(r, 0.0) >= self.silence_s]
        if not silent:
            return
        is_lowest = self.rank < min({*others} - {*silent}, default=math.inf)
        longest_s = max(self._silent_s[rank] for rank in silent)
        if not is_lowest and longest_s < self.silence_s + AFTER_S:
            return
        say(
            f"rank {self.rank}: no answer from {named_ranks(silent)} for"
            f" {longest_s:.0f} s, waiting in or for {waiting.what};"
            f" ends{self.last_words()}"
        )
        self.abort()

    def answer(self) -> None:
        """Take all control messages that have come; answer the questions."""
        from mpi4py import MPI

        status = MPI.Status()
        while (message := self.control.Improbe(status=status)) is not None:
            data = np.empty(3, np.int64)
            message.Recv(data)
            source, (token, first, second) = status.Get_source(), data.tolist()
            self._silent_s.pop(source, None)
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
            if waiting.token == token and waiting.answers is not None:
                waiting.answers[source] = answer

    def _send(self, dest: int, tag: int, *values: int) -> None:
        data = np.array(values, np.int64)
        self._sends.append((self.control.Isend(data, dest, tag), data))

    def _ask(self, waiting: Waiting, now_s: float) -> None:
        self._token += 1
        waiting.token, waiting.asked_s, waiting.answers = self._token, now_s, {}
        key = waiting.comm.key if waiting.comm is not None else NOBODYS
        for member in self._others(waiting):
            self._send(member, QUESTION, waiting.token, key, 0)
            self._num_open += 1
            self._silent_s.setdefault(member, 0.0)

    def _judge(self, waiting: Waiting, now_s: float) -> None:
        """Report the ranks that are missing, unless a lower rank will."""
        senior_s = SENIOR * (waiting.asked_s - waiting.since_s)
        waiting.asked_s = 0.0
        missing, answers = [], waiting.answers or {}
        silent = [other for other in self._others(waiting) if other not in answers]
        comm = waiting.comm
        for rank, member in enumerate(comm.members if comm else ()):
            if member == self.rank or comm is None:
                continue
            entered, waited_s = answers.get(member, (0, 0.0))
            if entered < waiting.number:
                missing.append(member)
            elif rank < comm.rank and waited_s >= senior_s:
                self._postpone(waiting, now_s)
                return
        if comm is not None and not missing and not waiting.inside:
            self._postpone(waiting, now_s)  # they came while we asked
            return
        text = f"{'inside' if waiting.inside else 'in'} {waiting.what}"
        if comm is None:
            text = f"for {waiting.what}"
        elif missing and not waiting.inside:
            text += f" for {named_ranks(missing)}"
        if silent:
            text += f" (no answer from {named_ranks(silent)}{self.last_words()})"
        self._report(waiting, now_s, text)

    def _report(self, waiting: Waiting, now_s: float, text: str) -> None:
        waited_s = now_s - waiting.since_s
        ends = 0.0 < self.abort_s <= waited_s
        if ends:
            text += "; aborting"
        if ends or self.stall_s:
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
