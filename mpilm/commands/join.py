"""`mpilm join`: a run gets more ranks while it trains.

mpirun starts them: a process of another mpirun cannot be connected (docs/log.md). So
the command leaves a request in the run folder, and rank 0 has the ranks started.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Annotated

import tyro

LOOK_S = 0.5  # between two looks for who has this process started
ALONE_S = 5.0  # without it, until this process ends; chosen, not tuned


def ask(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    *,
    ranks: int = 1,
    spawned: str = "",
) -> int:
    """Let a run that trains have more ranks: they are taken in at a sync point.

    It must run under mpirun --with-ft ulfm, which has room for them.

    Args:
        run: run folder
        ranks: how many
        spawned: be one of them; the run itself has it started so, and says by whom
    """
    if spawned:
        return train_along(run, spawned)
    from mpilm.errors import ConfigError
    from mpilm.train.folder import RunFolder
    from mpilm.train.joins import request_ranks

    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: at least one")
    folder = RunFolder(run).require()
    request_ranks(folder.path, ranks)
    return 0


def train_along(folder: Path, asker: str) -> int:
    """Be a rank of a run that has asked for this process; return the exit code."""
    from mpilm.train.signals import StopRequest

    with StopRequest() as stop:  # a signal to all ranks comes here, too
        import mpilm.learner.learner  # noqa: F401  before the others wait for this rank
        from mpilm.errors import STOPPED_EARLY
        from mpilm.storage.owner import is_owned_by
        from mpilm.train.folder import RunFolder
        from mpilm.train.loop import Trainer
        from mpilm.world.mpi import MpiWorld, abort_on_error

        config = RunFolder(folder).read_config()
        if not is_owned_by(folder, asker):  # it died while this process started
            return 0
        has_joined = threading.Event()
        watch = threading.Thread(
            target=leave_alone, args=(folder, asker, has_joined), daemon=True
        )
        watch.start()
        joined = MpiWorld.joined()
        has_joined.set()
        if joined is None:  # the run has ended meanwhile
            return 0
        with joined as world, abort_on_error(world, folder):
            faults, silence_s = config.faults.of_new_rank(), config.world.silence_s
            world.configure(faults=faults, silence_s=silence_s)
            finished = Trainer(config, world, folder).train(stop)
    return 0 if finished else STOPPED_EARLY


def leave_alone(folder: Path, asker: str, has_joined: threading.Event) -> None:
    """End this process when who has it started no longer owns the folder.

    That one is dead, or the run is over. MPI does not tell: Open MPI 5.0.11 waits for a
    dead one for ever, in Merge, and mpirun for this process.
    """
    from mpilm.storage.owner import is_owned_by
    from mpilm.world.mpi.start import leave_launcher

    seen_s = time.monotonic()
    while not has_joined.wait(LOOK_S):
        if is_owned_by(folder, asker):
            seen_s = time.monotonic()
        elif time.monotonic() > seen_s + ALONE_S:
            leave_launcher()
            os._exit(0)
