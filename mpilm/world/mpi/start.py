"""MPI is started, and ended: with the settings that our messages need.

Nothing here imports mpi4py before it is asked to: to import it starts MPI.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

FT_SETTING = "OMPI_MCA_mpi_ft_enable"  # set by mpirun --with-ft
# Open MPI: a thread that waits inside MPI lets others have its core; and a message that
# must be copied in fragments has more than three under way between two polls. Over TCP
# a long message without "put" goes in fragments: as one it holds up the other
# direction, whose clearance to send waits behind it. And so much of it goes before the
# clearance that the link does not rest until that comes. Long reductions between nodes
# go round a ring (RULES; all ranks must choose alike). All measured, docs/mpi-world.md;
# what the environment sets already is left alone.
SETTINGS = {
    "OMPI_MCA_btl_tcp_eager_limit": "1000000",
    "OMPI_MCA_btl_tcp_flags": "send,inplace,need-ack,need-csum",
    "OMPI_MCA_btl_tcp_rndv_eager_limit": "1000000",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_pml_ob1_send_pipeline_depth": "256",
}
HAS_RULES = "OMPI_MCA_coll_tuned_use_dynamic_rules"
RULES = {
    HAS_RULES: "1",
    "OMPI_MCA_coll_tuned_dynamic_rules_filename": str(
        Path(__file__).with_name("allreduce.rules")
    ),
}


def has_ulfm() -> bool:
    """Return whether ranks go on after another has died."""
    return os.environ.get(FT_SETTING, "").lower() in {"1", "true", "yes", "ulfm"}


def is_one_node() -> bool:
    """Return whether all ranks are on this node, and stay there; all say the same.

    A rank that joins later, which ULFM allows, may be alone in its own mpirun's eyes.
    """
    ranks, here = (
        os.environ.get(f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "LOCAL_SIZE")
    )
    return ranks is not None and ranks == here and not has_ulfm()


def start_mpi() -> Any:
    """Return mpi4py's module MPI; start MPI if nobody has."""
    rules = {} if HAS_RULES in os.environ or is_one_node() else RULES
    for name, value in (SETTINGS | rules).items():
        os.environ.setdefault(name, value)
    if has_ulfm() and "mpi4py.MPI" not in sys.modules:
        import mpi4py

        mpi4py.rc.finalize = False  # at exit it would, whoever has died
        atexit.register(_finalize)
    from mpi4py import MPI

    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI


def start_mpi_within(limit_s: float) -> None:
    """Start MPI, or end this process: MPI_Init holds Python's lock while it waits."""
    faulthandler.dump_traceback_later(limit_s, exit=True, file=nowhere())
    start_mpi()
    faulthandler.cancel_dump_traceback_later()


def nowhere() -> IO[str]:
    """Return a file that keeps nothing, open until the process ends."""
    return open(os.devnull, "w", encoding="utf-8")


def leave_out_finalize() -> None:
    """End without MPI_Finalize: ranks that joined have a COMM_WORLD of their own."""
    global _ends_in_order  # noqa: PLW0603  of the process, as MPI is
    _ends_in_order = False


_ends_in_order = True


def _finalize() -> None:
    """End MPI, unless a rank has died: then it may wait for that one for minutes.

    Nothing is under way any more, and mpirun takes the end of the process for what it
    is. Seen with Open MPI 5.0.11: one of ten ends after deaths took over 150 s.
    """
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized():
        failed = MPI.COMM_WORLD.Get_failed()
        num_failed = failed.size
        failed.Free()
        if num_failed == 0 and _ends_in_order:
            MPI.Finalize()
        else:
            leave_launcher()


def leave_launcher() -> None:
    """Tell the launcher that this process ends well, without MPI_Finalize.

    By PMIx, which Open MPI speaks: else a spawned process would have failed there.
    """
    with suppress(OSError):  # another MPI
        pmix = ctypes.CDLL("libpmix.so.2", mode=os.RTLD_NOLOAD)
        pmix.PMIx_Finalize(None, ctypes.c_size_t(0))
