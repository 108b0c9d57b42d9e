"""The parts of a run, built from its configuration; the model that it came to."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpilm import __version__
from mpilm.config import OWN, Config
from mpilm.data.frame_items import View
from mpilm.errors import CheckpointError, ConfigError
from mpilm.optim.schedules import Schedule, build_schedule
from mpilm.seeds import DROPOUT, derive
from mpilm.storage.checkpoint import load_shared
from mpilm.train.folder import RunFolder
from mpilm.train.task import Task, frame_view
from mpilm.world.base import World

if TYPE_CHECKING:
    from mpilm.learner.learner import Learner


def make_learner(
    config: Config,
    num_inputs: int,
    num_outputs: int,
    batches: Any,
    *,
    device: str,
    seed: int,
    compute: Any = None,
    clock: Any = time.perf_counter,
) -> Learner:
    """Return a rank's learner; `train.seed` makes the same first model on all ranks.

    Without batches it is only to evaluate, and has no optimiser: making one would load
    torch._dynamo, a third of the time that a program with torch takes to start.
    """
    from mpilm.learner.learner import Learner
    from mpilm.learner.threads import use_threads
    from mpilm.models.build import build_model, require_sample
    from mpilm.optim.build import build_optimizer

    use_threads(config.train.threads)
    sizes = (num_inputs, num_outputs)
    if batches:
        num_targets = config.train.batch * config.train.unroll
        require_sample(config.model, num_outputs, num_targets)
        require_gradient(config)
        require_rows_known(config)
    model = build_model(config.model, *sizes, seed=config.train.seed)
    return Learner(
        model,
        batches,
        build_optimizer(config.optim, model) if batches else no_optimizer,
        compute=compute,
        clock=clock,
        device=device,
        seed=seed,
        flat=config.optim.name != "muon",  # which goes by shapes
        sparse=getattr(config.model.settings, "sparse", False),
    )


def require_gradient(config: Config) -> None:
    """Raise unless the optimiser can use this model's gradient.

    Raises:
        ConfigError: natural gradient of a softmax that is not the full one, of weights
            that are dropped, or in bfloat16; or what takes whole matrices of rows.
    """
    settings, name = config.model.settings, config.optim.name
    for key, plain in (("weight_dropout", 0.0), ("compute", "float32")):
        if name == "ng_sgd" and getattr(settings, key, plain) != plain:
            raise ConfigError(
                f'optim.name = "ng_sgd": has no preconditioner for an LSTM with'
                f" model.{key} = {getattr(settings, key)}; sgd and adamw train it"
            )
    if name in ("ng_sgd", "muon") and getattr(settings, "sparse", False):
        raise ConfigError(
            f'optim.name = "{name}": takes whole matrices, model.sparse = true gives it'
            " rows; sgd and adamw update these"
        )
    softmax = getattr(settings, "softmax", "full")
    if name == "ng_sgd" and softmax != "full":
        raise ConfigError(
            f'optim.name = "ng_sgd": has no preconditioner for model.softmax ='
            f' "{softmax}"; sgd and adamw train it'
        )


def require_rows_known(config: Config) -> None:
    """Raise unless the strategy knows the rows of a step before it is taken.

    Raises:
        ConfigError: they are to be pulled, and several minibatches make a step.
    """
    accumulate = config.train.accumulate
    sparse = getattr(config.model.settings, "sparse", False)
    if config.strategy.name == "async_sgd" and sparse and accumulate > 1:
        raise ConfigError(
            f"train.accumulate = {accumulate}: async_sgd with model.sparse = true pulls"
            " the rows of one minibatch; it works with accumulate = 1 and a larger"
            " train.batch"
        )


def learner_of(
    config: Config, task: Task, batches: Any, world: World, compute: Any
) -> Learner:
    """Return a rank's learner of a task; `compute` runs its work."""
    return make_learner(
        config,
        task.num_inputs,
        task.num_outputs,
        batches,
        device=world.device(config.train.device),
        seed=derive(DROPOUT, config.train.seed, world.rank),
        compute=compute,
        clock=world.now_s,
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
        config = folder.read_config()
        if config.model.name == OWN:
            raise CheckpointError(
                f"{path}: trained by mpilm.fit: mpilm.load_model(model, {str(path)!r})"
                " in its program gives the model"
            )
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
