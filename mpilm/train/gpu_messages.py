"""How buffers on a GPU travel: through pinned host memory, or by MPI itself."""

from __future__ import annotations

from mpilm.config import Config
from mpilm.doctor.cuda_aware import Verdict, cuda_verdict
from mpilm.errors import ConfigError
from mpilm.world.mpi.world import MpiWorld, start_mpi

KEY = "world.gpu_messages"


def choose_messages(world: MpiWorld, config: Config) -> str:
    """Let the world move messages as section [world] says; return what it does.

    Returns:
        a line for people; "" where nobody asks (staged, or no GPU).

    Raises:
        ConfigError: direct messages where MPI or a rank cannot do them.

    Communicates: unless staged, collective: a small allgather and that of
        `all_or_none`.
    """
    wanted = config.world.gpu_messages
    if wanted == "staged":
        return ""
    found: Verdict | None = None
    device = "cpu"
    with world.all_or_none():
        device = world.device(config.train.device)
        if device == "cpu":
            found = Verdict(False, "it trains on the CPU")
        elif world.local_rank == 0:  # its node has one MPI library
            found = cuda_verdict(start_mpi())
    reports = world.comm.allgather(found)
    bad = [(rank, r) for rank, r in enumerate(reports) if r and not r.is_aware]
    if bad and wanted == "direct":
        rank, verdict = bad[0]
        raise ConfigError(
            f'{KEY} = "direct": rank {rank}: {verdict.why}; "staged" goes through'
            ' pinned host memory, "auto" takes what works',
            everywhere=True,
        )
    if device == "cpu":
        return ""
    if bad:
        return f"GPU messages: staged ({bad[0][1].why})"
    world.take_gpu_buffers(device)
    return "GPU messages: direct"
