"""Who is left: from an MPI error to a world without the ranks that have died.

Needs ULFM (User-Level Failure Mitigation, MPI's proposal, in Open MPI 5): `mpirun
--with-ft ulfm`. There a call that needs a dead rank fails with MPI_ERR_PROC_FAILED,
and goes on to fail on that communicator. A nonblocking collective may forget which
error it was: Open MPI's NBC_Start_round turns any into MPI_ERR_OTHER.

    rank 0 (dead)
    rank 1  Wait: PROC_FAILED | Revoke all ............ | Shrink |
    rank 2  Wait for rank 1 ....... REVOKED | Revoke all | Shrink |
    rank 3  compute ............... Isend: REVOKED ..... | Shrink |

Whoever finds out revokes all communicators of the world: nobody waits for a rank that
has stopped waiting. In every rank the learner gets one `RanksDiedError`, at whatever it
does next with the world; activities end. Then all call `World.shrink`.

Every world of some ranks is a generation: `shrink` and `grow` begin the next one, and
revoke what is left of the last, so that its calls end. A thread or a request of it that
fails afterwards is no death: it must not revoke the communicators of today.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar

from mpi4py import MPI

from mpilm.errors import LeftBehindError, RanksDiedError, WorldError
from mpilm.world.mpi.start import has_ulfm

Method = TypeVar("Method", bound=Callable[..., Any])

OF_DEATH = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
UNCLEAR = (MPI.ERR_OTHER, MPI.ERR_INTERN, MPI.ERR_UNKNOWN)
LATE_S = 2.0  # that a death may be known after an unclear error; chosen, not tuned
LOOK_S = 0.01  # between two looks for it


class Membership:
    """What is known of the ranks that have died.

    generation  of these ranks: worlds of this process before
    death       is raised in the learner; None: nobody has, as far as is known here; or
                the next generation has begun
    reason      why the communicators were revoked; "": they were not
    """

    def __init__(
        self, control: MPI.Comm, handles: list[MPI.Comm], generation: int = 0
    ) -> None:
        self.control, self.handles = control, handles
        self.generation = generation
        self.death: WorldError | None = None
        self.reason = ""

    def translate(self, error: BaseException) -> BaseException:
        """Return what an error means: a death, or itself; revoke all after a death."""
        if not isinstance(error, MPI.Exception) or not has_ulfm():
            return error
        if not self.is_of_death(error):
            return error
        if self.death is None:
            sign = f"{error}, generation {self.generation}"
            self.death = RanksDiedError(self.dead(), sign=sign)
            self.revoke(sign)
        return self.death

    def is_of_death(self, error: MPI.Exception) -> bool:
        """Return whether a call has failed since a rank has died.

        After an error that may mean anything it waits some time for news of a death.
        """
        kind, began_s = error.Get_error_class(), time.monotonic()
        if kind not in UNCLEAR:
            return kind in OF_DEATH
        while not (self.death or self.control.Is_revoked() or self.dead()):
            if time.monotonic() > began_s + LATE_S:
                return False
            with suppress(MPI.Exception):
                self.control.Iprobe()  # lets MPI look for news
            time.sleep(LOOK_S)
        return True

    def dead(self) -> list[int]:
        """Return the ranks that are known to have died."""
        failed, group = self.control.Get_failed(), self.control.Get_group()
        ranks = MPI.Group.Translate_ranks(failed, list(range(failed.size)), group)
        failed.Free()
        group.Free()
        return sorted(ranks)

    def leave(self, reason: str) -> None:
        """Note that the next generation has begun; what still uses this one ends."""
        line = f"generation {self.generation} of the ranks has ended: {reason}"
        self.death = LeftBehindError(line)

    def revoke(self, reason: str) -> None:
        """Let every call of every rank on these communicators fail."""
        self.reason = self.reason or reason
        for handle in (*self.handles, self.control):
            if not handle.Is_revoked():
                handle.Revoke()


def guarded(method: Method) -> Method:
    """Return a method of a communicator that raises RanksDiedError after a death."""

    @wraps(method)
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except MPI.Exception as error:
            raise self.resources.membership.translate(error) from error

    return call  # type: ignore[return-value]
