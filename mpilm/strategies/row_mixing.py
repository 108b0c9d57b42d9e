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

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mpilm.strategies.rows import ShardPart
from mpilm.strategies.shared_rows import SharedRows
from mpilm.vectors import zeros
from mpilm.world.base import Comm, Request

Pairs = Mapping[int, ShardPart]  # another rank -> what of a vector goes both ways


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

    Communicates: pairwise, the elements of each pair there; not blocking.
    """

    def __init__(self, comm: Comm, vector: Any, pairs: Pairs, tag: int = 0) -> None:
        self.comm, self.vector, self.pairs = comm, vector, pairs
        self.sources = sorted(pairs)
        self.own = {peer: part.of(vector) for peer, part in pairs.items()}
        self.came = {peer: zeros(p.size, like=vector) for peer, p in pairs.items()}
        self.receives = [comm.Irecv(v, peer, tag) for peer, v in self.came.items()]
        self.sends: list[Request] = [
            comm.Isend(values, peer, tag) for peer, values in self.own.items()
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes sent, and as many received."""
        return self.comm.item_bytes * sum(part.size for part in self.pairs.values())

    def finish_(self, out: Any = None) -> None:
        """Apply (1) to `out`, which holds x already, or to `vector`.

        Communicates: waits for all that was started.
        """
        out = self.vector if out is None else out
        for request in (*self.receives, *self.sends):
            request.Wait()
        for peer in self.sources:
            part, delta, own = self.pairs[peer], self.came[peer], self.own[peer]
            left = self.comm.left_of(own)
            if left is not None:
                own -= left  # what the other has got
            delta -= own
            delta /= 1 + len(self.sources)
            mixed = part.of(out)
            mixed += delta
            part.set_(out, mixed)
