"""Means of models with row tables among a few ranks: pair by pair, of the rows touched.

Notation    S      the ranks that average, this one included; with each of the others
                   this one makes a pair, and each pair is one of S on both sides
            U_ij   rows that rank i or rank j has touched since its own last mean
Update      x_i <- x_i + sum_(j in S, j != i) (x_j - x_i) / |S|                   (1)
            for all elements before the row tables, and of row tables for j with the
            row in U_ij
Messages    1 bit for each row there and back, to know U_ij; then the elements of (1).

            i: bits ==> j      x_i of U_ij ==> j
            j: bits ==> i      x_j of U_ij ==> i      (1), when both have come
Invariants  what (1) adds to i it takes from j: the sum of x stays, row by row.
            Where all elements are of U it is the mean over S, to rounding.
Departs     from the mean of whole models: a row that nobody of a pair has touched stays
            on both, though it may differ. It goes one step on when it is touched again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mpilm.strategies.rows import ShardPart
from mpilm.strategies.shared_rows import SharedRows
from mpilm.vectors import zeros
from mpilm.world.base import Comm, Request

Pairs = Mapping[int, ShardPart]  # another rank -> what of a vector goes both ways
PIECES_UNDER_WAY = 2  # one is received while the other is added


def agree_in_pairs(
    rows: SharedRows, where: slice, members: Iterable[int], tag: int = 0
) -> Pairs:
    """Return U_ij, and all before the row tables, with each other member; begin anew.

    Args:
        where: the part of the flat vector that is averaged.
        members: S, in any order, with this rank or without.

    Communicates: pairwise, a bit for each row of the tables in `where` to each other
        member and from it, blocking.
    """
    comm = rows.comm
    others = sorted(set(members) - {comm.rank})
    if not others:
        return {}
    own = rows.taken(where)
    if not len(own):
        return {peer: rows.part(where, own) for peer in others}
    bits = np.packbits(own)
    came = {peer: np.empty_like(bits) for peer in others}
    receives = [comm.Irecv(buffer, peer, tag) for peer, buffer in came.items()]
    sends = [comm.Isend(bits, peer, tag) for peer in others]
    for request in (*receives, *sends):
        request.Wait()
    rows.moved += bits.nbytes * len(others)
    return {
        peer: rows.part(where, own | np.unpackbits(buffer, count=len(own)))
        for peer, buffer in came.items()
    }


class RowMean:
    """One mean (1) on its way; as mixing.Mean, but with buffers of its own.

    Args:
        vector: x of this rank, (P,); not to be changed before `finish_`.
        piecewise: whether what goes to a single other member goes in pieces, a few of
            them on their way at a time: little memory, but only `finish_` sends on.

    sources  the other ranks of S, ascending
    sends    one for each source

    Communicates: pairwise, the elements of each pair there; not blocking.
    """

    def __init__(
        self,
        comm: Comm,
        vector: Any,
        pairs: Pairs,
        tag: int = 0,
        *,
        piecewise: bool = False,
    ) -> None:
        self.comm, self.vector, self.pairs, self.tag = comm, vector, pairs, tag
        self.sources = sorted(pairs)
        self.ahead: deque[Pairs] = deque([pairs])
        if piecewise and len(pairs) == 1:  # of more, x_i must stay for all of them
            [(peer, part)] = pairs.items()
            self.ahead = deque({peer: piece} for piece in part.pieces())
        self.under_way: deque[Piece] = deque()
        for _ in range(min(PIECES_UNDER_WAY, len(self.ahead))):
            self.start_next()
        self.sends = self.under_way[0].sends

    def start_next(self) -> None:
        """Start sending and receiving what comes next."""
        self.under_way.append(
            Piece(self.comm, self.vector, self.ahead.popleft(), self.tag)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes sent, and as many received."""
        return self.comm.item_bytes * sum(part.size for part in self.pairs.values())

    def finish_(self, out: Any = None) -> None:
        """Apply (1) to `out`, which holds x already, or to `vector`.

        Communicates: waits for all that was started.
        """
        out = self.vector if out is None else out
        while self.under_way:
            self.under_way.popleft().finish_(out)
            if self.ahead:
                self.start_next()


class Piece:
    """A part of a mean (1) on its way, with buffers for each other member."""

    def __init__(self, comm: Comm, vector: Any, pairs: Pairs, tag: int) -> None:
        self.comm, self.pairs = comm, pairs
        self.own = {peer: part.of(vector) for peer, part in pairs.items()}
        self.came = {peer: zeros(p.size, like=vector) for peer, p in pairs.items()}
        self.receives = [comm.Irecv(v, peer, tag) for peer, v in self.came.items()]
        self.sends: list[Request] = [
            comm.Isend(values, peer, tag) for peer, values in self.own.items()
        ]

    def finish_(self, out: Any) -> None:
        """Apply (1) to its elements of `out`; waits for them."""
        for request in (*self.receives, *self.sends):
            request.Wait()
        for peer in sorted(self.pairs):
            part, delta, own = self.pairs[peer], self.came[peer], self.own[peer]
            left = self.comm.left_of(own)
            if left is not None:
                own -= left  # what the other has got
            delta -= own
            delta /= 1 + len(self.pairs)
            mixed = part.of(out)
            mixed += delta
            part.set_(out, mixed)
