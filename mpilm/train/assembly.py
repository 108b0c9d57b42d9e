"""The parts of a rank's training: of a configuration, or taken up where they were."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from mpilm.config import OWN, Config
from mpilm.errors import CheckpointError, RanksDiedError
from mpilm.optim.schedules import Schedule
from mpilm.storage.runlog import RunLog
from mpilm.storage.saved import State
from mpilm.strategies import find_strategy
from mpilm.strategies.ema import Ema
from mpilm.train.best_model import BestModel
from mpilm.train.deaths import go_on, left_here, same_optimizer
from mpilm.train.failure import Failure
from mpilm.train.folder import RunFolder
from mpilm.train.joins import Held, Recruiting, gather
from mpilm.train.metrics import LOG_FIELDS, MetricsRecorder, Milestones, Totals
from mpilm.train.notes import introduction
from mpilm.train.peer_copies import peer_copies
from mpilm.train.resume_point import ResumePoint, Stateful
from mpilm.train.run import learner_of, make_schedule, without_init
from mpilm.train.saving import Saving
from mpilm.train.screen import Screen
from mpilm.train.task import Task, open_task
from mpilm.train.timeline import Timeline
from mpilm.world.base import World

if TYPE_CHECKING:
    from mpilm.learner.learner import Learner


class Assembly:
    """What a training is made of; the loop over it is loop.py's.

    config, world  what it is made of
    folder         of the run
    has_ended      whether it was over before: then nothing else is there
    news           what a person is told of the last death or join; "": there was none
    recruiting     has ranks started that are missing
    held           what this rank has, while others join; None: nobody does
    left_moments   of the optimisers of ranks that died, for ranks that join
    samples        that all ranks have processed, as known here
    parts          what has a state, by its name in a checkpoint

    Args:
        config: the resolved configuration.
        world: this rank's world.
        folder: the run folder; rank 0 makes it.
    """

    def __init__(self, config: Config, world: World, folder: RunFolder) -> None:
        self.config, self.world, self.folder = config, world, folder
        world.last_words = folder.last_words
        self.news = ""
        self.held: Held | None = None
        self.left_moments: list[State] = []
        self.recruiting = Recruiting(
            world,
            folder.path,
            replaces=config.world.on_death == "replace",
            can_start=config.model.name != OWN,
        )

    def set_up(self, *, resume: bool) -> None:
        """Make the parts, or take them up where they were. Collective."""
        config, world = self.config, self.world
        if world.joins:
            self.has_ended = False
            self.take_in(world.size - 1)
            return
        kind = find_strategy(config.strategy.name)
        self.strategy = kind(world, config.strategy.settings)
        lockstep = self.strategy.lockstep
        with world.all_or_none():
            self.task = self.open_task()
            self.batches = self.task.batches(config, world, lockstep=lockstep)
            self.task.require_evaluated(config.train, world.rank, world.size)
            self.schedule = self.make_schedule()
            self.folder.claim(world.rank, resume=resume)
        self.saving = Saving(config, self.task, self.folder, world)
        place = self.saving.find() if resume else None
        self.has_ended = place is not None and place.is_end
        if self.has_ended:
            return
        self.timeline = Timeline(world, config.train.trace_steps)
        with world.all_or_none():
            self.learner = self.make_learner(is_new=place is None)
            self.strategy.require(self.learner)
        self.assemble(place)

    def assemble(self, place: ResumePoint | None) -> None:
        """Make what belongs to these ranks, of a new run or at a place. Collective."""
        config, world = self.config, self.world
        self.totals = Totals()
        self.batches.start(config.train.samples)
        if place:
            place.begin_(self.learner, world)
        self.strategy.start(self.learner)
        if place and place.merged:
            with world.all_or_none():
                merged = place.merged.under("strategy")
                self.strategy.take_over(self.learner, merged)
        with world.all_or_none():
            self.ema: Ema | None = None
            if config.ema.on:
                of = self.strategy, self.learner
                self.ema = Ema(config.ema, *of, done=self.batches.done)
            self.best = BestModel(self.learner) if self.schedule.rejects else None
            before = place.samples if place else 0
            self.validations = Milestones(config.train.valid_every, before)
            if place:
                self.totals = place.restore_(self.parts)
            if world.rank == 0:
                self.folder.describe(config, self.task, place)
        self.saving.copies = None
        if self.goes_on:
            self.saving.copies = peer_copies(config, world, self.strategy)
        self.failure = Failure(
            self.totals,
            self.folder.checkpoints,
            max_bad_steps=config.train.max_bad_steps,
            max_bad_rounds=config.train.max_bad_rounds,
            is_nats=self.task.measure == "perplexity",
        )
        self.batches.synchronise(self.learner.samples)
        self.before = self.learner.samples  # this step, on this rank
        self.learner.refresh = self.refresh_lr
        self.recorder = MetricsRecorder(world, self.totals, self.learner.spent)
        self.savings = Milestones(config.checkpoint.every, self.samples)
        self.is_validated = False  # the model has not changed since it was
        self.is_saved = place is not None
        with world.all_or_none():
            path, step = self.folder.log(world.rank), self.totals.step
            self.log = RunLog(path, world.rank, LOG_FIELDS, from_step=step)
        self.screen = Screen(
            config.train.samples,
            samples=self.samples,
            train_seconds=self.totals.train_seconds,
            speaks=world.rank == 0,
            perplexity=self.task.sample == "token",
            virtual=world.is_virtual,
        )
        if self.news:
            self.screen.line(self.news)
            return
        lines = introduction(config, self.task, self.strategy, self.learner)
        for line in (*lines, *(place.lines() if place else ())):
            self.screen.line(line)

    def regroup(self) -> bool:
        """Go on without the ranks that have died; return whether there is more to do.

        Raises:
            MpilmError: fewer ranks cannot train so.

        Communicates: collective among the ranks that are left.
        """
        world, self.held = self.world, None  # a rank that was to join waits
        if self.saving.beside:
            self.saving.beside.abandon()
        left = left_here(self)

        def merged_place() -> ResumePoint | None:
            place = go_on(self, left)
            if place is None or not self.strategy.same_optimizer:
                return place
            assert place.merged is not None
            merged = same_optimizer(world.comm, place.merged)
            return replace(place, own=merged.state, merged=merged)

        while not (is_done := self.start_anew(merged_place)):
            if is_done is None:
                return False
        self.recruiting.after_death(left.size)
        if not self.recruiting.replaces:
            self.left_moments = []
        return True

    def take_in(self, size: int) -> None:
        """Go on with a rank that has joined; or be the one.

        Args:
            size: number of ranks before.

        Communicates: collective among the ranks before and the new one.
        """
        world, began_s = self.world, self.world.now_s()
        held, self.held = self.held, None
        moments, ranks = self.left_moments, list(range(world.size))
        told: dict[str, int] = {}

        def gathered_place() -> ResumePoint:
            self.left_moments = list(moments)
            place, about = gather(world.comm, ranks, size, held, self.left_moments)
            told.update(about)
            dead = sorted({*range(size + 1)} - {*ranks})
            what = f"rank {size} joined"
            if dead:
                what = f"{RanksDiedError(dead)} as rank {size} was taken in"
            self.news = (
                f"{what}; {world.size} go on from the mean of their models at"
                f" {place.samples:,} samples, {world.now_s() - began_s:.2f} s later"
            )
            return place

        while not self.start_anew(gathered_place):
            if not self.goes_on:
                raise RanksDiedError
            ranks[:] = [ranks[rank] for rank in world.shrink()]
        self.recruiting.wanted = told["wanted"]
        self.recruiting.after_death(size + 1)

    def start_anew(self, find: Callable[[], ResumePoint | None]) -> bool | None:
        """Start anew at the place that `find` returns; return whether all ranks have.

        None: it returned none, so the run is over. False: a rank died meanwhile.

        Communicates: collective, and what `find` does.
        """
        is_well = False
        try:
            place = find()
            if place is None:
                return None
            self.rebuild(place)
            self.totals.step = place.step
            is_well = True
        except RanksDiedError:
            self.close_log()
        return self.world.agree(is_well)

    @property
    def goes_on(self) -> bool:
        """Whether the others go on when a rank dies."""
        survives = find_strategy(self.config.strategy.name).survives
        on_death = self.config.world.on_death
        return survives and on_death != "end" and self.world.can_shrink

    def close_log(self) -> None:
        """Close what a try to go on has opened, if it has come so far."""
        if hasattr(self, "log"):
            with suppress(CheckpointError):
                self.log.close()

    def rebuild(self, place: ResumePoint) -> None:
        """Make the parts anew, for other ranks than before; go on at a place.

        Raises:
            MpilmError: so many ranks cannot train so.

        Communicates: collective.
        """
        config, world = self.config, self.world
        kind = find_strategy(config.strategy.name)
        self.strategy = kind(world, config.strategy.settings)
        self.timeline = Timeline(world, config.train.trace_steps)
        with world.all_or_none():
            lockstep = self.strategy.lockstep
            is_new = not hasattr(self, "learner")
            if is_new:
                self.task = self.open_task()
            self.batches = self.task.batches(config, world, lockstep=lockstep)
            if is_new:
                self.learner = self.make_learner(is_new=False)
            self.learner.batches = self.batches
            self.learner.compute = self.timeline.compute
            self.schedule = self.make_schedule()
            self.strategy.require(self.learner)
            self.folder.inherit(world.rank)
        self.saving = Saving(config, self.task, self.folder, world)
        self.assemble(place)

    # what is made of a configuration
    def open_task(self) -> Task:
        """Return what is learned. No communication."""
        return open_task(self.config.data.corpus, self.config.model)

    def make_schedule(self) -> Schedule:
        """Return the learning rate as a function of global samples."""
        return make_schedule(self.config, self.world.size)

    def make_learner(self, *, is_new: bool) -> Learner:
        """Return this rank's learner, of a run that begins or not. No communication."""
        config = self.config if is_new else without_init(self.config)
        compute = self.timeline.compute
        return learner_of(config, self.task, self.batches, self.world, compute)

    @property
    def samples(self) -> int:
        """Samples that all ranks have processed, as known here."""
        return self.batches.done(self.learner.samples)

    def refresh_lr(self) -> None:
        """Set the learning rate to the one after the samples of all ranks so far.

        In lockstep those before this step. Otherwise the others go on while this rank
        computes, and its update takes the rate of the moment in which it is made.
        """
        self.learner.lr = self.schedule.lr(self.batches.done(self.before))

    @property
    def parts(self) -> dict[str, Stateful]:
        """What has a state, by its name in a checkpoint."""
        parts: dict[str, Stateful] = {
            "learner": self.learner,
            "strategy": self.strategy,
            "schedule": self.schedule,
            "validations": self.validations,
        }
        if self.best:
            parts["best"] = self.best
        if self.ema:
            parts["ema"] = self.ema
        return parts
