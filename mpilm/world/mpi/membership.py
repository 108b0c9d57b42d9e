"""Who is left: from an MPI error to a world without the ranks that have died.

Needs ULFM (User-Level Failure Mitigation, MPI's proposal, in Open MPI 5): `mpirun
--with-ft ulfm`. There a call that needs a dead rank fails with MPI_ERR_PROC_FAILED,
and goes on to fail on that communicator.

    rank 0 (dead)
    rank 1  Wait: PROC_FAILED | Revoke all ............ | Shrink |
    rank 2  Wait for rank 1 ....... REVOKED | Revoke all | Shrink |
    rank 3  compute ............... Isend: REVOKED ..... | Shrink |

Whoever finds out revokes all communicators of the world: nobody waits for a rank that
has stopped waiting. In every rank the learner gets one `RanksDiedError`, at whatever it
does next with the world; activities end. Then all call `World.shrink`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from mpi4py import MPI

from mpilm.errors import RanksDiedError
from mpilm.world.mpi.start import has_ulfm

Method = TypeVar("Method", bound=Callable[..., Any])


class Membership:
    """What is known of the ranks that have died.

    death  is raised in the learner; None: nobody has, as far as is known here
    """

    def __init__(self, control: MPI.Comm, handles: list[MPI.Comm]) -> None:
        self.control, self.handles = control, handles
        self.death: RanksDiedError | None = None

    def translate(self, error: BaseException) -> BaseException:
        """Return what an error means: a death, or itself; revoke all after a death."""
        if not isinstance(error, MPI.Exception) or not has_ulfm():
            return error
        of_death = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
        if error.Get_error_class() not in of_death:
            return error
        if self.death is None:
            self.death = RanksDiedError(self.dead())
            self.revoke()
        return self.death

    def dead(self) -> list[int]:
        """Return the ranks that are known to have died."""
        failed, group = self.control.Get_failed(), self.control.Get_group()
        ranks = MPI.Group.Translate_ranks(failed, list(range(failed.size)), group)
        failed.Free()
        group.Free()
        return sorted(ranks)

    def revoke(self) -> None:
        """Let every call of every rank on these communicators fail."""
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
