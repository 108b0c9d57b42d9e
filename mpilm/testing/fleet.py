"""Fleets of quadratic learners in the virtual world, trained by a strategy.

    ranks = fleet(lambda world: strategy("bmuf", world, period=4), 4, steps=40)
    ranks[0].learner.theta

Each rank has a quadratic of its own (learner/quadratic.py). Nothing may stay in flight:
a message that nobody received fails the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.learner.flat import Layout
from mpilm.learner.quadratic import ProtocolLearner
from mpilm.strategies.base import Strategy
from mpilm.world.base import World
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld
from mpilm.world.virtual.rare import Rare

Make = Callable[[World], Strategy]

# "words" has two slices that do not touch, as tied weights with a bias elsewhere have
LAYOUT = Layout.of(
    [
        ("embed.weight", (3, 4), "words"),
        ("lstm.weight", (9,), "lstm"),
        ("head.weight", (12,), "head"),
        ("softmax.bias", (7,), "words"),
    ]
)


def with_tables(layout: Layout, names: Collection[str]) -> Layout:
    """Return a layout in which the segments `names`, the last ones, are row tables."""
    segments = [replace(s, is_table=s.name in names) for s in layout]
    return Layout(tuple(segments))


ROWS = with_tables(
    Layout.of(
        [
            ("lstm.weight", (9,), "lstm"),
            ("head.weight", (12,), "head"),
            ("embed.weight", (7, 4), "embed"),
            ("softmax.weight", (5, 3), "softmax"),
            ("softmax.bias", (5,), "softmax"),
        ]
    ),
    {"embed.weight", "softmax.weight", "softmax.bias"},
)


class InFlightError(AssertionError):
    """Something is still under way at the end of a run."""


class Witness(ProtocolLearner):
    """A quadratic that remembers what its own steps have moved.

    moved  (P,) float64: the sum of all that `update` or a push added to the model
    """

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, **options)
        self.moved = np.zeros(size)

    def update(self) -> None:
        before = self.theta.astype(np.float64)
        super().update()
        self.moved += self.theta - before

    def watch(self, chosen: Strategy) -> None:
        """Count what `chosen.pushed(learner)` returns as well, if it has that.

        A strategy whose steps do not go through `update` returns them from `pushed`.
        """
        inner: Any = getattr(chosen, "inner", chosen)  # of `hierarchical`
        if self.layout.tables and hasattr(inner, "pushed_rows"):
            self.watch_rows(inner)
            return
        if not hasattr(inner, "pushed"):
            return
        pushed = inner.pushed

        def noted(learner: Any) -> Any:
            moved = self.moved.copy()  # without the local optimiser's step: it is u
            step = pushed(learner)
            self.moved = moved - step
            return step

        inner.pushed = noted

    def watch_rows(self, chosen: Any) -> None:
        """Count what `chosen.pushed_rows(learner)` returns: its rows as well."""
        pushed = chosen.pushed_rows

        def noted(learner: Any) -> Any:
            moved = self.moved.copy()
            u, rows = pushed(learner)
            moved[: len(u)] -= u
            for name, (ids, values) in rows.items():
                segment = self.layout[name]
                table = moved[segment.slice].reshape(segment.shape[0], -1)
                table[ids] -= values
            self.moved = moved
            return u, rows

        chosen.pushed_rows = noted


@dataclass
class Rank:
    """What one rank came to.

    first   model before the first step, (P,)
    final   what `final_model_` wrote, (P,)
    leads   steps ahead of the slowest rank, at the beginning of each
    saved   states, if they were to be kept
    mass    what the strategy conserves: before the first step, and at the end
    """

    world: VirtualWorld
    learner: Witness
    strategy: Any
    first: NDArray[np.float32]
    final: NDArray[np.float32]
    seconds: float  # of its steps
    leads: list[int]
    saved: dict[str, Any]
    bytes_sent: int
    bytes_received: int
    simulation: Simulation
    mass: tuple[Any, Any]
    ema: Any = None


@dataclass
class Training:
    """How the ranks of a fleet train; arguments as of `fleet`."""

    steps: list[int]
    parts: int = 1
    retire: bool = False
    save_at: int | None = None
    until_s: float | None = None
    done: list[int] = field(init=False)
    synced: list[int] = field(init=False)
    leads: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.done = [0] * len(self.steps)
        self.synced = [0] * len(self.steps)
        self.leads = [[] for _ in self.steps]

    def note_lead(self, rank: int) -> None:
        """Keep how many steps a rank is ahead of those that are still to come here."""
        busy = [
            n
            for n, passed in zip(self.done, self.synced, strict=True)
            if passed <= self.synced[rank]
        ]
        self.leads[rank].append(self.done[rank] - min(busy))

    def run(self, chosen: Strategy, learner: Any, save: Callable[[], None]) -> float:
        """Take one rank's steps; return the seconds that they took."""
        world = chosen.world
        rank, seconds = world.rank, 0.0
        for part in range(1, self.parts + 1):
            began_s = world.now_s()
            while self.done[rank] < self.steps[rank] * part // self.parts:
                if self.until_s is not None and world.now_s() >= self.until_s:
                    break
                chosen.step(learner)
                self.done[rank] += 1
                if self.done[rank] == self.save_at:
                    save()
            seconds += world.now_s() - began_s
            self.synced[rank] += 1
            if self.retire:
                chosen.retire(learner)
                world.comm.Barrier()  # others may still take steps
            chosen.finish(learner)
        return seconds


