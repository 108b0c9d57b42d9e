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
            found = TorchSchedule(
                self.given.scheduler,
                self.given.learner.optimizer,
                per=self.per,
                epoch=lambda: int(self.batches.epoch),
            )
            self.given.hooks += found.hooks
            name = f"scheduler: {type(self.given.scheduler).__name__}"
            self.require_valid(name, by_validation=found.by_validation)
            return found
        schedule = super().make_schedule()
        name = f"schedule: {self.config.schedule.name}"
        self.require_valid(name, by_validation=bool(schedule.newbob))
        return schedule

    def require_valid(self, name: str, *, by_validation: bool) -> None:
        """Raise if a schedule goes by validations, and there are none.

        Raises:
            ConfigError: one line that names it.
        """
        if by_validation and "valid" not in self.given.splits:
            raise ConfigError(f"{name} goes by validations: give valid")

    def make_learner(self, *, is_new: bool) -> Learner:
        learner = self.given.learner
        learner.batches, learner.compute = self.batches, self.timeline.compute
        return learner

    def refresh_lr(self) -> None:
        if self.given.scheduler is None:
            super().refresh_lr()
