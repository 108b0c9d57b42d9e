"""A run: its folder, and its parts built from the configuration.

runs/x/
  owner.json        who is at work here, see storage/owner.py
  config.toml       the resolved configuration
  vocabulary.json   the words, in the order of their ids; or what the frames are
  checkpoints/      see checkpoint.py
  log/rank-0000.h5  see runlog.py
  summary.json      what the run came to
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpilm import __version__
from mpilm.config import Config, read_config, tomllib
from mpilm.data.frame_items import View
from mpilm.errors import CheckpointError, ConfigError
from mpilm.optim.schedules import Schedule, build_schedule
from mpilm.storage.checkpoint import load_shared
from mpilm.storage.files import reason, replace_file, require_apart, text_of
from mpilm.storage.owner import Owner
from mpilm.train.task import Task, frame_view

if TYPE_CHECKING:
    from mpilm.learner.learner import Learner


class RunFolder:
    """Paths of a run. As a context manager it is released at the end.

    owner  this run's ownership of the folder, on rank 0
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.owner: Owner | None = None
        self.config = self.path / "config.toml"
        self.vocabulary = self.path / "vocabulary.json"
        self.checkpoints = self.path / "checkpoints"
        self.summary = self.path / "summary.json"

    def log(self, rank: int) -> Path:
        """Return the path of a rank's log."""
        return self.path / "log" / f"rank-{rank:04d}.h5"

    def files(self) -> Iterator[Path]:
        """Yield what a run consists of, as far as it is there."""
        yield from (self.config, self.vocabulary, self.summary)
        yield from (self.path / "log").glob("*")
        yield from self.checkpoints.glob("*/*")

    def require_apart(self, config: Config, source: Path) -> None:
        """Raise if a new run here would write over what it reads.

        The configuration that a run wrote may be read again: it stays as it is.

        Args:
            source: file that the configuration comes from.

        Raises:
            DataError: one line with the file.
        """
        if self.has_checkpoint():
            return
        written = [self.vocabulary, self.summary]
        try:
            same = self.config.read_bytes() == config.encoded()
        except OSError:
            same = True  # nothing is there
        require_apart(
            written if same else [self.config, *written], config.inputs(source)
        )

    def claim(self, rank: int, *, resume: bool) -> None:
        """Make the folder; what is there already stays as it is.

        Rank 0 owns it for all ranks from now on, until `release`.

        Raises:
            CheckpointError: it cannot be made, another run is at work in it, or it
                holds a run that is not resumed.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot write: {reason(error)}"
            ) from None
        if rank == 0:
            self.owner = Owner(self.path).take()
        if self.has_checkpoint() and not resume:
            raise CheckpointError(
                f"{self.path}: holds a run; --resume goes on with it, another --out"
                " starts a new one"
            )

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def require_own(self) -> None:
        """Raise if another run has taken the folder over; rank 0 looks.

        Raises:
            CheckpointError: one line that names it.
        """
        if self.owner:
            self.owner.require()

    def release(self) -> None:
        """Let another run have the folder."""
        if self.owner:
            self.owner.release()

    def write_description(self, config: Config, task: Task) -> None:
        """Write the configuration and the vocabulary.

        Raises:
            CheckpointError: they cannot be written; earlier ones stand.
        """
        try:
            replace_file(self.config, config.encoded())
            replace_file(self.vocabulary, json.dumps(task.description()).encode())
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot write: {reason(error)}"
            ) from None

    def has_checkpoint(self) -> bool:
        """Return whether a complete checkpoint is there."""
        return any(self.checkpoints.glob("step-?????????"))

    def require(self) -> RunFolder:
        """Return self.

        Raises:
            CheckpointError: there is no run here.
        """
        if not self.config.is_file():
            raise CheckpointError(f"{self.path}: no run here (no config.toml)")
        return self

    def read_vocabulary(self) -> dict[str, Any]:
        """Return what `Task.description` gave: what the model's data mean.

        Raises:
            CheckpointError: the file is missing or broken.
        """
        try:
            found = json.loads(text_of(self.vocabulary))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.vocabulary}: {error}") from None
        keys = ("words", "level"), ("features", "context", "classes", "names", "counts")
        if not any(isinstance(found, dict) and found.keys() >= {*k} for k in keys):
            raise CheckpointError(f"{self.vocabulary}: is not what training wrote")
        return dict(found)


def require_same(config: Config, saved: str, checkpoint: Path) -> None:
    """Raise if a checkpoint's arrays, or its place in the data, mean nothing here.

    Its corpus and its number of ranks are checked where they are read.

    Args:
        saved: the configuration in the checkpoint, TOML.

    Raises:
        CheckpointError: one line naming the first setting that differs.
    """
    given, kept = config.to_dict(), tomllib.loads(saved)
    lasting = [("model", k) for k in given["model"] if k not in ("dropout", "init")]
    lasting += [("optim", "name"), ("data", "source")]
    lasting += [("strategy", "name"), ("strategy", "inner")]
    lasting += [("train", "batch"), ("train", "unroll")]
    for section, key in lasting:
        old, new = kept[section].get(key), given[section].get(key)
        if old != new:
            raise CheckpointError(
                f"{checkpoint}: was made with {section}.{key} = {old}, this run has"
                f" {new}: resume with {old}, or start anew with another --out"
            )


def make_learner(
    config: Config,
    num_inputs: int,
    num_outputs: int,
    batches: Any,
    *,
    device: str,
    seed: int,
    compute: Any = None,
) -> Learner:
    """Return a rank's learner; `train.seed` makes the same first model on all ranks.

    Without batches it is only to evaluate, and has no optimiser: making one would load
    torch._dynamo, a third of the time that a program with torch takes to start.
    """
    import torch

    from mpilm.learner.learner import Learner
    from mpilm.models.build import build_model
    from mpilm.optim.build import build_optimizer

    torch.set_num_threads(config.train.threads)
    sizes = (num_inputs, num_outputs)
    model = build_model(config.model, *sizes, seed=config.train.seed)
    return Learner(
        model,
        batches,
        build_optimizer(config.optim, model) if batches else no_optimizer,
        compute=compute,
        device=device,
        seed=seed,
        flat=True,
    )


def no_optimizer(parameters: Any) -> Any:
    """Return what stands in the place of an optimiser that is never used."""
    return SimpleNamespace(param_groups=[], state={})


@dataclass(frozen=True)
class TrainedModel:
    """The model of a run's newest checkpoint; reading it needs no torch.

    description  what its inputs and outputs mean, see `Task.description`
    fingerprint  hash of that, the same as its corpus has
    theta_P      its parameters, or their moving average
    """

    path: Path
    config: Config
    description: dict[str, Any]
    fingerprint: str
    theta_P: Any

    @classmethod
    def read(cls, path: Path, *, ema: bool = False) -> TrainedModel:
        """Return the model of the run folder `path`, or its moving average.

        Raises:
            CheckpointError: no run, no checkpoint, one that cannot be read, or one
                without a moving average.
        """
        folder = RunFolder(path).require()
        config = read_config(folder.config)
        shared = load_shared(folder.checkpoints)
        description = folder.read_vocabulary()
        if ema and "theta_ema" not in shared:
            raise CheckpointError(f"{path}: has no moving average (see [ema])")
        return cls(
            path,
            config,
            description,
            shared["fingerprint"],
            shared["theta_ema" if ema else "theta"],
        )

    @property
    def vocabulary(self) -> list[str]:
        """The words, in the order of their ids.

        Raises:
            CheckpointError: it is an acoustic model.
        """
        return list(self.require("words"))

    @property
    def level(self) -> str:
        """What a token is: "word" or "char"."""
        return str(self.require("level"))

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each class stood in the train split, (C,).

        Raises:
            CheckpointError: it is a language model.
        """
        return np.array(self.require("counts"), np.int64)

    @property
    def view(self) -> View:
        """How an acoustic model looks at an utterance."""
        context = int(self.require("context"))
        return frame_view(self.config.model.settings, context, self.config.train)

    def require(self, key: str) -> Any:
        """Return an entry of the description.

        Raises:
            CheckpointError: this kind of model has no such thing.
        """
        if key not in self.description:
            name = self.config.model.name
            raise CheckpointError(f"{self.path}: a model {name} has no {key}")
        return self.description[key]

    def learner(self, device: str = "cpu") -> Learner:
        """Return a learner that holds the model, without data."""
        if "words" in self.description:
            num_inputs = num_outputs = len(self.vocabulary)
        else:
            spliced = 2 * self.description["context"] + 1
            num_inputs = self.description["features"] * spliced
            num_outputs = self.description["classes"]
        learner = make_learner(
            without_init(self.config),
            num_inputs,
            num_outputs,
            batches=None,
            device=device,
            seed=self.config.train.seed,
        )
        learner.load_theta(self.theta_P)
        return learner


def without_init(config: Config) -> Config:
    """Return a configuration that asks for no file of first weights."""
    settings = config.model.settings
    if not getattr(settings, "init", ""):
        return config
    model = replace(config.model, settings=replace(settings, init=""))
    return replace(config, model=model)


REJECTING = ("local", "allreduce", "model_averaging")  # theta is all of their model


def make_schedule(config: Config, ranks: int = 1) -> Schedule:
    """Return the learning rate as a function of global samples.

    Raises:
        ConfigError: one that this model or strategy cannot follow.
    """
    reads = config.model.settings.reads
    if config.schedule.name == "newbob_accuracy" and reads != "frames":
        raise ConfigError(
            f"schedule.name = newbob_accuracy: model {config.model.name} has no frame"
            " accuracy; newbob goes by the loss"
        )
    schedule = build_schedule(
        config.schedule,
        lr=config.optim.settings.lr,
        samples=config.train.samples,
        ranks=ranks,
    )
    if schedule.rejects and config.strategy.name not in REJECTING:
        raise ConfigError(
            f"schedule.reject: strategy {config.strategy.name} keeps more than theta;"
            f" it works with {', '.join(REJECTING)}"
        )
    return schedule


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import torch

    found = {
        "mpilm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
    }
    return found
