"""`mpilm train` and `mpilm resume`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mpilm.errors import ConfigError

if TYPE_CHECKING:
    from mpilm.config import Config


def train(
    config: Annotated[
        tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="CONFIG")
    ] = None,
    /,
    *,
    out: Path,
    set_: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")
    ] = (),
    resume: bool = False,
    profile: bool = False,
) -> int:
    """Train a model as a configuration says, on every rank that mpirun starts.

    SIGTERM, SIGINT or SIGUSR1 make it write a checkpoint and stop with exit code 75;
    `mpilm resume RUN` then goes on from there, to the same bits as an uninterrupted
    run.

    Args:
        config: TOML file; with --resume it may be left out: the run's own
        out: run folder: configuration, logs, checkpoints, summary.json
        set_: override a setting: section.key=value
        resume: go on from the newest checkpoint in the run folder, if there is one
        profile: write some steps of all ranks as one timeline, OUT/profile.json
    """
    from mpilm.config import read_config
    from mpilm.train.folder import RunFolder

    def read() -> Config:
        if config is None:
            if not resume:
                raise ConfigError("train: name a configuration, or give --resume")
            return RunFolder(out).read_config(set_)
        settings = read_config(config, set_)
        RunFolder(out).require_apart(settings, config)
        return settings

    return run(read, out, resume=resume, profile=profile)


def resume(
    run_: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    *,
    set_: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")
    ] = (),
    profile: bool = False,
) -> int:
    """Go on with a run, on as many ranks as before or on others.

    It goes on as it was last trained, from the newest checkpoint in its folder. A run
    that has ended is left as it is.

    Args:
        run_: run folder
        set_: change a setting from here on: section.key=value; it is noted in the
            folder
        profile: write some steps of all ranks as one timeline, RUN/profile.json
    """
    from mpilm.train.folder import RunFolder

    def read() -> Config:
        return RunFolder(run_).read_config(set_)

    return run(read, run_, resume=True, profile=profile)


def run(
    read: Callable[[], Config], out: Path, *, resume: bool, profile: bool = False
) -> int:
    """Train on every rank; return the exit code.

    Args:
        read: returns the configuration, or raises.
        out: the run folder.
        resume: go on from its newest checkpoint.
        profile: write a timeline of some steps.
    """
    from mpilm.errors import STOPPED_EARLY
    from mpilm.train.gpu_messages import choose_messages
    from mpilm.train.loop import Trainer
    from mpilm.train.screen import Screen
    from mpilm.train.signals import StopRequest
    from mpilm.world.mpi import MpiWorld, abort_on_error

    settings: Config | None = None
    with StopRequest() as stop, MpiWorld() as world, abort_on_error(world, out):
        with world.all_or_none():
            settings = read()
            world.configure(faults=settings.faults, silence_s=settings.world.silence_s)
        assert settings is not None
        if note := choose_messages(world, settings):
            Screen(1, speaks=world.rank == 0).line(note)
        trainer = Trainer(settings, world, out, resume=resume, profile=profile)
        finished = trainer.train(stop)
    return 0 if finished else STOPPED_EARLY


def more_help() -> str:
    """Return the table of all settings."""
    from mpilm.config import settings

    lines, title = ["", "settings (--set section.key=value):"], ""
    for s in settings():
        heading = f"[{s.section}]" + (f' name = "{s.choice}"' if s.choice else "")
        if heading != title:
            title = heading
            lines.append(f"\n  {heading}")
        lines.append(f"    {s.key + ' = ' + s.default:<34}{s.text}")
    return "\n".join(lines)
