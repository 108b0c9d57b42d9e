"""`mpilm join`: a run gets more ranks while it trains.

mpirun starts them: a process of another mpirun cannot be connected (docs/log.md). So
the command leaves a request in the run folder, and rank 0 has the ranks started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def ask(
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")],
    /,
    *,
    ranks: int = 1,
    spawned: bool = False,
) -> int:
    """Let a run that trains have more ranks: they are taken in at a sync point.

    It must run under mpirun --with-ft ulfm, which has room for them.

    Args:
        run: run folder
        ranks: how many
        spawned: be one of them; the run itself has it started so
    """
    if spawned:
        return train_along(run)
    from mpilm.errors import ConfigError
    from mpilm.train.folder import RunFolder
    from mpilm.train.joins import request_ranks

    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: at least one")
    folder = RunFolder(run).require()
    request_ranks(folder.path, ranks)
    return 0


def train_along(folder: Path) -> int:
    """Be a rank of a run that has asked for this process; return the exit code."""
    import mpilm.learner.learner  # noqa: F401  before the others wait for this rank
    from mpilm.errors import STOPPED_EARLY
    from mpilm.train.folder import RunFolder
    from mpilm.train.loop import Trainer
    from mpilm.train.signals import StopRequest
    from mpilm.world.mpi import MpiWorld, abort_on_error

    config = RunFolder(folder).read_config()
    stop = StopRequest()
    with stop, MpiWorld.joined() as world, abort_on_error(world, folder):
        faults, silence_s = config.faults.of_new_rank(), config.world.silence_s
        world.configure(faults=faults, silence_s=silence_s)
        finished = Trainer(config, world, folder).train(stop)
    return 0 if finished else STOPPED_EARLY
