"""Steps in blocks, each ended by a mean of models: what `bmuf` and `gossip_bmuf` share.

Notation    s       -> snapshot, theta at the end of a block, (P,)
            wbar    -> wbar, mean of the s of some ranks, (P,)                 (1)
            g       -> momentum.start_point, wbar filtered: block_momentum.py (2) to (7)
            d       -> delay, steps
Update      theta <- theta + (g - s)    d steps after the block's end          (8)
            Without `delay` theta is s: theta <- g. Without a filter g is wbar.
Messages    the mean is on its way during d steps.

            step step |=snapshot==> step step <==mean=| (8) step step
Invariants  (2) to (7) do not read theta, and (8) comes at a fixed step: when messages
            arrive changes no bit. (8) preserves what the d steps have learned.
            In another wire format than float32 what did not travel is in no mean: who
            has one keeps it for the next.
Cost        with `delay`, and in `bmuf` in another wire format, two copies of the model:
            s, and wbar.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from typing import Any

import numpy as np

from mpilm.learner.flat import Layout
from mpilm.storage.merged import Merged
from mpilm.storage.saved import State
from mpilm.strategies.base import Learner, Strategy
from mpilm.strategies.block_momentum import BlockMomentum
from mpilm.strategies.leave_out import LEAVING, LeaveOut
from mpilm.strategies.shared_rows import SharedRows
from mpilm.vectors import chunked, copy_of, to_array
from mpilm.world.base import World

AUTOMATIC = -1.0  # eta: what makes up for the mean


class BlockStrategy(Strategy):
    """Local steps in blocks; each ends with a mean, of whom the subclass says.

    Args:
        parts: what has blocks of its own, see `cut`.
        filtered: whether there is a filter.

    steps       minibatches so far
    moved       bytes sent so far, and as many received
    components  slices of each component of the model
    momentum    the filter; None: none, (8) is theta <- theta + (wbar - s)
    apart       whether these two lie apart from theta: with `delay`, or if `must_part`
    snapshot    s, (P,)
    wbar        (1), (P,)
    under_way   component -> what `start_mean` returned, for each of its slices
    applies_at  (C,) int64, step of (8) of each component; -1: none ahead
    num_means   means of a component that have come
    """

    synchronises = True
    survives = True

    def __init__(
        self, world: World, config: Any, *, parts: str | int, filtered: bool
    ) -> None:
        super().__init__(world, config)
        self.eta = self.eta_on(world.size)
        self.parts, self.filtered = parts, filtered
        self.delay = config.delay if world.size > 1 else 0
        self.apart = self.delay > 0 or self.must_part
        self.steps = self.moved = self.num_means = 0
        self.components: list[tuple[slice, ...]] = []
        self.momentum: BlockMomentum | None = None
        self.snapshot: Any = None
        self.wbar: Any = None
        self.under_way: dict[int, list[Any]] = {}
        self.saves = ("moved", "steps", *(LEAVING if config.leave_out else ()))
        if filtered:
            self.saves += ("momentum.delta", "momentum.start_point")
        self.lasting = ("momentum.delta", "momentum.start_point")
        if self.delay:  # received and filtered, perhaps not yet applied
            self.lasting += ("applies_at", "snapshot", "wbar")
            self.saves += ("applies_at", "snapshot", *(() if filtered else ("wbar",)))

    @abstractmethod
    def automatic_eta(self, size: int) -> float:
        """Return the block momentum that makes up for the mean on `size` ranks."""

    def eta_on(self, size: int) -> float:
        """Return the block momentum on `size` ranks."""
        eta = float(self.config.eta)
        return self.automatic_eta(size) if eta == AUTOMATIC else eta

    @property
    def must_part(self) -> bool:
        """Whether s and wbar lie apart even without `delay`: who sends something else
        than theta must have theta when a death ends the sum.
        """
        return False

    def start(self, learner: Learner) -> None:
        super().start(learner)
        config, theta = self.config, learner.theta
        self.components = cut(learner.layout, self.parts)
        self.applies_at = np.full(len(self.components), -1, np.int64)
        if self.config.leave_out:
            self.leaving = LeaveOut(self.config.leave_out, len(self.components))
        if self.filtered:
            self.momentum = BlockMomentum(
                theta, eta=self.eta, zeta=config.zeta, momentum=config.momentum
            )
        self.rows = SharedRows(self.comm, learner.layout)
        self.snapshot = copy_of(theta) if self.apart else theta
        self.wbar = copy_of(theta) if self.apart else theta

    def step(self, learner: Learner) -> Any:
        loss = learner.gradient()
        learner.update()
        self.rows.touch(learner)
        self.steps += 1
        ending = self.ending()
        if self.leaving:
            self.leaving.note(loss)
            if ending:
                self.leaving.begin_round(learner.theta)
        for number in ending:
            self.end_block(learner, number)
        for number in np.flatnonzero(self.applies_at == self.steps).tolist():
            self.apply(learner, number)
        return loss

    def ending(self) -> list[int]:
        """Return the components whose block ends now, the same on all ranks."""
        return due(self.steps, self.config.period, len(self.components), stagger=False)

    def end_block(self, learner: Learner, number: int) -> None:
        """Start the mean of a component.

        Communicates: as `start_mean`.
        """
        if self.applies_at[number] >= 0:  # resumed with a shorter period
            self.apply(learner, number)
        for where in self.components[number] if self.apart else ():
            self.snapshot[where] = learner.theta[where]
        self.under_way[number] = [
            self.start_mean(number, where) for where in self.components[number]
        ]
        self.applies_at[number] = self.steps + self.delay

    def apply(self, learner: Learner, number: int) -> None:
        """Let the learner go on from a component's filtered mean (8).

        Communicates: what `end_mean` does, if it was not received yet.
        """
        self.receive(number)
        self.applies_at[number] = -1
        goal = self.wbar if self.momentum is None else self.momentum.start_point
        is_out = self.leaving is not None and bool(self.leaving.out_C[number])
        for where in self.components[number]:
            self.show(where)
            parts = [vector[where] for vector in (learner.theta, self.snapshot, goal)]
            if is_out:
                parts[0][:] = parts[2]  # what it has learned is not to be used
                continue
            for theta, s, g in chunked(*parts) if self.apart else ():
                theta -= s
                theta += g  # (8)
        if is_out:
            self.leaving.forget()
            learner.reset_moments()

    def receive(self, number: int) -> None:
        """Receive and filter a component's mean, if it is under way."""
        if number not in self.under_way:
            return
        plain = self.is_plain(int(self.applies_at[number]) - self.delay)
        parts = zip(self.under_way.pop(number), self.components[number], strict=True)
        for mean, where in parts:
            self.end_mean(mean, where)  # (1)
            if self.momentum is not None:
                self.momentum.filter_(where, self.wbar[where], plain=plain)
        self.num_means += 1

    def show(self, where: slice) -> None:
        """Show the observer, if there is one, W of a part."""
        if self.on_synchronised is None:
            return
        part = self.wbar[where]
        if self.momentum is None:
            self.synchronised(where, part)
            return
        self.momentum.model_(part, where)
        self.synchronised(where, part)
        part[:] = self.momentum.start_point[where]

    @abstractmethod
    def start_mean(self, number: int, where: slice) -> Any:
        """Start the mean of a part of `snapshot`, a slice of component `number`."""

    @abstractmethod
    def end_mean(self, started: Any, where: slice) -> None:
        """Write what was started into that part of `wbar`. Blocking."""

    def is_plain(self, step: int) -> bool:
        """Return whether a block that ended at `step` is not filtered."""
        return False

    def receive_all(self) -> None:
        """Receive and filter what is under way; the learner gets it in its time."""
        for number in list(self.under_way):
            self.receive(number)

    def finish(self, learner: Learner) -> None:
        self.receive_all()

    def state(self) -> State:
        """Return the state; it waits for what is under way, on all ranks alike."""
        self.receive_all()
        return super().state()

    @property
    def exchanged(self) -> Any:
        return self.averages(self.num_means)["partners"]

    @property
    def is_settled(self) -> bool:
        return bool((self.applies_at < 0).all())

    def survive(self, learner: Learner) -> None:
        """Forget the means under way: what was learned stays in theta."""
        super().survive(learner)
        self.applies_at[list(self.under_way)] = -1
        self.under_way.clear()

    def take_over(self, learner: Learner, merged: Merged) -> None:
        """Go on from the means of g and Delta, so that W stays, whatever eta is now."""
        super().take_over(learner, merged)
        for number in np.flatnonzero(self.applies_at >= 0).tolist():
            self.apply(learner, number)
        momentum = self.momentum
        if momentum is not None and momentum.is_nesterov:
            more = momentum.delta * (self.eta - self.eta_on(merged.size))
            momentum.start_point += more  # (7)
            learner.theta += more

    def filtered_model_(self, learner: Learner, out: Any) -> None:
        """Write W into `out`, what the last whole block came to; unfiltered theta."""
        self.receive_all()
        if self.momentum is None:
            out[:] = learner.theta
        else:
            self.momentum.model_(out)

    def conserved(self, learner: Learner) -> Any:
        """Return what the learners' steps change, (P,) float64; None after a warm-up.

        To what the filter conserves comes what was learned since: theta - g, or before
        (8) theta - s.
        """
        momentum = self.momentum
        if momentum is None:
            return super().conserved(learner)
        if self.is_plain(1) and not momentum.is_plain:
            return None
        learned = to_array(learner.theta).astype(np.float64)
        for slices, at in zip(self.components, self.applies_at, strict=True):
            for where in slices:
                began = momentum.start_point if at < 0 else self.snapshot
                learned[where] -= to_array(began[where])
        return momentum.conserved() + learned

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        return self.moved, self.moved


