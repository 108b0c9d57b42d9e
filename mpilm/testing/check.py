"""The laws that every strategy keeps, and a check of all of them.

    one rank is local     alone, a strategy is plain training, to the bit, in silence
    steps are taken       every rank's learner processes as many minibatches as steps
    one final model       all ranks write the same final model, and it is finite
    mass is conserved     the mean of `conserved` changes by the learners' steps only
    bytes are declared    `moved_bytes` is what the world has counted
    resume is exact       saved, made anew, resumed: the same bits as uninterrupted
    nothing in flight     after `finish` no message, receive or collective is left
    no deadlock           no schedule makes all ranks wait for each other
    the same seed         gives the same bits, in the same virtual time

The last four laws and the mass are held against random schedules as well: sizes, slow
ranks and links, uneven steps, sync points, and what MPI hardly ever does (rare.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from mpilm.errors import WorldError
from mpilm.learner.flat import Layout
from mpilm.strategies import find_strategy, strategy
from mpilm.strategies.base import Strategy
from mpilm.testing.fleet import InFlightError, Make, Rank, fleet
from mpilm.testing.schedules import draw_plan, draw_size
from mpilm.world.base import World
from mpilm.world.machine import Machine
from mpilm.world.virtual.rare import drawn_rare

LOCAL = "one rank is local"
STEPS = "steps are taken"
FINAL = "one final model"
MASS = "mass is conserved"
BYTES = "bytes are declared"
RESUME = "resume is exact"
QUIET = "nothing in flight"
DEADLOCK = "no deadlock"
SEED = "the same seed"
LAWS = (LOCAL, STEPS, FINAL, MASS, BYTES, RESUME, QUIET, DEADLOCK, SEED)

CLOSE = 2e-5  # absolute, on models of size 1: float32, some tens of roundings
# The same where nothing but mixing happens: some roundings, which a filter of block
# momentum eta makes 1 / (1 - eta) times as large.
STILL = 5e-6
NOISY = {"noise": 0.5, "momentum": 0.5}
# times are binary fractions: an addition of two of them is exact, whatever the clock
EXACT_TIMES = Machine(
    step_s=0.25, latency_s=2**-16, bandwidth_Bps=2.0**30, node_latency_s=2**-17
)


class LawBroken(AssertionError):
    """A strategy does not keep a law; one sentence."""

    def __init__(self, law: str, what: str) -> None:
        super().__init__(f"{law}: {what}")
        self.law = law


def check_strategy(
    factory: str | type[Strategy] | Callable[[World], Strategy],
    *,
    sizes: Collection[int] = (2, 3, 4),
    schedules: int = 200,
    seed: int = 0,
    without: Collection[str] = (),
    layout: Layout | None = None,
    **settings: Any,
) -> None:
    """Raise unless a strategy keeps all laws of this page.

    Args:
        factory: a name ("bmuf", "my_module:MyStrategy"), a class, or a function from a
            world to a strategy.
        sizes: numbers of ranks.
        schedules: how many random ones, of seeds `seed`, `seed` + 1, ...
        without: laws that are not held against it, by the names above.
        layout: where the learners' parameters lie. Of row tables (`fleet.ROWS` has
            some) they have the gradients of some rows in each step.
        settings: of its Config, with a name or a class.

    Raises:
        LawBroken: one sentence that names the law.
        ValueError: a law of another name.

    Communicates: none; all ranks are virtual.
    """
    if unknown := set(without) - set(LAWS):
        raise ValueError(f"no law {', '.join(unknown)}; there are {', '.join(LAWS)}")
    check = Check(maker(factory, settings), without, layout)
    check.one_rank()
    for size in sizes:
        check.trained(size)
        for save_at in (6, 7):
            check.resumed(size, save_at)
    for number in range(seed, seed + schedules):
        check.schedule(number)


def maker(factory: Any, settings: dict[str, Any]) -> Make:
    """Return a function from a world to the strategy."""
    kind: Any = find_strategy(factory) if isinstance(factory, str) else factory
    if isinstance(kind, type):
        config: Any = kind  # mypy: a type has no Config
        return lambda world: kind(world, config.Config(**settings))
    return partial(kind, **settings)


class Check:
    """The laws, held against one strategy."""

    def __init__(
        self, make: Make, without: Collection[str] = (), layout: Layout | None = None
    ) -> None:
        self.make, self.without = make, without
        self.layout = {} if layout is None else {"layout": layout}
        self.has_tables = layout is not None and bool(layout.tables)

    def one_rank(self) -> None:
        """Hold LOCAL against it."""
        (one,) = self.run("on 1 rank", 1, learner=NOISY)
        options = {**NOISY, **self.layout}
        (alone,) = fleet(lambda world: strategy("local", world), 1, learner=options)
        same = np.array_equal(one.learner.theta, alone.learner.theta)
        self.require(LOCAL, same, "30 steps on 1 rank end at another model")
        moved = (one.bytes_sent, one.bytes_received)
        self.require(LOCAL, moved == (0, 0), f"1 rank moves {moved} bytes")

    def trained(self, size: int) -> None:
        """Hold STEPS, FINAL, MASS, BYTES and SEED against a quiet run."""
        where = f"on {size} ranks"
        ranks = self.run(where, size, steps=24)
        self.judge(ranks, [24] * size, where)
        for number, rank in enumerate(ranks):
            counted = (rank.bytes_sent, rank.bytes_received)
            declared = rank.strategy.moved_bytes(rank.learner.layout)
            what = f"rank {number} {where} moved {counted} bytes, declared {declared}"
            self.require(BYTES, counted == declared, what)
        again = self.run(where, size, steps=24)
        self.equal(SEED, ranks, again, f"run twice {where}")

    def resumed(self, size: int, save_at: int) -> None:
        """Hold RESUME against it; out of lockstep where time is exact."""
        where = f"on {size} ranks, saved at step {save_at}"
        plan: dict[str, Any] = {"steps": 20, "learner": NOISY, "machine": EXACT_TIMES}
        whole = self.run(where, size, save_at=save_at, **plan)
        with self.guarded(where), self.breaking(RESUME, where):
            resumed = fleet(self.make, size, resume=whole, **self.with_layout(plan))
        self.equal(RESUME, whole, resumed, f"resumed {where}")
        for number, (one, other) in enumerate(zip(whole, resumed, strict=True)):
            for kind in ("state", "metrics"):
                kept = getattr(one.strategy, kind)()
                again = getattr(other.strategy, kind)()
                differ = [k for k in kept if not same(kept[k], again.get(k))]
                what = f"{kind} {differ} of rank {number} differ, resumed {where}"
                self.require(RESUME, not differ, what)

    def schedule(self, seed: int) -> None:
        """Hold the laws against a random schedule."""
        draw = random.Random(seed)
        size = draw_size(draw)
        lockstep = self.is_lockstep()
        plan = draw_plan(draw, size, lockstep=lockstep)
        scatter = lockstep and draw.random() < 0.5
        scatter = scatter and not self.has_tables  # rows are alike but for updates
        where = f"in schedule {seed} ({size} ranks)"
        how: Any = {"world_seed": seed, "scatter": scatter, **plan}
        ranks = self.run(where, size, rare=drawn_rare(seed), **how)
        steps = plan["steps"]
        steps = [steps] * size if isinstance(steps, int) else steps
        self.judge(ranks, steps, where)
        if seed % 10 == 0:
            again = self.run(where, size, rare=drawn_rare(seed), **how)
            self.equal(SEED, ranks, again, f"run twice {where}")

    def is_lockstep(self) -> bool:
        """Return whether all its ranks take the same steps."""
        (rank,) = fleet(self.make, 1, steps=0)
        return bool(rank.strategy.lockstep)

    def run(self, where: str, size: int, **plan: Any) -> list[Rank]:
        """Return the ranks of a run; hold QUIET and DEADLOCK against it."""
        with self.guarded(where):
            return fleet(self.make, size, **self.with_layout(plan))

    def with_layout(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Return a plan with the learners' layout."""
        return {**plan, "learner": {**(plan.get("learner") or {}), **self.layout}}

    def judge(self, ranks: list[Rank], steps: list[int], where: str) -> None:
        """Hold STEPS, FINAL and MASS against the ranks of a run."""
        taken = [rank.learner.samples for rank in ranks]
        what = f"{where} learners processed {taken} minibatches in {steps} steps"
        self.require(STEPS, taken == steps, what)
        for number, rank in enumerate(ranks):
            finite = bool(np.isfinite(rank.final).all())
            self.require(FINAL, finite, f"{where} it is not finite")
            alike = np.array_equal(rank.final, ranks[0].final)
            what = f"{where} rank {number} has another one than rank 0"
            self.require(FINAL, alike, what)
        lost = lost_mass(ranks)
        what = f"{where} {lost:.2e} of the mean model are lost or gained"
        self.require(MASS, lost == 0.0, what)

    def equal(self, law: str, ranks: list[Rank], again: list[Rank], where: str) -> None:
        """Raise unless two runs came to the same bits."""
        for number, (one, other) in enumerate(zip(ranks, again, strict=True)):
            alike = np.array_equal(one.learner.theta, other.learner.theta)
            what = f"rank {number} has another model, {where}"
            self.require(law, alike, what)
            alike = np.array_equal(one.final, other.final)
            self.require(law, alike, f"another final model, {where}")
            if law == SEED:
                what = f"rank {number} took another time, {where}"
                self.require(law, one.seconds == other.seconds, what)

    def require(self, law: str, kept: bool, what: str) -> None:
        """Raise unless a law was kept, or is not asked for."""
        if not kept and law not in self.without:
            raise LawBroken(law, what)

    @contextmanager
    def guarded(self, where: str) -> Iterator[None]:
        """Turn what ends a simulation into the law that was broken."""
        try:
            yield
        except InFlightError as error:
            raise LawBroken(QUIET, f"{error}, {where}") from error
        except WorldError as error:
            if str(error).startswith("deadlock"):
                lines = "; ".join(line.strip() for line in str(error).splitlines())
                raise LawBroken(DEADLOCK, f"{where}: {lines}") from error
            raise

    @contextmanager
    def breaking(self, law: str, where: str) -> Iterator[None]:
        """Turn any error but a deadlock into a broken law."""
        try:
            yield
        except (InFlightError, LawBroken):
            raise
        except WorldError as error:
            if str(error).startswith("deadlock"):
                raise
            raise LawBroken(law, f"{where}: {error}") from error


def lost_mass(ranks: list[Rank]) -> float:
    """Return what is lost or gained beyond rounding; 0.0: the law is kept."""
    if any(
        before is None or after is None for before, after in (r.mass for r in ranks)
    ):
        return 0.0
    before, after = (
        np.mean([rank.mass[moment] for rank in ranks], axis=0) for moment in (0, 1)
    )
    moved = np.mean([rank.learner.moved for rank in ranks], axis=0)
    wanted = before + moved
    limit = CLOSE if moved.any() else STILL
    limit *= max(1.0, float(np.abs(wanted).max()))
    worst = float(np.abs(after - wanted).max())
    return worst if not worst <= limit else 0.0


def same(one: Any, other: Any) -> bool:
    """Return whether two entries of a state or of metrics are equal."""
    return other is not None and np.array_equal(np.asarray(one), np.asarray(other))
