"""The virtual world: N ranks in one process, in virtual time.

    def main(world):
        world.compute(lambda notify: None)      # takes machine.step_s
        world.comm.Barrier()
        return world.now_s()

    run_virtual(main, 128, machine=Machine(step_s=0.1), faults=Faults(slow={"3": 10}))

Every rank and every background activity is a greenlet; an event heap decides who runs.
The same arguments give the same run, to the bit. docs/virtual-world.md tells what
things cost and where this world differs from a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

from mpilm.errors import RanksDiedError, WorldError
from mpilm.world.base import Activity, Notify, World, require_ended
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.parts import completion_shares
from mpilm.world.virtual.comm import Communicator, Network, VirtualComm
from mpilm.world.virtual.engine import (
    NETWORK,
    Died,
    Engine,
    RankState,
    VirtualActivity,
)
from mpilm.world.virtual.messages import Envelope
from mpilm.world.virtual.rare import Rare

T = TypeVar("T")
# from a death until the others are told: some milliseconds between real ranks, with a
# core each (docs/mpi-world.md). Chosen, not tuned.
DETECT_S = 0.01
START_S = 1.0  # until a rank that was asked for is ready; chosen, not tuned


def run_virtual(
    main: Callable[[VirtualWorld], T],
    size: int,
    *,
    machine: Machine | None = None,
    faults: Faults | None = None,
    seed: int = 0,
    can_shrink: bool = False,
    rare: Rare | None = None,
) -> list[T]:
    """Return what `main(world)` returned on each of `size` virtual ranks.

    Args:
        main: runs once per rank; the world is closed after it.
        size: number of ranks.
        machine: what messages and computing cost.
        faults: what is wrong with which ranks.
        seed: of the machine's jitter.
        can_shrink: whether the others can go on when a rank dies (`World.shrink`);
            what it returned is None. And whether more can join (`World.grow`): what
            they returned comes last.
        rare: rare branches that are taken on purpose, see rare.py.

    Raises:
        WorldError: a deadlock (who waits for what, a line per rank), or an error on a
            rank that is no MpilmError.
        MpilmError: one on a rank, with the rank's number in front.
    """
    simulation = Simulation(
        size,
        machine=machine,
        faults=faults,
        seed=seed,
        can_shrink=can_shrink,
        rare=rare,
    )
    return simulation.run(main)


class Simulation:
    """What `run_virtual` runs, for those who want to look at it afterwards."""

    def __init__(
        self,
        size: int,
        *,
        machine: Machine | None = None,
        faults: Faults | None = None,
        seed: int = 0,
        can_shrink: bool = False,
        rare: Rare | None = None,
    ) -> None:
        if size < 1:
            raise WorldError(f"{size} ranks cannot run")
        self.machine = machine or Machine()
        self.faults = faults or Faults()
        self.faults.check(size)
        self.can_shrink = can_shrink
        self.seed = seed
        self.shrinking: list[VirtualWorld] = []  # have come to `shrink`
        self.agreeing: list[VirtualWorld] = []  # have come to `agree`
        self.growing: list[VirtualWorld] = []  # have come to `grow`
        self.engine = Engine(rare)
        states = [RankState(r, self.machine.node(r), seed) for r in range(size)]
        self.engine.ranks = states
        self.network = Network(self.engine, self.machine, self.faults)
        comms = Communicator(self.network, states, "world").comms
        self.worlds = [VirtualWorld(self, comm) for comm in comms]

    # deaths
    def die(self, state: RankState) -> None:
        """Let a rank be dead; the others are told a moment later."""
        state.is_dead = True
        at_s = self.engine.now_s + DETECT_S
        self.engine.at(at_s, NETWORK, self.detect, None)
        self.shrink_if_all_came()
        self.agree_if_all_came()

    def detect(self, _: Any) -> None:
        """Tell all ranks who still count a dead one among theirs."""
        for world in self.living:
            dead = [n for n, s in enumerate(world.comm.group.states) if s.is_dead]
            if dead and world.state.death is None:
                for communicator in self.network.communicators:
                    members = communicator.states
                    communicator.is_void |= any(s.is_dead for s in members)
                world.state.tell(RanksDiedError(dead))

    @property
    def living(self) -> list[VirtualWorld]:
        """The worlds of the ranks that have not died, in their order."""
        return [world for world in self.worlds if not world.state.is_dead]

    def shrink_if_all_came(self) -> None:
        """Give the ranks that are left a communicator of their own, if all wait."""
        if not self.shrinking or len(self.shrinking) < len(self.living):
            return
        self.shrinking = []
        worlds = self.living
        for world in worlds:
            world.state.leave_behind()
        group = Communicator(self.network, [w.state for w in worlds], "world")
        for world, comm in zip(worlds, group.comms, strict=True):
            world.comm = comm
            if world.waits_in_shrink is not None:
                world.waits_in_shrink.wake()

    def agree_if_all_came(self) -> None:
        """Let the ranks that are left know whether all is well, if all wait."""
        if not self.agreeing or len(self.agreeing) < len(self.living):
            return
        self.agreeing, worlds = [], self.living
        is_well = all(world.wish for world in worlds)
        is_well &= not any(state.is_dead for state in worlds[0].comm.group.states)
        for world in worlds:
            world.agreed = [is_well]
            if world.waits_in_agree is not None:
                world.waits_in_agree.wake()

    def grow_if_all_came(self) -> None:
        """Add a rank to those that are left, if all wait for it."""
        if len(self.growing) < len(self.living):
            return
        self.growing, before, number = [], self.living, len(self.worlds)
        state = RankState(number, self.machine.node(number), self.seed)
        self.engine.ranks = [*self.engine.ranks, state]
        for world in before:
            world.state.leave_behind()
        states = [*(world.state for world in before), state]
        *comms, last = Communicator(self.network, states, "world").comms
        for world, comm in zip(before, comms, strict=True):
            world.comm = comm
            if world.waits_in_grow is not None:
                world.waits_in_grow.wake()
        joined = VirtualWorld(self, last)
        joined.joins = True
        self.worlds.append(joined)
        self.learners.append(joined.begin(self.main))

    def run(self, main: Callable[[VirtualWorld], T]) -> list[T]:
        """Run `main` on every rank, once; return the results. See `run_virtual`."""
        self.engine.begin()
        self.main: Callable[[VirtualWorld], Any] = main
        self.learners = [world.begin(main) for world in self.worlds]
        self.engine.run()
        return [learner.result for learner in self.learners]

    @property
    def now_s(self) -> float:
        """Virtual seconds that have passed."""
        return self.engine.now_s

    @property
    def num_events(self) -> int:
        """Events that have happened."""
        return self.engine.num_events

    @property
    def undelivered(self) -> list[Envelope]:
        """Messages that nobody has received."""
        return self.network.undelivered()


class VirtualWorld(World):
    """One rank's face of the virtual world."""

    background = True
    is_virtual = True
    comm: VirtualComm

    def __init__(self, simulation: Simulation, comm: VirtualComm) -> None:
        self.simulation, self.comm = simulation, comm
        self.engine = simulation.engine
        self.state = comm.state
        self.can_shrink = self.can_grow = simulation.can_shrink
        self.eval_s = simulation.machine.eval_s
        self.waits_in_shrink: VirtualActivity | None = None
        self.waits_in_agree: VirtualActivity | None = None
        self.wish = True  # what this rank says in `agree`
        self.agreed: list[bool] = []  # what all have come to; empty: nothing yet
        self.waits_in_grow: VirtualActivity | None = None
        self._ready_s: list[float] = []  # when those asked for are ready
        self._is_closing = self._closed = False

    def begin(self, main: Callable[[VirtualWorld], T]) -> VirtualActivity:
        """Announce `main` as the learner of this rank."""

        def work() -> T:
            with self:
                return main(self)

        return VirtualActivity(
            self.engine, self.state, work, "the learner", is_learner=True
        )

    def _me(self) -> VirtualActivity:
        return self.engine.active(self.state)

    def now_s(self) -> float:
        return self.engine.now_s

    def sleep(self, seconds: float) -> None:
        if not seconds >= 0.0:
            raise WorldError(f"cannot sleep {seconds} seconds")
        activity = self._me()
        activity.may_block()
        activity.block_until(self.engine.now_s + seconds)

    def wait(self, ready: Callable[[], T | None], what: str) -> T:
        activity, state = self._me(), self.state
        activity.may_block()
        did = -1
        while True:
            state.require_alive(activity)
            found = activity.not_blocking("ready() of wait", ready)
            if found is not None and found is not False:
                return found
            # others look again only if this one did something: two that only look must
            # not wake each other for ever
            before, did = did, state.traffic.messages + state.num_taken
            if did != before:
                state.changed()
            state.watchers.append(activity)
            activity.block(what, counts=True, only_looked=True)

    def lock(self, name: str) -> AbstractContextManager[Any]:
        return VirtualLock(self.engine, self.state, name)

    def start(self, work: Callable[[], None], name: str) -> Activity:
        self._me()
        return VirtualActivity(self.engine, self.state, work, name)

    def compute(self, work: Callable[[Notify], T], ready: Notify | None = None) -> T:
        activity, state, simulation = self._me(), self.state, self.simulation
        activity.may_block()
        if simulation.faults.fails(state.rank, state.num_steps):
            if self.can_shrink:
                simulation.die(state)
                raise Died
            raise WorldError(
                f"dies before step {state.num_steps}, as [faults] declares, at"
                f" {self.engine.now_s:.6g} s of virtual time"
            )
        activity.catch_up()
        parts: list[Any] = []
        result = activity.not_blocking("the work of compute", work, parts.append)
        start_s = self.engine.now_s
        machine = simulation.machine
        step_s = machine.step_s * machine.spread(state.step_random)
        step_s *= simulation.faults.slowdown(state.rank, start_s, state.num_steps)
        state.num_steps += 1
        state.owed_s = machine.update_s + machine.mix_s  # the optimiser, mixing
        if ready is None or not parts:
            activity.block_until(start_s + step_s)
            return result
        for part, when in zip(parts, completion_shares(parts), strict=True):
            activity.block_until(start_s + when * step_s)
            activity.not_blocking("ready() of compute", ready, part)
        return result

    def close(self) -> None:
        if self._closed:
            return
        self._is_closing = self._closed = True
        require_ended(a for a in self.state.activities if not a.is_left_behind)
        while True:
            try:
                for activity in list(self.state.activities):
                    if not activity.is_learner:
                        activity.join()
                self.comm.close()
                return
            except RanksDiedError:
                self.shrink()

    def shrink(self) -> list[int]:
        if not self.can_shrink:
            return super().shrink()
        activity, simulation = self._me(), self.simulation
        numbers = [state.rank for state in self.comm.group.states]
        while True:
            before = self.comm.group
            activity.may_block()
            simulation.shrinking.append(self)
            simulation.shrink_if_all_came()
            while self.comm.group is before:
                self.waits_in_shrink = activity
                activity.block("the others after a death", despite_death=True)
                self.waits_in_shrink = None
            are_closing, is_well = [False], False
            with suppress(RanksDiedError):  # another one has died meanwhile
                are_closing, is_well = self.comm.allgather(self._is_closing), True
            if self.agree(is_well):
                left = [numbers.index(state.rank) for state in self.comm.group.states]
                return [] if any(are_closing) else left

    def agree(self, is_well: bool) -> bool:
        if not self.can_shrink:
            return super().agree(is_well)
        activity, simulation = self._me(), self.simulation
        activity.may_block()
        self.wish, self.agreed = is_well, []
        simulation.agreeing.append(self)
        simulation.agree_if_all_came()
        while not self.agreed:
            self.waits_in_agree = activity
            activity.block("the others, to agree after a death", despite_death=True)
            self.waits_in_agree = None
        return self.agreed[0]

    @property
    def recruits(self) -> tuple[int, int]:
        now_s = self.engine.now_s
        return len(self._ready_s), sum(at_s <= now_s for at_s in self._ready_s)

    def recruit(self, command: Sequence[str]) -> None:
        if not self.can_grow:
            super().recruit(command)
        self._ready_s.append(self.engine.now_s + START_S)

    def grow(self) -> int:
        if not self.can_grow:
            return super().grow()
        activity, simulation, before = self._me(), self.simulation, self.comm.group
        activity.may_block()
        if self.rank == 0:
            self._ready_s.pop(0)
        simulation.growing.append(self)
        simulation.grow_if_all_came()
        if self.comm.group is before:
            self.waits_in_grow = activity
            try:
                activity.block("the others, to take in a rank")
            finally:
                self.waits_in_grow = None
                if self in simulation.growing:  # one of them has died
                    simulation.growing.remove(self)
        return len(before.states)


class VirtualLock(AbstractContextManager[Any]):
    """Mutual exclusion between the activities of a rank, first come, first served."""

    def __init__(self, engine: Engine, state: RankState, name: str) -> None:
        self.engine, self.state, self.name = engine, state, name
        self.holder: VirtualActivity | None = None
        self.queue: list[VirtualActivity] = []

    def __enter__(self) -> None:
        activity = self.engine.active(self.state)
        activity.may_block()
        if self.holder is activity:
            raise WorldError(f"takes the lock {self.name} that it holds already")
        if self.holder is None:
            self.holder = activity
        else:
            self.queue.append(activity)
            activity.block(self)

    def __exit__(self, *_: object) -> None:
        waiting = [a for a in self.queue if a.state.death is None]
        self.holder = waiting.pop(0) if waiting else None
        self.queue = waiting
        if self.holder is not None:
            self.holder.wake()

    def __str__(self) -> str:
        holder = self.holder.name if self.holder is not None else "nobody"
        return f"the lock {self.name}, held by {holder}"
