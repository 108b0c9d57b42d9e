"""Messages of more bytes, and of more elements, than a C int counts.

mpi4py hands counts to Open MPI 5.0 as C ints: a longer buffer is refused by MPI. So a
message travels as one element of a datatype that is as long as the buffer; and a
collective, whose operators know no such datatype, is called for one piece after the
other. Libraries of MPI-4 can count further; they take the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI
from mpi4py.util.dtlib import from_numpy_dtype

MOST = 2**31 - 1  # elements in one call
# Elements that one blocking reduction sums. MPI has a buffer of its own for it: Open
# MPI's was half a model between two ranks, 283 MB of 566 (docs/wikitext103.md).
REDUCED = 1 << 22


def posted(call: Callable[..., MPI.Request], host: np.ndarray, *to: int) -> Any:
    """Return the request of `call(host, *to)`, an Isend or Irecv of mpi4py."""
    if host.size <= MOST:
        return call(host, *to)
    datatype = as_one(host)
    try:
        return call([host, 1, datatype], *to)
    finally:
        datatype.Free()  # what was started keeps it until it is complete


def as_one(host: np.ndarray) -> MPI.Datatype:
    """Return a datatype of which `host` is one element."""
    element = from_numpy_dtype(host.dtype)
    piece = element.Create_contiguous(MOST)
    number, rest = divmod(host.size, MOST)
    ends = number * MOST * host.itemsize
    whole = MPI.Datatype.Create_struct([number, rest], [0, ends], [piece, element])
    piece.Free()
    return whole.Commit()


def pieces(
    send: Any, host: np.ndarray, most: int | None = None
) -> list[tuple[Any, np.ndarray]]:
    """Return what to send and where to receive it, piece by piece.

    Args:
        send: as long as `host`, or `MPI.IN_PLACE`.
        host: where MPI receives.
        most: elements in a piece; None: as many as MPI takes.
    """
    most = MOST if most is None else min(most, MOST)
    if host.size <= most:
        return [(send, host)]
    parts = [slice(start, start + most) for start in range(0, host.size, most)]
    in_place = send is MPI.IN_PLACE
    return [(send if in_place else send[part], host[part]) for part in parts]


class Several:
    """The requests of a call that was made in pieces, tested as one."""

    def __init__(self, requests: list[MPI.Request]) -> None:
        self.requests = requests

    def Test(self, _: Any = None) -> bool:
        """Return whether all of them are done. Never blocks."""
        return MPI.Request.Testall(self.requests)


def num_bytes(status: MPI.Status) -> int:
    """Return the length of a message; `Get_count` wraps round at 2 GiB."""
    return int(status.Get_elements(MPI.BYTE))
