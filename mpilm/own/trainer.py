"""The trainer, with a task, a learner and a schedule that somebody has given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpilm.config import Config
from mpilm.errors import ConfigError
from mpilm.optim.schedules import Schedule
from mpilm.own.schedule import TorchSchedule
from mpilm.own.task import Given, OwnTask
from mpilm.train.loop import Trainer
from mpilm.world.base import World

if TYPE_CHECKING:
    from mpilm.learner.learner import Learner


class OwnTrainer(Trainer):
    """One rank's part in a run of `mpilm.fit`.

    Args:
        given: what is trained, on what.
        per: when a torch scheduler steps: "step" or "epoch".
    """

    resumed_by = "resume = True"

    def __init__(
        self,
        config: Config,
        world: World,
        out: Path,
        given: Given,
        *,
        per: str,
        resume: bool,
    ) -> None:
        self.given, self.per = given, per
        super().__init__(config, world, out, resume=resume)

    def open_task(self) -> OwnTask:
        return OwnTask(self.given)

    def make_schedule(self) -> Schedule:
        if self.given.scheduler is not None:
            return TorchSchedule(
                self.given.scheduler,
                self.given.learner.optimizer,
                per=self.per,
                epoch=lambda: int(self.batches.epoch),
            )
        schedule = super().make_schedule()
        if schedule.newbob and "valid" not in self.given.splits:
            raise ConfigError(
                f"schedule: {self.config.schedule.name} goes by validations: give valid"
            )
        return schedule

    def make_learner(self, *, is_new: bool) -> Learner:
        learner = self.given.learner
        learner.batches, learner.compute = self.batches, self.timeline.compute
        return learner

    def refresh_lr(self) -> None:
        if self.given.scheduler is None:
            super().refresh_lr()
