"""Your own torch model, trained by any strategy under mpirun: `mpilm.fit`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mpilm.config import Config
from mpilm.errors import STOPPED_EARLY, CheckpointError, ConfigError, DataError
from mpilm.learner.learner import Learner
from mpilm.learner.threads import use_threads
from mpilm.optim.build import clip_before_step
from mpilm.own.schedule import PER, optimizer_maker, scheduler_of
from mpilm.own.settings import Section, config_of, require_same
from mpilm.own.sources import source_of
from mpilm.own.task import (
    Given,
    compiled,
    count_of,
    fingerprint_of,
    loss_of,
    require_splits,
)
from mpilm.own.trainer import OwnTrainer
from mpilm.storage.checkpoint import load_shared
from mpilm.storage.files import text_of
from mpilm.storage.saved import under
from mpilm.train.folder import RunFolder
from mpilm.train.gpu_messages import choose_messages
from mpilm.train.run import no_optimizer
from mpilm.train.signals import StopRequest
from mpilm.world.base import World
from mpilm.world.mpi import MpiWorld, abort_on_error

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Fitted:
    """What a run came to.

    finished  whether it came to its end; False: a signal stopped it
    rank      of this process
    summary   what is in summary.json, see docs/metrics.md; empty if not finished
    """

    finished: bool
    rank: int
    summary: dict[str, Any] = field(default_factory=dict)


def fit(
    model: nn.Module,
    batches: Any,
    loss: Callable[[Any, Any], Any] | None = None,
    *,
    out: Path | str,
    strategy: Section = "allreduce",
    optimizer: Any = torch.optim.AdamW,
    optimizer_settings: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    scheduler_per: Literal["step", "epoch"] = "step",
    schedule: Section = "constant",
    samples: int = 0,
    epochs: float = 0,
    valid: Any = None,
    test: Any = None,
    valid_every: int | None = None,
    checkpoint_every: int = 0,
    keep: int = 2,
    ema: Mapping[str, Any] | None = None,
    clip: float = 0.0,
    accumulate: int = 1,
    autocast: Literal["", "bfloat16"] = "",
    num_samples: Callable[[Any], int] | None = None,
    shard: bool | None = None,
    seed: int = 1,
    device: str = "auto",
    threads: int = 1,
    log_every: int = 10,
    resume: bool = False,
    faults: Mapping[str, Any] | None = None,
    gpu_messages: str = "staged",
    world: World | None = None,
) -> Fitted:
    """Train a model on all ranks that mpirun started; keep it in a run folder.

    Afterwards `model` holds the final model: for most strategies the mean over ranks.
    The folder is one of `mpilm train`: `mpilm report` shows it, a signal stops it with
    a checkpoint and exit code 75, and the same call with `resume = True` goes on.

    Args:
        model: any module with float32 parameters; all ranks begin with rank 0's. It is
            trained in training mode; parts of it that are in evaluation mode when it
            is not itself (BatchNorm that is to stay) stay so.
        batches: a DataLoader (dealt out over the ranks), any iterable of minibatches,
            an object with `.next()`, or a function from the world to one of them, of
            this rank's own data; see sources.py. Minibatches have any form, see
            learner/minibatch.py.
        loss: from (model, minibatch) to the mean loss, or to a pair of it and the
            number of samples that were guessed wrong; `model.loss(minibatch)` if None.
        out: the run folder.
        strategy: a name, or a table as in section [strategy]: {"name": ..., ...}.
        optimizer: a torch optimiser, its class, or a function from parameters to one.
        optimizer_settings: for the class or function: {"lr": 1e-3}.
        scheduler: a torch scheduler of the optimiser, or a function from the optimiser
            to one. It counts this rank's own steps.
        scheduler_per: when it steps: after a "step", or an "epoch" of this rank.
        schedule: without a scheduler: a name or table as in section [schedule].
        samples: how many all ranks process together; instead of it
        epochs: passes over the data, where their number of samples is known.
        valid, test: to evaluate: a DataLoader, a list of minibatches, or a function
            that returns an iterator; the same on all ranks.
        valid_every: samples between evaluations; None: an epoch, 0: at the end only.
        checkpoint_every: samples between checkpoints; 0: at the end, or when stopped.
        keep: checkpoints kept.
        ema: section [ema]: a moving average of the model, {"samples": ...}.
        clip: largest norm of the whole gradient; 0: no clipping.
        accumulate: minibatches in a step.
        autocast: "bfloat16": the loss is computed under `torch.autocast`.
        num_samples: from a minibatch to its samples; the rows of its first tensor.
        shard: whether a rank takes every K-th minibatch; None: as sources.py says.
        seed: of dropout and of the order of the data.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads of one rank.
        log_every: minibatches between two rows of the log.
        resume: go on from the newest checkpoint in `out`, if there is one.
        faults: section [faults].
        gpu_messages: "staged", "direct" or "auto", see section [world].
        world: of this rank, inside `run_mpi` or `run_virtual`; None: MPI's, and an
            error on one rank ends all of them.

    Raises:
        MpilmError: bad input, one line; SystemExit where no world was given.

    Communicates: collective.
    """
    own = dict(locals())
    given_world = own.pop("world")
    if given_world is not None:
        return fit_in(given_world, None, **own)
    with StopRequest() as stop, MpiWorld() as found, abort_on_error(found):
        fitted = fit_in(found, stop, **own)
    if not fitted.finished:
        raise SystemExit(STOPPED_EARLY)
    return fitted


def fit_in(
    world: World,
    stop: StopRequest | None,
    *,
    out: Path | str,
    scheduler_per: str,
    resume: bool,
    **own: Any,
) -> Fitted:
    """Train in a world that is there. As `fit`."""
    config: Config | None = None
    with world.all_or_none():
        given = look_at(world, **own)
    epochs_of_ranks(given, world)
    with world.all_or_none():
        config = config_of(given, **own)
        if scheduler_per not in PER:
            raise ConfigError(f"scheduler_per: {scheduler_per!r} is none of {PER}")
        if hasattr(world, "configure"):
            world.configure(faults=config.faults, silence_s=config.world.silence_s)
    assert config is not None
    require_same(world, config, given, out=out, resume=resume)
    if isinstance(world, MpiWorld):
        choose_messages(world, config)
    folder = Path(out)
    with hooks(given, config):
        trainer = OwnTrainer(
            config, world, folder, given, per=scheduler_per, resume=resume
        )
        finished = trainer.train(stop)
        if trainer.has_ended:
            with world.all_or_none():
                load_learner(given.learner, folder, ema=False)
        else:
            strategy = trainer.strategy
            strategy.final_model_(given.learner, given.learner.theta)
    summary = {}
    if finished:
        with world.all_or_none():
            summary = json.loads(text_of(RunFolder(folder).summary))
    return Fitted(finished, world.rank, summary)


def look_at(
    world: World,
    *,
    model: Any,
    batches: Any,
    loss: Any,
    optimizer: Any,
    optimizer_settings: Mapping[str, Any] | None,
    scheduler: Any,
    valid: Any,
    test: Any,
    autocast: str,
    num_samples: Callable[[Any], int] | None,
    shard: bool | None,
    seed: int,
    device: str,
    threads: int,
    **_: Any,
) -> Given:
    """Return what somebody has given, with a learner of it. No communication.

    Raises:
        MpilmError: one line that says what is wrong with it.
    """
    use_threads(threads)
    if device not in DEVICES:
        raise ConfigError(f"device: {device!r} is none of {DEVICES}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: no GPU is visible (torch.cuda finds none)")
    module, called = compiled(model)
    if not module.training:
        called.train()  # a loop does it; from_pretrained() hands over the other mode
    splits = {"valid": valid, "test": test}
    splits = {name: given for name, given in splits.items() if given is not None}
    require_splits(splits)
    count = count_of(num_samples)
    source = source_of(batches, world, shard=shard, seed=seed, count=count)
    if autocast not in {"", "bfloat16"}:
        raise ConfigError(
            f"autocast: {autocast!r}: bfloat16 only; float16 would need its loss scaled"
        )
    found = Given(module, called, source, splits, count)
    kind = world.device(device)
    found.learner = Learner(
        module,
        None,
        optimizer_maker(optimizer, dict(optimizer_settings or {})),
        loss=loss_of(found, loss, autocast, kind),
        num_samples=count,
        compute=world.compute,
        clock=world.now_s,
        device=kind,
        seed=seed + world.rank,
    )
    if scheduler is not None:
        found.scheduler = scheduler_of(scheduler, found.learner.optimizer)
    return found


def epochs_of_ranks(given: Given, world: World) -> None:
    """Find the samples of an epoch of all ranks. Collective, a small allgather.

    Raises:
        DataError: what is dealt out is not the same on all ranks.
    """
    source = given.source
    items = source.geometry.get("items", 0) if source.is_dealt else 0
    found = world.comm.allgather((source.per_epoch, items))
    with world.all_or_none():
        for rank, (_, others) in enumerate(found):
            if others != found[0][1]:
                raise DataError(
                    f"batches: a data set of {found[0][1]} items on rank 0, of {others}"
                    f" on rank {rank}: what is dealt out must be the same on all ranks;"
                    " data of each rank's own comes from a function of the world"
                )
    numbers = [number for number, _ in found]
    if all(numbers):
        given.per_epoch = source.per_epoch if source.is_dealt else sum(numbers)


@contextmanager
def hooks(given: Given, config: Config) -> Iterator[None]:
    """Let the optimiser clip inside the block, if it is to; then remove all hooks."""
    clip = config.optim.settings.clip
    if clip:
        optimizer = given.learner.optimizer
        given.hooks.append(optimizer.register_step_pre_hook(clip_before_step(clip)))
    try:
        yield
    finally:
        for hook in given.hooks:
            hook.remove()


def load_model(model: nn.Module, out: Path | str, *, ema: bool = False) -> nn.Module:
    """Put the model of a run's newest checkpoint into a module; return the module.

    Buffers and frozen parameters as well. No communication.

    Args:
        model: of the same class and sizes.
        out: a run folder that `fit` has made.
        ema: its moving average instead.

    Raises:
        CheckpointError: there is no such run, or it is of another model.
    """
    module, _ = compiled(model)
    device = next(module.parameters()).device
    maker: Any = no_optimizer
    load_learner(Learner(module, None, maker, device=device), Path(out), ema=ema)
    return model


def load_learner(learner: Learner, out: Path, *, ema: bool) -> None:
    """Put the model of a run's newest checkpoint into a learner. As `load_model`."""
    shared = load_shared(RunFolder(out).require().checkpoints)
    if shared["fingerprint"] != fingerprint_of(learner):
        raise CheckpointError(
            f"{out}: its model has other parameters than this one, by name or shape"
        )
    if ema and "theta_ema" not in shared:
        raise CheckpointError(f"{out}: has no moving average (see ema)")
    rest = learner.rest.read(under("model", shared))
    learner.load_theta(shared["theta_ema" if ema else "theta"])
    learner.rest.put_back(rest)
