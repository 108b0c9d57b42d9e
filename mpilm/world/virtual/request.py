"""An operation that is under way in the virtual world; the engine completes it."""

from __future__ import annotations

from typing import Any

from mpilm.world.base import Request
from mpilm.world.virtual.engine import NETWORK, Engine, RankState, VirtualActivity


class VirtualRequest(Request):
    """An operation of one rank. Its `str` is for reports."""

    def __init__(self, engine: Engine, state: RankState) -> None:
        self.engine, self.state = engine, state
        self.done = False
        self.admitted = False  # Test has said so
        self.is_learners = engine.active(state).is_learner
        if self.is_learners:
            if state.num_in_flight == 0:
                state.in_flight_since_s = engine.now_s
            state.num_in_flight += 1
        self.waiting: list[VirtualActivity] = []

    def complete(self, _: Any = None) -> None:
        """Mark it done; wake whoever waits for it."""
        if self.is_void():
            return
        self.done = True
        state = self.state
        if self.is_learners:
            state.num_in_flight -= 1
            if state.num_in_flight == 0:
                now_s = self.engine.now_s
                state.traffic.in_flight_s += now_s - state.in_flight_since_s
        for activity in self.waiting:
            activity.wake()
        state.changed()

    def is_void(self) -> bool:
        """Return whether it belongs to a world that is no more."""
        return False

    def Test(self) -> bool:
        if not self.done or (not self.admitted and self.is_denied()):
            self.state.require_alive(self.engine.active(self.state))
            self.engine.polled()
            return False
        self.admitted = True
        return True

    def is_denied(self) -> bool:
        """Return whether Test says no though it is done; all look again later."""
        rare = self.engine.rare
        if rare is None or not rare.happens("not_yet"):
            return False
        later_s = self.engine.now_s + rare.pause_s * rare.draw.random()
        self.engine.at(later_s, NETWORK, self.look_again, None)
        return True

    def look_again(self, _: Any) -> None:
        """Let whoever asked and was told no ask again."""
        self.state.changed()

    def Wait(self) -> None:
        self.wait(counts=True)

    def wait(self, *, counts: bool) -> None:
        """Block until it is done; see `VirtualActivity.block`."""
        activity = self.engine.active(self.state)
        activity.may_block()
        if not self.done:
            self.state.require_alive(activity)
            self.waiting.append(activity)
            try:
                activity.block(self, counts=counts)
            except BaseException:  # a death; it may be done all the same, later
                self.waiting.remove(activity)
                raise
