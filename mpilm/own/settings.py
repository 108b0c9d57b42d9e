"""What `mpilm.fit` is told, as the configuration of a run, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpilm.config import OWN, Config, resolve
from mpilm.errors import ConfigError
from mpilm.learner.minibatch import samples_of
from mpilm.own.task import Given
from mpilm.world.base import World

Section = str | Mapping[str, Any]

# sections that must be the same on all ranks, but for these keys
SAME = ("strategy", "schedule", "train", "checkpoint", "ema", "world", "faults")
RANKS_OWN = ("train.device", "train.threads", "train.seed")


def config_of(
    given: Given,
    *,
    strategy: Section,
    schedule: Section,
    samples: int,
    epochs: Any,
    valid_every: int | None,
    checkpoint_every: int,
    keep: int,
    ema: Mapping[str, Any] | None,
    clip: float,
    accumulate: int,
    autocast: str,
    seed: int,
    device: str,
    threads: int,
    log_every: int,
    faults: Mapping[str, Any] | None,
    gpu_messages: str,
    **_: Any,
) -> Config:
    """Return the configuration of a run, as its folder keeps it.

    Raises:
        ConfigError: one line that names what is wrong.
    """
    if bool(samples) == bool(epochs):
        raise ConfigError("fit: give samples, or epochs: how long to train")
    if given.scheduler is not None and schedule != "constant":
        raise ConfigError("fit: a scheduler and a schedule: give one of the two")
    if epochs:
        if not isinstance(epochs, int | float):
            raise ConfigError(f"epochs: of type {type(epochs).__name__}, not a number")
        if not given.per_epoch:
            raise ConfigError(
                "epochs: how many samples these batches have is not known before: give"
                " samples"
            )
        samples = round(epochs * given.per_epoch)
    given.by_epochs = bool(epochs)
    if valid_every is None:
        by_items = given.by_epochs or given.count is samples_of
        valid_every = given.per_epoch if by_items and "valid" in given.splits else 0
    learner = given.learner
    name = type(given.scheduler).__name__ if given.scheduler is not None else ""
    document = {
        "model": {
            "name": OWN,
            "kind": type(given.model).__name__,
            "parameters": learner.layout.size,
        },
        "optim": {
            "name": OWN,
            "kind": type(learner.optimizer).__name__,
            "lr": learner.lr,
            "clip": clip,
            "accumulate": accumulate,
            "autocast": autocast,
            "scheduler": name,
        },
        "schedule": section_of(schedule, "schedule"),
        "strategy": section_of(strategy, "strategy"),
        "train": {
            "samples": samples,
            "seed": seed,
            "device": device,
            "threads": threads,
            "valid_every": valid_every,
            "log_every": log_every,
        },
        "checkpoint": {"every": checkpoint_every, "keep": keep},
        "ema": table_of(ema, "ema"),
        "faults": table_of(faults, "faults"),
        "world": {"gpu_messages": gpu_messages},
    }
    return resolve(document, origin="fit")


def section_of(given: Section, name: str) -> dict[str, Any]:
    """Return a section: of a name alone, or as it is.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(given, str):
        return {"name": given}
    return table_of(given, name, "a name, or a table with a name")


def table_of(
    given: Any, name: str, wanted: str = "a table of that section"
) -> dict[str, Any]:
    """Return a section that is a table, or nothing.

    Raises:
        ConfigError: it is neither.
    """
    if given is not None and not isinstance(given, Mapping):
        kind = type(given).__name__
        raise ConfigError(f"{name}: of type {kind}: give {wanted}")
    return dict(given or {})


def require_same(world: World, config: Config, given: Given, **more: Any) -> None:
    """Raise unless all ranks were given the same where they would wait for each other.

    Raises:
        ConfigError: one line that names the first key that differs.

    Communicates: collective, a small allgather.
    """
    own = {name: f"{value}" for name, value in more.items()}
    own |= {name: f"{name in given.splits}" for name in ("valid", "test")}
    own["accumulate"] = f"{config.optim.settings.accumulate}"
    document = config.to_document()
    for section in SAME:
        own |= {f"{section}.{k}": f"{v}" for k, v in document.get(section, {}).items()}
    found = world.comm.allgather({k: v for k, v in own.items() if k not in RANKS_OWN})
    with world.all_or_none():
        for rank, others in enumerate(found):
            for key in {**found[0], **others}:
                one, other = found[0].get(key, "none"), others.get(key, "none")
                if one != other:
                    raise ConfigError(
                        f"{key}: {one} on rank 0, {other} on rank {rank}: all ranks"
                        " must be given the same"
                    )
