"""What a rank did in the first steps of a run, as events of its log.

    step     from the beginning of a step to its end
    compute  the gradient, by `World.compute`
    wait     the learner did nothing but wait for communication

What is neither in a step is the update of the model and its mixing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mpilm.world.base import Notify, World

T = TypeVar("T")
Event = tuple[str, float, float, int]  # name, begin and end by the world's clock, step


class Timeline:
    """Notes the events of a rank's first steps.

    Args:
        world: this rank's.
        steps: minibatches to note, counted from the beginning of the run.
    """

    def __init__(self, world: World, steps: int) -> None:
        self.world, self.steps = world, steps
        self.events: list[Event] = []
        self.is_on = False
        self.number = 0

    @contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Note what happens in the block, if it is one of the first steps.

        Args:
            done: steps before this one.
        """
        if done >= self.steps:
            yield
            return
        traffic, began_s = self.world.traffic, self.world.now_s()
        self.is_on, self.number, traffic.on_blocked = True, done + 1, self.waited
        try:
            yield
        finally:
            self.is_on, traffic.on_blocked = False, None
        self.note("step", began_s)

    def compute(self, work: Callable[[Notify], T], ready: Notify | None = None) -> T:
        """Run `work` as `World.compute` does."""
        if not self.is_on:
            return self.world.compute(work, ready)
        began_s = self.world.now_s()
        result = self.world.compute(work, ready)
        self.note("compute", began_s)
        return result

    def waited(self, seconds: float) -> None:
        """Note a wait that ends now."""
        self.note("wait", self.world.now_s() - seconds)

    def note(self, name: str, began_s: float) -> None:
        """Note an event that ends now."""
        self.events.append((name, began_s, self.world.now_s(), self.number))

    def take(self) -> list[Event]:
        """Return what was noted since the last call."""
        found, self.events = self.events, []
        return found
