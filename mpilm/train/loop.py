"""Training: one learner per rank, a strategy between them. Reads top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mpilm.config import Config
from mpilm.errors import (
    STOPPED_EARLY,
    CheckpointError,
    DivergenceError,
    MpilmError,
    RanksDiedError,
)
from mpilm.launch import about_banner
from mpilm.storage.saved import State, nested
from mpilm.strategies import Strategy
from mpilm.strategies.ema import Ema
from mpilm.train.assembly import Assembly
from mpilm.train.consensus import measure_consensus
from mpilm.train.evaluate import Quality, evaluate, holds_final, swapped
from mpilm.train.folder import RunFolder
from mpilm.train.joins import held_here
from mpilm.train.notes import notes_after
from mpilm.train.profile import StepProfile
from mpilm.train.screen import Screen
from mpilm.train.signals import STOP, SYNC, Agreement, StopRequest
from mpilm.train.summary import closing_lines, summarise
from mpilm.vectors import is_finite, lending, to_array
from mpilm.world.base import World

COUNTS = ("mixes", "staleness")  # of a strategy's metrics, in a row of the log


class Trainer(Assembly):
    """One rank's part in a run.

    Args:
        config: the resolved configuration.
        world: this rank's world.
        out: the run folder; rank 0 makes it.
        resume: go on from the newest checkpoint in `out`, if there is one.
        profile: write a timeline of some steps of all ranks, see profile.py.

    Raises:
        MpilmError: bad input; one line, the same on every rank.

    Communicates: collective.
    """

    resumed_by = ""  # how a person goes on with a run; the command line if not said

    def __init__(
        self,
        config: Config,
        world: World,
        out: Path,
        *,
        resume: bool = False,
        profile: bool = False,
    ) -> None:
        super().__init__(config, world, RunFolder(out, resumed_by=self.resumed_by))
        self.profile: StepProfile | None = None
        try:
            self.set_up(resume=resume)
            if profile and not self.has_ended:
                self.profile = StepProfile(world, self.folder.path)
                self.profile.attach(self.strategy, self.learner)
        except BaseException:
            self.folder.release()
            raise

    def train(self, stop: StopRequest | None = None) -> bool:
        """Train to the end; return False if `stop` was requested on some rank.

        Raises:
            DivergenceError: the loss or the model is not finite any more.
            CheckpointError: a file cannot be written. Both are raised on all ranks.
        """
        with self.folder:
            if self.has_ended:
                Screen(1, speaks=self.world.rank == 0).line(
                    f"{self.folder.path}: the run has ended; more train.samples go on"
                )
                return True
            stop = stop or StopRequest()
            while True:
                try:
                    has_finished = self.run_once(stop)
                    if not self.held:
                        return has_finished
                    self.take_in(self.world.grow())
                    continue
                except RanksDiedError:
                    if not self.goes_on:
                        raise
                if not self.regroup():
                    return True

    def look_for_ranks(self) -> bool:
        """Return whether a rank is ready to join; say why none can be added."""
        recruiting = self.recruiting
        had_failed = bool(recruiting.failure)
        joins = self.config.faults.joins(self.totals.step)
        is_ready = recruiting.look(self.totals.step, joins)
        if recruiting.failure and not had_failed:
            self.screen.line(recruiting.failure)
        return is_ready

    def run_once(self, stop: StopRequest) -> bool:
        """Run and conclude. As `train`; or until a rank joins, see `held`."""
        has_finished = self.run(stop)
        if self.held:
            return False
        if self.profile:
            self.screen.line(f"timeline of the ranks: {self.profile.merge()}")
        if has_finished:
            self.conclude()
        return has_finished

    def run(self, stop: StopRequest) -> bool:
        """Take steps to the end, or until a stop; save. As `train`."""
        config, totals = self.config, self.totals
        learner, strategy = self.learner, self.strategy
        with self.screen, self.log, self.batches.closing():
            agreement = Agreement(
                self.world,
                every=max(config.checkpoint.agree_every, strategy.pace.stride),
                request=stop,
                lockstep=strategy.lockstep,
                agree=strategy.pace.agree,
            )
            excluded = (agreement.traffic, self.batches.traffic, *self.saving.traffic)
            self.recorder.begin(*excluded)
            samples = strategy.pace.agree(self.samples)
            if samples < config.train.samples and self.validations.pass_(samples):
                self.validate()  # the run was cut off in this validation
            while samples < config.train.samples and not self.schedule.finished:
                self.before = learner.samples
                self.refresh_lr()
                with self.timeline.step(totals.step):
                    loss = strategy.step(learner)
                totals.step += 1
                samples = strategy.pace.agree(self.samples)
                self.is_validated = self.is_saved = False
                is_logged = totals.step % config.train.log_every == 0
                if is_logged:
                    learner.settle()
                self.failure.count(learner.checked, loss)
                self.failure.count_rounds(strategy.leaving)
                if is_logged:
                    self.record(samples, float(loss))
                self.look_after_saving()
                is_due = self.validations.due(samples) or self.savings.due(samples)
                if is_due and strategy.lockstep:
                    self.sync(samples)
                if self.failure.error:
                    stop.requested = "failure"
                joins = self.look_for_ranks()
                outcome = agreement.poll(
                    totals.step, sync=joins or (is_due and not strategy.lockstep)
                )
                if outcome == SYNC:
                    self.drain()
                    if self.held:
                        return False
                    samples = strategy.pace.agree(self.samples)
                if outcome == STOP:
                    break
            strategy.retire(learner)
            agreement.finish(self.drain_retired)
            strategy.finish(learner)
            with self.recorder.paused():
                self.saving.settle()
            self.raise_failure(DivergenceError)
            with self.recorder.paused():
                samples = self.batches.synchronise(learner.samples)
            self.save()  # before anything else that may fail, or take long
            self.raise_failure()
            if not agreement.stopped:
                self.screen.done(samples)
                self.validations.pass_(samples)
                self.validate()
                if not self.is_saved:  # it went back to the best model
                    self.save()
                self.raise_failure()
        if agreement.stopped:
            how, note = self.resumed_by, ""
            if not how:  # the command line, whose exit code is ours
                how = f"mpilm resume {self.folder.path}"
                note = about_banner(STOPPED_EARLY)
            self.screen.line(
                f"stopped early at {samples:,} samples; {how} goes on from here{note}"
            )
        return not agreement.stopped

    def conclude(self) -> None:
        """Measure what is left to measure; write the summary. Collective."""
        summary = summarise(
            self.config,
            self.task,
            self.learner,
            self.recorder,
            self.strategy.metrics(),
            num_dropped=self.batches.num_dropped,
            rest=self.batches.counts.rest,
            quality=partial(self.quality, source=self.strategy),
            ema_quality=partial(self.quality, source=self.ema) if self.ema else None,
            watch=self.screen.watch,
        )
        with self.world.all_or_none():
            if self.world.rank == 0:
                self.folder.conclude(summary)
        for text in closing_lines(summary, virtual=self.world.is_virtual):
            self.screen.line(text)
        for note in notes_after(self.strategy, self.totals.step):
            self.screen.line(f"note: {note}")

    def sync(self, samples: int) -> None:
        """Write a checkpoint and validate, if it is time. Collective.

        In this order: a validation may fail, or be cut off by the end of a job; then a
        resumed run begins with it. The last step of a run, or what may be the last by
        the schedule, is saved in any case.

        Args:
            samples: how far the ranks are; the same on all of them.
        """
        if samples >= self.config.train.samples:
            return  # `run` does both at the end
        is_due = self.validations.due(samples)
        if self.savings.pass_(samples) or (is_due and self.schedule.may_finish):
            self.save(beside=not is_due)
        if self.validations.pass_(samples):
            with self.recorder.paused():
                self.saving.settle()
            self.validate()

    def drain(self, *, retired: bool = False) -> None:
        """Bring ranks to a sync point, out of lockstep or as one joins. Collective.

        Args:
            retired: whether this rank takes no more steps.
        """
        with self.paused("sync"):
            self.strategy.retire(self.learner)
            self.strategy.finish(self.learner)
            samples = self.batches.synchronise(self.learner.samples)
            _, ready = self.world.recruits
            found = self.world.comm.allgather((ready, retired))
            if found[0][0] and not any(retired for _, retired in found):
                self.saving.settle()
                self.held = held_here(self)
                return
        if not self.strategy.lockstep:
            self.sync(samples)

    def drain_retired(self) -> None:
        """`drain` on a rank that takes no more steps: afterwards it answers again."""
        self.drain(retired=True)
        self.strategy.retire(self.learner)

    def record(self, samples: int, loss: float) -> None:
        """Write a row of the log and show progress; note a failure for later."""
        if self.failure.error:
            return
        totals = self.totals
        is_used = not self.learner.skipped
        if is_used and not self.failure.is_good(loss):
            if self.strategy.leaving is None:  # else it is left out of the next mean
                self.failure.note(self.failure.diverged(f"the loss is {loss:.3g}"))
                return
            is_used = False
        self.recorder.mark()
        if is_used:
            totals.loss_sum += loss
            totals.loss_count += 1
        learner, metrics = self.learner, self.strategy.metrics()
        counts = {name: metrics[name] for name in COUNTS if name in metrics}
        own = {"samples": learner.samples, "loss": loss, "lr": learner.lr}
        try:
            self.log.row(**totals.row(), **own, **counts)
            for name, start_s, stop_s, step in self.timeline.take():
                self.log.event(name, start_s, stop_s, step=step)
        except CheckpointError as error:
            self.failure.note(error)
        self.screen.update(samples, loss, totals.train_seconds)

    def raise_failure(self, kind: type[MpilmError] = MpilmError) -> None:
        """Raise on all ranks what failed on one, if it is of this kind."""
        with self.recorder.paused():
            self.failure.raise_(self.world, kind)

    def validate(self) -> None:
        """Measure the model on the valid split; tell the schedule.

        Raises:
            DivergenceError: its loss is not finite.

        Communicates: collective.
        """
        if self.is_validated and self.strategy.lockstep:
            return
        self.is_validated = True
        if "valid" in self.task.evaluated(self.config.train):
            self.judge()
        with self.recorder.paused():
            metrics = self.strategy.metrics()
            found = measure_consensus(self.learner, self.world, metrics)
        totals = self.totals
        totals.consensus_step = totals.step
        totals.consensus_distance = found.distance
        totals.consensus_norm = found.norm
        totals.spectral_gap = found.gap

    def judge(self) -> None:
        """Measure the model on the valid split; tell the schedule. As `validate`."""
        totals, task = self.totals, self.task
        with self.paused("evaluate"):
            quality = self.quality("valid", self.strategy)
            if self.ema:
                average = getattr(self.quality("valid", self.ema), task.measure)
                setattr(totals, f"ema_valid_{task.measure}", average)
        value = getattr(quality, task.measure)
        if not math.isfinite(value):
            raise self.failure.diverged(f"the valid {task.measure} is {value}")
        is_kept = self.schedule.observe(quality.loss, 1.0 - quality.error)
        if is_kept:
            setattr(totals, f"valid_{task.measure}", value)
            totals.valid_error = quality.error
        if self.best:
            self.best.judge(is_kept)
            self.is_saved = self.is_saved and is_kept
        self.screen.valid = f"valid {quality.short(task.measure)}"
        note = "" if is_kept else ": no better, back to the best model"
        self.screen.line(f"valid {quality.text(task.measure)}{note}")

    def quality(self, split: str, source: Strategy | Ema) -> Quality:
        """Measure the final model of `source` on a split. Collective."""
        learner, train = self.learner, self.config.train
        with swapped(learner, source, self.folder.path):
            watch = partial(self.screen.watch, f"evaluating {split}")
            return evaluate(learner, self.task, split, train, self.world, watch=watch)

    def lent_model(self, name: str, model: Any = None) -> State:
        """Return theta as it is, (P,) under `name`, and what lies outside it: not to
        be changed as long as it is looked at.

        Args:
            model: what there is in the place of theta, if there is.

        Raises:
            DivergenceError: it is not finite.
        """
        model = self.learner.theta if model is None else model
        if not is_finite(model):
            raise self.failure.diverged("the model is not finite")
        with lending():
            theta, rest = to_array(model), self.learner.rest.state()
        return {name: theta, **nested("model", rest)}

    def save(self, *, beside: bool = False) -> None:
        """Write a checkpoint, unless nothing has changed since the last. Collective.

        Args:
            beside: whether training may go on while it is written.

        Raises:
            CheckpointError: it cannot be written; or the log, but the checkpoint is.
            DivergenceError: the model is not finite any more.
        """
        if self.is_saved and self.strategy.lockstep:
            with self.recorder.paused():
                self.saving.settle()
            return
        with self.paused("checkpoint"):
            try:
                self.log.flush()  # what is saved is logged
            except CheckpointError as error:
                self.failure.note(error)
            self.learner.settle()
            self.failure.count_skipped(self.learner.checked)
            of_run = self.parts, self.totals, self.samples
            with self.saving.writing(*of_run, beside=beside) as write_models:
                average = State()
                if self.ema:
                    with self.final_model("theta_ema", self.ema, beside) as found:
                        average = {n: value.copy() for n, value in found.items()}
                with self.final_model("theta", self.strategy, beside) as found:
                    write_models(found | average)
        self.is_saved = True

    @contextmanager
    def final_model(
        self, name: str, source: Strategy | Ema, beside: bool
    ) -> Iterator[State]:
        """Yield the final model of `source`, as `lent_model` does. Collective.

        It stands in theta's place, or, if it is written beside training and nothing
        lies outside theta, in a vector that is kept for it: theta need not make way.
        """
        learner, writer = self.learner, self.saving.beside if beside else None
        on_host = not getattr(learner.theta, "is_cuda", False)
        if writer and on_host and not len(learner.rest) and not holds_final(source):
            spare = writer.spare(name, learner.theta)
            source.final_model_(learner, spare)
            yield self.lent_model(name, spare)
            return
        with swapped(learner, source, self.folder.path):
            yield self.lent_model(name)

    def look_after_saving(self) -> None:
        """Go on with a checkpoint that is written, or sent, beside training."""
        try:
            self.saving.look_after(self)
        except CheckpointError as error:
            self.failure.note(error)

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Count the time of the block, but not as training; log it as an event."""
        began_s = self.world.now_s()
        with self.recorder.paused():
            yield
        step = self.totals.step
        try:
            self.log.event(name, began_s, self.world.now_s(), step=step)
        except CheckpointError as error:
            self.failure.note(error)
