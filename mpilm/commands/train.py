"""`mpilm train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from mpilm.config import Config


def train(
    config: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    set_: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="set")
    ] = (),
    resume: bool = False,
) -> int:
    """Train a model as a configuration says, on every rank that mpirun starts.

    SIGTERM, SIGINT or SIGUSR1 make it write a checkpoint and stop with exit code 75;
    --resume then goes on from there, to the same bits as an uninterrupted run.

    Args:
        config: TOML file
        out: run folder: configuration, logs, checkpoints, summary.json
        set_: override a setting: section.key=value
        resume: go on from the newest checkpoint in the run folder, if there is one
    """
    from mpilm.cli import STOPPED_EARLY
    from mpilm.config import read_config
    from mpilm.train.loop import Trainer
    from mpilm.train.run import RunFolder
    from mpilm.train.signals import StopRequest
    from mpilm.world.mpi import MpiWorld, abort_on_error

    settings: Config | None = None
    with StopRequest() as stop, MpiWorld() as world, abort_on_error(world, out):
        with world.all_or_none():
            settings = read_config(config, set_)
            RunFolder(out).require_apart(settings, config)
            world.configure(faults=settings.faults)
        assert settings is not None
        finished = Trainer(settings, world, out, resume=resume).train(stop)
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
