"""Training: one learner per rank, a strategy between them. Reads top to bottom."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpilm.config import Config
from mpilm.errors import CheckpointError, DivergenceError, MpilmError
from mpilm.storage.checkpoint import Checkpoints
from mpilm.storage.runlog import RunLog, write_summary
from mpilm.storage.saved import State, nested, under
from mpilm.strategies import Strategy, find_strategy
from mpilm.strategies.ema import Ema
from mpilm.train.best_model import BestModel
from mpilm.train.changes import Change, read_changes
from mpilm.train.consensus import measure_consensus
from mpilm.train.evaluate import Quality, evaluate, swapped
from mpilm.train.folder import RunFolder
from mpilm.train.metrics import LOG_FIELDS, MetricsRecorder, Milestones, Totals
from mpilm.train.notes import notes_on
from mpilm.train.run import make_learner, make_schedule
from mpilm.train.saving import find_place
from mpilm.train.screen import Screen, count
from mpilm.train.signals import STOP, SYNC, Agreement, StopRequest
from mpilm.train.summary import closing_lines, summarise
from mpilm.train.task import open_task
from mpilm.world.base import World

COUNTS = ("mixes", "staleness")  # of a strategy's metrics, in a row of the log
LARGEST_LOSS = math.log(sys.float_info.max)  # nats; above, perplexity is infinite


class Trainer:
    """One rank's part in a run.

    Args:
        config: the resolved configuration.
        world: this rank's world.
        out: the run folder; rank 0 makes it.
        resume: go on from the newest checkpoint in `out`, if there is one.

    Raises:
        MpilmError: bad input; one line, the same on every rank.

    Communicates: collective.
    """

    def __init__(
        self, config: Config, world: World, out: Path, *, resume: bool = False
    ) -> None:
        self.config, self.world, self.folder = config, world, RunFolder(out)
        try:
            self.set_up(resume=resume)
        except BaseException:
            self.folder.release()
            raise

    def set_up(self, *, resume: bool) -> None:
        """Make the parts, or take them up where they were. Collective."""
        config, world = self.config, self.world
        kind = find_strategy(config.strategy.name)
        self.strategy = kind(world, config.strategy.settings)
        lockstep = self.strategy.lockstep
        with world.all_or_none():
            self.task = open_task(config.data.corpus, config.model)
            self.batches = self.task.batches(config, world, lockstep=lockstep)
            self.schedule = make_schedule(config, world.size)
            self.folder.claim(world.rank, resume=resume)
        keep = config.checkpoint.keep
        self.checkpoints = Checkpoints(self.folder.checkpoints, world, keep=keep)
        place = None
        if resume:
            place = find_place(self.checkpoints, self.folder, config, self.task)
        self.has_ended = place is not None and place.is_end
        if self.has_ended:
            return
        with world.all_or_none():
            self.learner = make_learner(
                config,
                self.task.num_inputs,
                self.task.num_outputs,
                self.batches,
                device=world.device(config.train.device),
                seed=config.train.seed + world.rank,
                compute=world.compute,
            )
            self.strategy.require(self.learner)
        self.totals = Totals()
        self.failure: MpilmError | None = None  # will stop all ranks in order
        self.batches.start(config.train.samples)
        self.strategy.start(self.learner)
        with world.all_or_none():
            self.ema: Ema | None = None
            if config.ema.on:
                parts = self.strategy, self.learner
                self.ema = Ema(config.ema, *parts, done=self.batches.done)
            self.best = BestModel(self.learner) if self.schedule.rejects else None
            if place:
                self.restore(place.own)
            if world.rank == 0 and place:
                self.folder.note_changes(place.changes, place.samples)
            elif world.rank == 0:
                self.folder.describe(config, self.task)
        self.batches.synchronise(self.learner.samples)
        self.before = self.learner.samples  # this step, on this rank
        self.learner.refresh = self.refresh_lr
        self.recorder = MetricsRecorder(world, self.totals)
        self.validations = Milestones(config.train.valid_every, self.samples)
        self.savings = Milestones(config.checkpoint.every, self.samples)
        self.is_validated = False  # the model has not changed since it was
        with world.all_or_none():
            path = self.folder.log(world.rank)
            step = self.totals.step
            self.log = RunLog(path, world.rank, LOG_FIELDS, from_step=step)
        self.screen = Screen(
            config.train.samples, samples=self.samples, speaks=world.rank == 0
        )
        for line in self.introduction(place.changes if place else []):
            self.screen.line(line)

    def introduction(self, changes: Sequence[Change] = ()) -> Iterator[str]:
        """Yield what a person wants to know before it begins."""
        config, task = self.config, self.task
        left_out = self.batches.num_dropped
        yield (
            f"{config.model.name} of {self.learner.layout.size:,} parameters,"
            f" {config.strategy.name} on {count(self.world.size, 'rank')}"
            f" ({self.learner.device.type})"
        )
        yield (
            f"{task.path}: {task.num_train:,} training {task.sample}s,"
            f" {left_out:,} at the ends of the streams left out"
        )
        size = self.world.size
        for note in (*config.notes, *notes_on(config, self.strategy, size)):
            yield f"note: {note}"
        if self.totals.step:
            yield f"resumed at step {self.totals.step:,}, {self.samples:,} samples"
        for change in changes:
            yield f"changed: {change}"

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
            if not self.run(stop or StopRequest()):
                return False
            self.conclude()
        return True

    def run(self, stop: StopRequest) -> bool:
        """Take steps to the end, or until a stop; save. As `train`."""
        config, totals = self.config, self.totals
        learner, strategy = self.learner, self.strategy
        with self.screen, self.log:
            agreement = Agreement(
                self.world,
                every=max(config.checkpoint.agree_every, strategy.pace.stride),
                request=stop,
                lockstep=strategy.lockstep,
                agree=strategy.pace.agree,
            )
            self.recorder.begin(agreement.traffic, self.batches.traffic)
            samples = strategy.pace.agree(self.samples)
            while samples < config.train.samples and not self.schedule.finished:
                self.before = learner.samples
                self.refresh_lr()
                loss = strategy.step(learner)
                totals.step += 1
                samples = strategy.pace.agree(self.samples)
                self.is_validated = False
                if totals.step % config.train.log_every == 0:
                    self.record(samples, float(loss))
                is_due = self.validations.due(samples) or self.savings.due(samples)
                if is_due and strategy.lockstep:
                    self.sync(samples)
                if self.failure:
                    stop.requested = "failure"
                outcome = agreement.poll(
                    totals.step, sync=is_due and not strategy.lockstep
                )
                if outcome == SYNC:
                    self.drain()
                if outcome == STOP:
                    break
            strategy.retire(learner)
            agreement.finish(self.drain_retired)
            strategy.finish(learner)
            with self.recorder.paused():
                with self.world.all_or_none():
                    if self.failure:
                        raise self.failure
                samples = self.batches.synchronise(learner.samples)
            if not agreement.stopped:
                self.screen.done()
                self.validate()
            self.save()
            self.batches.close()
        if agreement.stopped:
            self.screen.line(
                f"stopped early at {samples:,} samples; mpilm resume"
                f" {self.folder.path} goes on from here"
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
            quality=partial(self.quality, source=self.strategy),
            ema_quality=partial(self.quality, source=self.ema) if self.ema else None,
        )
        with self.world.all_or_none():
            if self.world.rank == 0:
                self.folder.require_own()
                changes = read_changes(self.folder.changes)
                summary["changes"] = [asdict(change) for change in changes]
                write_summary(self.folder.summary, summary)
        for text in closing_lines(summary):
            self.screen.line(text)

    def sync(self, samples: int) -> None:
        """Validate and write a checkpoint, if it is time. Collective.

        Args:
            samples: how far the ranks are; the same on all of them.
        """
        if self.validations.pass_(samples):
            self.validate()
        if self.savings.pass_(samples):
            self.save()

    def drain(self) -> None:
        """Bring ranks that are out of lockstep to a sync point. Collective."""
        with self.paused("sync"):
            self.strategy.retire(self.learner)
            self.strategy.finish(self.learner)
            samples = self.batches.synchronise(self.learner.samples)
        self.sync(samples)

    def drain_retired(self) -> None:
        """`drain` on a rank that takes no more steps: afterwards it answers again."""
        self.drain()
        self.strategy.retire(self.learner)

    def record(self, samples: int, loss: float) -> None:
        """Write a row of the log and show progress; note a failure for later."""
        if self.failure:
            return
        totals = self.totals
        if not loss < LARGEST_LOSS:
            self.failure = self.diverged(f"the loss is {loss:.3g}")
            return
        self.recorder.mark()
        totals.loss_sum += loss
        totals.loss_count += 1
        learner, metrics = self.learner, self.strategy.metrics()
        counts = {name: metrics[name] for name in COUNTS if name in metrics}
        own = {"samples": learner.samples, "loss": loss, "lr": learner.lr}
        try:
            self.log.row(**totals.row(), **own, **counts)
        except CheckpointError as error:
            self.failure = error
        self.screen.update(samples, loss)

    def diverged(self, what: str) -> DivergenceError:
        """Return the error that says so."""
        return DivergenceError(
            f"{what} at step {self.totals.step}: a smaller optim.lr or optim.clip may"
            f" help; earlier checkpoints are in {self.folder.checkpoints}",
            everywhere=True,
        )

    def validate(self) -> None:
        """Measure the model on the valid split; tell the schedule.

        Raises:
            DivergenceError: its loss is not finite.

        Communicates: collective.
        """
        if self.is_validated and self.strategy.lockstep:
            return
        self.is_validated, totals = True, self.totals
        with self.paused("evaluate"):
            quality = self.quality("valid", self.strategy)
            if self.ema:
                average = self.quality("valid", self.ema)
                totals.ema_valid_perplexity = average.perplexity
        if not math.isfinite(quality.perplexity):
            raise self.diverged(f"the valid perplexity is {quality.perplexity}")
        is_kept = self.schedule.observe(quality.loss, 1.0 - quality.error)
        if is_kept:
            totals.valid_perplexity = quality.perplexity
            totals.valid_error = quality.error
        if self.best:
            self.best.judge(is_kept)
        note = "" if is_kept else ": worse, back to the best model"
        self.screen.line(f"valid {quality}{note}")
        with self.recorder.paused():
            metrics = self.strategy.metrics()
            found = measure_consensus(self.learner, self.world, metrics)
        totals.consensus_step = totals.step
        totals.consensus_distance = found.distance
        totals.consensus_norm = found.norm
        totals.spectral_gap = found.gap

    def quality(self, split: str, source: Strategy | Ema) -> Quality:
        """Measure the final model of `source` on a split. Collective."""
        with swapped(self.learner, source):
            return evaluate(
                self.learner, self.task, split, self.config.train, self.world
            )

    def final_theta(self, source: Strategy | Ema) -> Any:
        """Return the final model of `source`, (P,). Collective.

        Raises:
            DivergenceError: it is not finite.
        """
        with swapped(self.learner, source):
            theta = self.learner.theta.cpu().numpy().copy()
        if not np.isfinite(theta).all():
            raise self.diverged("the model is not finite")
        return theta

    def save(self) -> None:
        """Write a checkpoint. Collective.

        Raises:
            CheckpointError: it cannot be written.
            DivergenceError: the model is not finite any more.
        """
        with self.paused("checkpoint"):
            with self.world.all_or_none():
                self.log.flush()
                self.folder.require_own()
            shared = {
                "theta": self.final_theta(self.strategy),
                "fingerprint": self.task.fingerprint,
                "config": self.config.to_toml(),
                "samples": self.samples,
            }
            own = {
                **nested("learner", self.learner.state()),
                **nested("strategy", self.strategy.state()),
                **nested("schedule", self.schedule.state()),
                **nested("totals", asdict(self.totals)),
            }
            if self.best:
                own |= nested("best", self.best.state())
            if self.ema:
                shared["theta_ema"] = self.final_theta(self.ema)
                own |= nested("ema", self.ema.state())
            self.checkpoints.save(self.totals.step, shared, own)

    def restore(self, saved: State) -> None:
        """Go on from a state that `save` wrote."""
        # the settings of the optimiser are the configuration's, which may have changed
        self.learner.load_state(under("learner", saved), settings=False)
        self.strategy.load_state(under("strategy", saved))
        self.schedule.load_state(under("schedule", saved))
        self.totals = Totals(**under("totals", saved))
        if self.best:
            self.best.load_state(under("best", saved))
        if self.ema and "ema/model" in saved:  # else it begins now
            self.ema.load_state(under("ema", saved))

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Count the time of the block, but not as training; log it as an event."""
        began_s = self.world.now_s()
        with self.recorder.paused():
            yield
        step = self.totals.step
        self.log.event(name, began_s, self.world.now_s(), step=step)
