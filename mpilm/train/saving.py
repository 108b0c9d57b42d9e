"""What a run saves, where it goes on, and what may have changed in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpilm.config import Config, resolve, tomllib
from mpilm.errors import CheckpointError, ConfigError
from mpilm.storage.beside import Beside
from mpilm.storage.checkpoint import Checkpoints
from mpilm.storage.merged import Merged
from mpilm.storage.saved import nested
from mpilm.train.changes import Change, differences
from mpilm.train.folder import RunFolder
from mpilm.train.metrics import Totals
from mpilm.train.peer_copies import PeerCopies
from mpilm.train.resume_point import ResumePoint, Stateful
from mpilm.train.task import Task
from mpilm.vectors import lending
from mpilm.world.base import Traffic, World

# What a checkpoint's arrays, its place in the data or its first model depend on. The
# corpus and the number of ranks are checked where they are read.
LASTING = {"optim.name", "data.source", "strategy.name", "strategy.inner"}
LASTING |= {"train.batch", "train.unroll", "train.seed"}
# of the model; all else of it is lasting
FREE = {"model.dropout", "model.input_dropout", "model.output_dropout"}
FREE |= {"model.embed_dropout", "model.compute"}


class Saving:
    """The checkpoints of a run.

    shared   theta (and theta_ema), fingerprint, config, samples
    own      of each rank, PART/...: the trainer's parts, totals

    beside   writes them while training goes on; None: training waits
    copies   in the memory of the next rank; None: there are none
    """

    def __init__(
        self, config: Config, task: Task, folder: RunFolder, world: World
    ) -> None:
        self.config, self.task = config, task
        self.folder, self.world = folder, world
        self.checkpoints = Checkpoints(
            folder.checkpoints, world, keep=config.checkpoint.keep
        )
        self.beside = Beside(self.checkpoints) if config.checkpoint.beside else None
        self.copies: PeerCopies | None = None

    @property
    def traffic(self) -> list[Traffic]:
        """What it has taken of the world's bytes and messages."""
        return [part.traffic for part in (self.beside, self.copies) if part]

    def look_after(self, trainer: Any) -> None:
        """Go on with what is done beside training; after every step.

        Raises:
            CheckpointError: this rank could not write it; the others do not know yet.

        Communicates: never blocking, but see `PeerCopies`.
        """
        if self.copies:
            self.copies.look_after(trainer)
        if self.beside:
            self.beside.poll()

    def settle(self) -> None:
        """Wait until what is written beside training is on the disk; and for copies.

        Raises:
            CheckpointError: it could not be written.

        Communicates: collective, see `Beside.settle`.
        """
        if self.copies:
            self.copies.settle()
        if self.beside:
            self.beside.settle()

    @contextmanager
    def writing(
        self,
        parts: Mapping[str, Stateful],
        totals: Totals,
        samples: int,
        *,
        beside: bool = False,
    ) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Write a checkpoint: in the block the models, after it the parts' states.

        So the models can be where theta is in the block, and theta is itself again
        after it. No vector is copied, but where it is written beside training.

        Args:
            parts: what has a state, by name.
            samples: of all ranks.
            beside: whether to return when all is copied, and to write it beside
                training.

        Yields:
            what is called once with the models: theta, and theta_ema if there is one,
            (P,); and the state outside them. Collective, a small allgather.

        Raises:
            CheckpointError: it cannot be written, or another run has the folder now.

        Communicates: collective.
        """
        with self.world.all_or_none():
            self.folder.require_own()
        self.settle()
        way = self.beside if beside and self.beside else self.checkpoints
        with way.writing(totals.step) as writing:

            def write_models(models: Mapping[str, Any]) -> None:
                shared = {
                    **models,
                    "fingerprint": self.task.fingerprint,
                    "config": self.config.to_toml(),
                    "samples": samples,
                }
                writing.shared(shared)

            yield write_models
            own = nested("totals", asdict(totals))
            with lending():
                for name, part in parts.items():
                    own |= nested(name, part.state())
            writing.own(own)

    def find(self) -> ResumePoint | None:
        """Return where to go on from; None: there is no checkpoint.

        Raises:
            CheckpointError: the newest one is of another corpus or configuration; or
                the run has ended, and the changes would change nothing.

        Communicates: collective.
        """
        config, folder = self.config, self.folder
        newest = self.checkpoints.latest()
        if newest is None:
            return None
        merged: Merged | None = None
        if newest.size == self.world.size:
            shared, own = self.checkpoints.load(newest)
        else:
            shared, merged = self.checkpoints.merge(newest)
            own = merged.state
        ended_at = self.world.comm.allgather(folder.read_summary().get("steps"))[0]
        has_ended = newest.step == ended_at  # else its last checkpoint is broken
        with self.world.all_or_none():
            if shared["fingerprint"] != self.task.fingerprint:
                raise CheckpointError(
                    f"{self.task.path}: its {self.task.meaning} is not the one that"
                    f" {newest.path} was trained with"
                )
            before = read_saved(shared["config"], newest.path)
            samples = int(shared["samples"])
            changes = differences(before, config, samples=samples, step=newest.step)
            require_lasting(changes, newest.path)
            if has_ended and changes and config.train.samples <= samples:
                raise CheckpointError(
                    f"{folder.path}: the run has ended, after {samples:,} samples:"
                    f" {changes[0].key} = {changes[0].new} would change nothing; more"
                    " train.samples go on with it, another --out starts anew"
                )
        return ResumePoint(
            own, newest.step, samples, changes, has_ended and not changes, merged
        )


def read_saved(text: str, checkpoint: Path) -> Config:
    """Return the configuration in a checkpoint, TOML.

    Raises:
        CheckpointError: this program knows no such settings.
    """
    try:
        return resolve(tomllib.loads(text), origin=str(checkpoint))
    except ConfigError as error:
        raise CheckpointError(f"made by another version: {error}") from None


def require_lasting(changes: list[Change], checkpoint: Path) -> None:
    """Raise if a setting is changed that must not be, see `LASTING`.

    Raises:
        CheckpointError: one line naming the first of them.
    """
    for change in changes:
        key = change.key
        if key in LASTING or (key.startswith("model.") and key not in FREE):
            old, new = change.shown
            raise CheckpointError(
                f"{checkpoint}: was made with {key} = {old}, this run has"
                f" {new}: resume with {old}, or start anew with another --out"
            )