def fleet(
    make: Make,
    size: int,
    *,
    steps: int | list[int] = 30,
    parts: int = 1,
    retire: bool = False,
    save_at: int | None = None,
    until_s: float | None = None,
    resume: list[Rank] | None = None,
    scatter: Any = False,
    machine: Machine | None = None,
    faults: Faults | None = None,
    world_seed: int = 0,
    rare: Rare | None = None,
    learner: Any = None,
    watch: Callable[[Strategy, Witness], Any] | None = None,
) -> list[Rank]:
    """Train by a strategy and return every rank; nothing may stay in flight.

    Args:
        make: from a rank's world to its strategy.
        size: number of ranks.
        steps: of every rank; a list: one number each.
        parts: the ranks come to a sync point so often, after equal shares of their
            steps.
        retire: retire and wait for the others before `finish`, as the trainer does.
        save_at: step after which the states are kept; out of lockstep all sync then.
        until_s: virtual time after which no step begins.
        resume: ranks of an earlier fleet, to go on from what they kept.
        scatter: give every rank another first model, as no strategy would; or (K, P).
        world_seed: of the machine's jitter; rank i's learner has this seed + i.
        rare: rare branches that are taken on purpose.
        learner: options of every rank's learner; or a function of the rank.
        watch: called with (strategy, learner) before the first step; may return an ema.

    Raises:
        InFlightError: a message, receive or collective is left.
        WorldError: a deadlock, or an error on some rank.
    """
    steps = [steps] * size if isinstance(steps, int) else steps
    training = Training(steps, parts, retire, save_at, until_s)
    how: dict[str, Any] = {"seed": world_seed, "rare": rare}
    simulation = Simulation(size, machine=machine, faults=faults, **how)

    def main(world: VirtualWorld) -> Rank:
        rank = world.rank
        options: dict[str, Any] = {"lr": 0.125, "seed": world_seed + rank}
        options["layout"] = LAYOUT
        options |= (learner(rank) if callable(learner) else learner) or {}
        mine = Witness(options["layout"].size, compute=world.compute, **options)
        own = mine.theta.copy() if scatter is True else scatter
        chosen = make(world)
        chosen.require(mine)
        chosen.start(mine)
        mine.watch(chosen)
        if scatter is not False:
            mine.theta[:] = own if scatter is True else scatter[rank]
        ema = watch(chosen, mine) if watch else None
        saved: dict[str, Any] = {}
        if resume:
            kept = resume[rank].saved
            training.done[rank] = kept["step"]
            mine.load_state(kept["learner"])
            chosen.load_state(kept["strategy"])
            if ema:
                ema.load_state(kept["ema"])
        gradient = mine.gradient

        def noted(ready: Any = None, **options: Any) -> float:
            training.note_lead(rank)
            return gradient(ready, **options)

        mine.gradient = noted  # type: ignore[method-assign]
        first, mass = mine.theta.copy(), chosen.conserved(mine)
        world.comm.Barrier()
        sent, received = world.traffic.bytes_sent, world.traffic.bytes_received

        def save() -> None:
            if not chosen.lockstep:
                chosen.retire(mine)
                chosen.finish(mine)
            saved.update(step=save_at, learner=mine.state(), strategy=chosen.state())
            saved["ema"] = ema.state() if ema else None

        seconds = training.run(chosen, mine, save)
        sent = world.traffic.bytes_sent - sent
        received = world.traffic.bytes_received - received
        final, left = np.empty_like(mine.theta), chosen.conserved(mine)
        chosen.final_model_(mine, final)
        return Rank(
            world, mine, chosen, first, final, seconds, training.leads[rank], saved,
            sent, received, simulation, (mass, left), ema,
        )  # fmt: skip

    ranks = simulation.run(main)
    require_quiet(simulation)
    return ranks


def require_quiet(simulation: Simulation) -> None:
    """Raise unless nothing is under way: no message, no receive, no collective.

    Raises:
        InFlightError: one line that says what is left.
    """
    if left := simulation.undelivered:
        raise InFlightError(
            f"messages that nobody received: {len(left)}, the first from rank"
            f" {left[0].source} to rank {left[0].dest} (tag {left[0].tag})"
        )
    for communicator in simulation.network.communicators:
        if communicator.open:
            raise InFlightError("collectives that some rank never entered")
        for comm in communicator.comms:
            if comm.receives:
                raise InFlightError(
                    f"receives without a message: {len(comm.receives)} on rank"
                    f" {comm.state.rank}"
                )


def thetas(ranks: list[Rank]) -> NDArray[np.float32]:
    """Return all models, (K, P)."""
    return np.stack([rank.learner.theta for rank in ranks])


def targets(ranks: list[Rank]) -> NDArray[np.float64]:
    """Return the minima of all ranks, (K, P)."""
    return np.stack([rank.learner.target for rank in ranks]).astype(np.float64)
