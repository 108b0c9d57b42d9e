"""Where a run goes on: its newest checkpoint, and what may have changed since."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpilm.config import Config, resolve, tomllib
from mpilm.errors import CheckpointError, ConfigError
from mpilm.storage.checkpoint import Checkpoints
from mpilm.storage.saved import State
from mpilm.train.changes import Change, differences
from mpilm.train.folder import RunFolder
from mpilm.train.task import Task

# What a checkpoint's arrays, its place in the data or its first model depend on. The
# corpus and the number of ranks are checked where they are read.
LASTING = {"optim.name", "data.source", "strategy.name", "strategy.inner"}
LASTING |= {"train.batch", "train.unroll", "train.seed"}
FREE = {"model.dropout"}  # of the model; all else of it is lasting


@dataclass(frozen=True)
class Place:
    """A checkpoint that a run goes on from.

    own      this rank's state
    samples  of all ranks when it was written
    changes  settings that the run had before, and has not now
    is_end   the run had come to its end, and nothing is changed
    """

    own: State
    samples: int
    changes: list[Change]
    is_end: bool


def find_place(
    checkpoints: Checkpoints, folder: RunFolder, config: Config, task: Task
) -> Place | None:
    """Return where to go on from; None: there is no checkpoint.

    Raises:
        CheckpointError: the newest one is of another corpus, configuration or number of
            ranks; or the run has ended, and the changes would change nothing.

    Communicates: collective.
    """
    world = checkpoints.world
    newest = checkpoints.latest()
    if newest is None:
        return None
    shared, own = checkpoints.load(newest)
    has_ended = world.comm.allgather(folder.summary.exists())[0]
    with world.all_or_none():
        if shared["fingerprint"] != task.fingerprint:
            raise CheckpointError(
                f"{config.data.corpus}: its {task.meaning} is not the one that"
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
    return Place(own, samples, changes, has_ended and not changes)


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
            raise CheckpointError(
                f"{checkpoint}: was made with {key} = {change.old}, this run has"
                f" {change.new}: resume with {change.old}, or start anew with another"
                " --out"
            )