def cut(layout: Layout, parts: str | int) -> list[tuple[slice, ...]]:
    """Return the slices of each component: "layers", "whole", or so many equal slices.

    Tied weights lie in the flat vector once, so they are in one component.

    >>> cut(Layout.of([("a", (3,), "a"), ("b", (4,), "b")]), 2)
    [(slice(0, 3, None),), (slice(3, 7, None),)]
    """
    if parts == "layers":
        return list(layout.components.values())
    count = 1 if parts == "whole" else int(parts)
    ends = [index * layout.size // count for index in range(count + 1)]
    return [(slice(*pair),) for pair in pairwise(ends)]


def due(steps: int, period: int, num_components: int, stagger: bool) -> list[int]:
    """Return the components whose block ends after `steps` minibatches.

    Staggered, their blocks are as long but end evenly spread over the period; the first
    block of each is shorter.

    >>> [due(steps, 4, 2, stagger=True) for steps in (1, 2, 3, 4, 5, 6)]
    [[], [1], [], [0], [], [1]]
    """
    if not stagger:
        return list(range(num_components)) if steps % period == 0 else []
    return [
        component
        for component in range(num_components)
        if (steps - component * period // num_components) % period == 0
    ]


def check_blocks(config: Any) -> None:
    """Raise ValueError unless the settings of blocks go with each other."""
    if config.leave_out and getattr(config, "stagger", False):
        raise ValueError("leave_out: judges whole blocks: stagger must be false")
    if config.eta != AUTOMATIC and not 0.0 <= config.eta < 1.0:
        raise ValueError(f"eta: {config.eta} is neither in [0, 1) nor -1 (automatic)")
    if config.delay >= config.period:
        raise ValueError(
            f"delay: {config.delay} steps are not less than period = {config.period}"
        )
