"""The engine of the virtual world: one heap of events, one greenlet per activity.

    heap of (time_s, priority, sequence) -> action

The heap alone decides who runs. At equal times, the network goes before the
activities (whoever looks sees all that has arrived), then what was announced first.
An activity runs until it blocks: it announces its own return, or leaves that to
whoever it waits for, and switches to the engine. Nothing else switches.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Any, NoReturn, TypeVar

from greenlet import (  # type: ignore[import-untyped]
    GreenletExit,
    getcurrent,
    greenlet,
)

from mpilm.errors import MpilmError, RanksDiedError, WorldError
from mpilm.world.base import Activity, Traffic
from mpilm.world.virtual.rare import Rare

T = TypeVar("T")

NETWORK, ACTIVITY = 0, 1  # priorities
CLOCK = "the clock"
LATE = "late_start"
MAX_POLLS = 100_000  # answers "not yet" to an activity that never lets time pass
MAX_REPORTED = 64  # ranks in a report of a deadlock


class Died(BaseException):
    """Ends an activity whose rank has died, or whose world is no more."""


class Engine:
    """Virtual time, and who runs in it; `rare`: which rare branches are taken."""

    def __init__(self, rare: Rare | None = None) -> None:
        self.rare = rare
        self.now_s = 0.0
        self.num_events = 0
        self.begun = False
        self.ended = False  # nothing can block any more
        self.ranks: list[RankState] = []
        self.current: VirtualActivity | None = None
        self.hub = getcurrent()
        self._heap: list[tuple[float, int, int, Callable[[Any], None], Any]] = []
        self._sequence = count().__next__

    def at(
        self, time_s: float, priority: int, action: Callable[[Any], None], subject: Any
    ) -> None:
        """Announce `action(subject)` for `time_s`."""
        heappush(self._heap, (time_s, priority, self._sequence(), action, subject))

    def begin(self) -> None:
        """Make the caller the one to whom blocking activities switch.

        Raises:
            WorldError: it has begun before.
        """
        if self.begun:
            raise WorldError("a simulation runs only once")
        self.begun = True
        self.hub = getcurrent()

    def run(self) -> None:
        """Run until nothing is announced any more.

        Raises:
            WorldError: the first failure of a rank, or a deadlock.
        """
        heap = self._heap
        torch = sys.modules.get("torch")
        grad_enabled = torch is None or torch.is_grad_enabled()
        try:
            while heap:
                self.now_s, _, _, action, subject = heappop(heap)
                self.num_events += 1
                action(subject)
            self._raise_unless_finished()
        finally:
            self._end()
            torch = sys.modules.get("torch")
            if torch is not None:
                torch.set_grad_enabled(grad_enabled)

    def resume(self, activity: VirtualActivity) -> None:
        """Let `activity` go on until it blocks or ends."""
        activity.is_woken = False
        if activity.state.is_dead:
            return
        self.current = activity
        activity.greenlet.switch()
        self.current = None
        error = activity.error
        if error is not None and (
            activity.is_learner or not isinstance(error, Exception)
        ):
            raise_failure(activity, error)

    def active(self, state: RankState) -> VirtualActivity:
        """Return the activity that runs now, which must be one of this rank.

        Raises:
            WorldError: it is not.
        """
        activity = self.current
        if activity is None or activity.state is not state:
            raise WorldError(
                f"the world of rank {state.rank} can be used only by its own"
                " activities, while run_virtual runs"
            )
        return activity

    def polled(self) -> None:
        """Note an answer "not yet".

        Raises:
            WorldError: the activity asks for ever, and time stands still.
        """
        activity = self.current
        if activity is not None:
            activity.num_polls += 1
            if activity.num_polls > MAX_POLLS:
                raise WorldError(
                    "asks again and again without letting time pass; use world.wait"
                )

    def blocked(self) -> list[str]:
        """Return one line for each rank with an activity that cannot go on."""
        lines = []
        for state in self.ranks:
            if state.is_dead:
                continue
            waits = [
                f"{activity.name} waits for {activity.waits_for}"
                for activity in state.activities
                if not activity.finished
            ]
            if waits:
                lines.append(f"rank {state.rank}: {'; '.join(waits)}")
        return lines

    def _raise_unless_finished(self) -> None:
        for state in self.ranks:
            for activity in () if state.is_dead else state.activities:
                if activity.error is not None and not activity.reported:
                    raise_failure(activity, activity.error)
        lines = self.blocked()
        if lines:
            hidden = len(lines) - MAX_REPORTED
            more = [f"and {hidden} more ranks"] if hidden > 0 else []
            raise WorldError(
                "\n  ".join(
                    [
                        f"deadlock at {self.now_s:.6g} s of virtual time",
                        *lines[:MAX_REPORTED],
                        *more,
                    ]
                )
            )

    def _end(self) -> None:
        """Unwind the activities that are left."""
        self.ended = True
        for state in self.ranks:
            for activity in list(state.activities):
                if activity.greenlet:  # has begun and not ended
                    self.current = activity
                    activity.greenlet.throw()
        self.current = None


class RankState:
    """What the engine keeps of one rank.

    activities  its learner, and whatever else has not ended or ended in an error
    ports       send_free_s, receive_free_s: when its two ports are free again, seconds
    watchers    activities in `world.wait`, to be woken by any change on this rank
    is_dead     it takes part in nothing any more
    death       what its activities are told, until it has left the dead behind
    generation  how often it has gone on with other ranks
    in_flight   num_in_flight, in_flight_since_s: the learner's calls under way
    owed_s      what its last step computes after the gradient, if that is to come yet
    """

    def __init__(self, rank: int, node: int, seed: int) -> None:
        self.rank = rank
        self.node = node
        self.traffic = Traffic()
        self.activities: list[VirtualActivity] = []
        self.watchers: list[VirtualActivity] = []
        self.is_dead = False
        self.death: RanksDiedError | None = None
        self.generation = 0
        self.send_free_s = 0.0
        self.receive_free_s = 0.0
        self.last_arrival_s: dict[int, float] = {}  # by destination
        self.num_steps = 0
        self.num_taken = 0  # messages that had to be asked for
        self.num_in_flight = 0
        self.in_flight_since_s = 0.0
        self.owed_s = 0.0
        # apart, so that a rank's steps do not depend on what it sends
        self.step_random = random.Random(f"mpilm step {seed} {rank}").random
        self.link_random = random.Random(f"mpilm link {seed} {rank}").random

    def tell(self, death: RanksDiedError) -> None:
        """Let all that it waits for be over: a rank has died."""
        self.death = death
        self.watchers.clear()
        for activity in self.activities:
            activity.joiners.clear()
            if activity.waits_for != CLOCK and not activity.is_woken:
                activity.wake()

    def leave_behind(self) -> None:
        """Go on without the dead; what was begun with them ends when it is resumed."""
        self.death = None
        self.generation += 1
        for activity in self.activities:
            activity.is_left_behind = not activity.is_learner

    def require_alive(self, activity: VirtualActivity) -> None:
        """Raise if a rank has died and is not left behind yet.

        Raises:
            RanksDiedError: in the learner.
            Died: in its other activities, which end; though the learner go on since.
        """
        if activity.is_left_behind:
            raise Died
        if self.death is not None:
            raise self.death if activity.is_learner else Died

    def changed(self) -> None:
        """Let every activity in `world.wait` look again."""
        if self.watchers:
            watchers, self.watchers = self.watchers, []
            for activity in watchers:
                activity.wake()


class VirtualActivity(Activity):
    """A greenlet: the learner of a rank or what it started beside itself.

    is_left_behind  it was begun with ranks that have died: it ends
    """

    is_left_behind = False

    def __init__(
        self,
        engine: Engine,
        state: RankState,
        work: Callable[[], Any],
        name: str,
        *,
        is_learner: bool = False,
    ) -> None:
        self.engine, self.state, self.work, self.name = engine, state, work, name
        self.is_learner = is_learner
        self.greenlet = greenlet(self._run, parent=engine.hub)
        self.result: Any = None
        self.error: BaseException | None = None
        self.reported = False  # somebody has seen the error
        self.finished = False
        self.waits_for: Any = "its start"
        self.is_woken = False
        self.num_polls = 0
        self.joiners: list[VirtualActivity] = []
        self._inside = ""  # where blocking is forbidden
        state.activities.append(self)
        self.is_woken = True
        late_s = 0.0 if is_learner or not engine.rare else engine.rare.delay_s(LATE)
        engine.at(engine.now_s + late_s, ACTIVITY, engine.resume, self)

    def _run(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None:
            torch._C._set_grad_enabled(True)
        try:
            self.result = self.work()
        except Died:
            pass
        except BaseException as error:  # the engine raises it again
            self.error = error
        self.finished = True
        if self.error is None and not self.is_learner:
            self.state.activities.remove(self)
        for joiner in self.joiners:
            joiner.wake()
        self.state.changed()

    def wake(self) -> None:
        """Announce that it goes on now, unless that is announced already."""
        if self.is_woken:
            return
        engine = self.engine
        self.is_woken = True
        engine.at(engine.now_s, ACTIVITY, engine.resume, self)

    def may_block(self) -> None:
        """Every blocking call asks this first.

        Raises:
            WorldError: here nothing may block.
        """
        if self.engine.ended:
            raise GreenletExit
        if self.state.is_dead:
            raise Died
        if self._inside:
            raise WorldError(f"a blocking call inside {self._inside}")
        torch = sys.modules.get("torch")
        if torch is not None:
            if torch._C._current_graph_task_id() != -1:
                raise WorldError("a blocking call inside a backward pass")
            if torch.is_inference_mode_enabled():
                raise WorldError("a blocking call inside torch.inference_mode")

    def block(
        self,
        waits_for: Any,
        *,
        counts: bool = False,
        only_looked: bool = False,
        despite_death: bool = False,
    ) -> None:
        """Let others run until woken; the caller has asked `may_block`.

        Args:
            waits_for: what for; its `str` stands in the report of a deadlock.
            counts: it is communication that the activity waits for.
            only_looked: it did nothing since it last blocked that could concern the
                others of its rank.
            despite_death: it is what ends the time after one.
        """
        engine, state = self.engine, self.state
        if not only_looked:
            state.changed()
        self.waits_for = waits_for
        self.num_polls = 0
        before_s = engine.now_s
        torch = sys.modules.get("torch")
        # torch keeps this switch per thread, and all activities share the thread
        grad_enabled = torch is None or torch.is_grad_enabled()
        engine.hub.switch()
        torch = sys.modules.get("torch")
        if torch is not None:
            torch._C._set_grad_enabled(grad_enabled)
        if counts and self.is_learner:
            waited_s = engine.now_s - before_s
            state.traffic.blocked_s += waited_s
            if state.traffic.on_blocked is not None and waited_s > 0.0:
                state.traffic.on_blocked(waited_s)
        if self.is_left_behind or (waits_for != CLOCK and not despite_death):
            state.require_alive(self)

    def block_until(self, time_s: float) -> None:
        """Let others run until `time_s`; the caller has asked `may_block`."""
        self.engine.at(time_s, ACTIVITY, self.engine.resume, self)
        self.block(CLOCK)

    def catch_up(self) -> None:
        """Let the learner compute what its last step owes: before it sends, or goes on.

        What it begins to send after that cannot hide this time.
        """
        state = self.state
        if state.owed_s and self.is_learner and not self._inside:
            self.may_block()
            owed_s, state.owed_s = state.owed_s, 0.0
            self.block_until(self.engine.now_s + owed_s)

    def not_blocking(self, inside: str, call: Callable[..., T], *args: Any) -> T:
        """Return `call(*args)`, in which nothing may block."""
        outer, self._inside = self._inside, inside
        try:
            return call(*args)
        finally:
            self._inside = outer

    def join(self) -> None:
        activity = self.engine.active(self.state)
        activity.may_block()
        if not self.finished:
            self.joiners.append(activity)
            activity.block(f"the end of {self.name}", counts=True)
        if self.error is not None and not self.reported:
            self.reported = True
            raise self.error


def raise_failure(activity: VirtualActivity, error: BaseException) -> NoReturn:
    """Raise `error` with the rank's number in front, unless it is everywhere."""
    if not isinstance(error, Exception):  # an interrupt belongs to no rank
        raise error
    who = f"rank {activity.state.rank}"
    if not activity.is_learner:
        who += f", {activity.name}"
    if isinstance(error, MpilmError):
        text = str(error) if error.everywhere else f"{who}: {error}"
        raise type(error)(text, everywhere=error.everywhere) from error
    raise WorldError(f"{who}: {type(error).__name__}: {error}") from error
