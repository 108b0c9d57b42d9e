"""What all communicators of one rank share."""

from __future__ import annotations

from collections.abc import Callable

from mpi4py import MPI

from mpilm.world.faults import Faults
from mpilm.world.mpi.membership import Membership
from mpilm.world.mpi.progress import Meter, Progress
from mpilm.world.mpi.slow_links import SlowLinks
from mpilm.world.mpi.staging import Staging
from mpilm.world.mpi.stall import StallInspector
from mpilm.world.mpi.start import has_ulfm


class Resources:
    """What all communicators of one rank share.

    control     communicator of all ranks, for questions and the end only
    inspector   reports waits that last too long
    meter       counts what the rank communicates
    progress    what is under way, and the threads that move it
    staging     buffers in main memory
    slow_links  declared slow links that end here
    faults      what is wrong with the ranks; None: nothing
    handles     mpi4py's communicators, to be freed at the end
    membership  which ranks have died
    has_ulfm    whether ranks go on after a death

    Args:
        stall_s, stall_abort_s, silence_s: limits of waits, as of `StallInspector`.
        abort: ends all ranks.
        last_words: what people are told then.
        background: whether threads may call MPI beside the learner.
        generation: worlds of this process before.
    """

    def __init__(
        self,
        control: MPI.Comm,
        faults: Faults | None,
        *,
        stall_s: float,
        stall_abort_s: float,
        silence_s: float,
        abort: Callable[[], None],
        last_words: Callable[[], str],
        background: bool,
        generation: int,
    ) -> None:
        self.control, self.faults = control, faults
        self.inspector = StallInspector(
            control,
            stall_s=stall_s,
            abort_s=stall_abort_s,
            silence_s=silence_s if background else 0.0,  # else who computes is silent
            abort=abort,
            last_words=last_words,
        )
        self.meter = Meter()
        self.progress = Progress(self.meter, self.inspector, background=background)
        self.staging = Staging()
        self.slow_links = SlowLinks(self.progress)
        self.handles: list[MPI.Comm] = []
        self.has_ulfm = has_ulfm()
        self.membership = Membership(control, self.handles, generation)
        self.progress.membership = self.membership
