"""Rows of matrices in a flat vector that is cut into shards, one a rank.

A row is a step along the first axis of a segment, `Segment.row_width` elements; no
shard ends within one. What is asked of a row is asked of the rank that owns it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mpilm.learner.flat import Layout, Segment
from mpilm.storage.merged import Merged
from mpilm.vectors import end_to_end, rows_at, set_rows_
from mpilm.world.base import IN_PLACE, Comm

FEW_RANKS = 4  # of so many all are servers; chosen, not tuned
# Elements that are copied to travel: 4 MB. Chosen, not tuned: large enough for MPI's
# full rate, small beside the model.
PIECE = 1 << 20


def shards(layout: Layout, num_ranks: int) -> list[slice]:
    """Return equal slices of the flat vector, one a rank, cut between rows.

    >>> shards(Layout.of([("embed", (3, 4), "embed")]), 2)
    [slice(0, 4, None), slice(4, 12, None)]
    """
    starts = [segment.start for segment in layout]
    cuts = []
    for rank in range(num_ranks):
        place = rank * layout.size // num_ranks
        segment = layout.segments[bisect_left(starts, place + 1) - 1]
        cuts.append(place - (place - segment.start) % segment.row_width)
    return [slice(*ends) for ends in zip(cuts, [*cuts[1:], layout.size], strict=True)]


def shards_of(layout: Layout, num_ranks: int, servers: int) -> list[slice]:
    """Return the same for `servers` of the ranks, evenly spread; others' are empty.

    Args:
        servers: how many; if more than there are ranks, all.

    >>> shards_of(Layout.of([("embed", (3, 4), "embed")]), 4, 2)
    [slice(0, 4, None), slice(4, 4, None), slice(4, 12, None), slice(12, 12, None)]
    """
    number = min(num_ranks, servers)
    cut = iter(shards(layout, number))
    chosen = {server * num_ranks // number for server in range(number)}
    found: list[slice] = []
    for rank in range(num_ranks):
        end = found[-1].stop if found else 0
        found.append(next(cut) if rank in chosen else slice(end, end))
    return found


def num_servers(num_ranks: int, num_bytes: int, least_bytes: int) -> int:
    """Return how many ranks have a shard: of FEW_RANKS all, of more `least_bytes` each.

    >>> num_servers(3, 1000, 10), num_servers(16, 1000, 500), num_servers(16, 1000, 100)
    (3, 4, 10)
    """
    return min(num_ranks, max(FEW_RANKS, num_bytes // least_bytes))


def by_owner(
    segment: Segment, shards_: Sequence[slice], ids: Any
) -> Iterator[tuple[int, Any, slice]]:
    """Yield (rank, its ids, where their rows lie among all) for each owner.

    Args:
        ids: (n,) int64, ascending, each once.

    Raises:
        ValueError: the ids do not ascend, or are no rows of the segment.

    >>> (embed,) = Layout.of([("embed", (4, 2), "embed")])
    >>> cut = [slice(0, 4), slice(4, 8)]
    >>> for rank, own, where in by_owner(embed, cut, [0, 2, 3]):
    ...     print(rank, own, where)
    0 [0] slice(0, 2, None)
    1 [2 3] slice(2, 6, None)
    """
    ids = np.asarray(ids, np.int64)
    num_rows, width = segment.shape[0], segment.row_width
    if (ids[1:] <= ids[:-1]).any() or ((ids < 0) | (ids >= num_rows)).any():
        raise ValueError(f"{segment.name}: ids must ascend in 0..{num_rows - 1}")
    edges = np.array([shards_[0].start, *(shard.stop for shard in shards_)])
    cuts = np.searchsorted(ids, -(-(edges - segment.start) // width)).tolist()
    for rank, (first, last) in enumerate(pairwise(cuts)):
        if last > first:
            yield rank, ids[first:last], slice(first * width, last * width)


def rows_in(shard: Any, start: int, segment: Segment) -> tuple[Any, int]:
    """Return the rows of a segment that lie in a shard, a 2-D view, and the first's id.

    Args:
        shard: (n,), the shard's values.
        start: where it begins in the flat vector.

    >>> layout = Layout.of([("bias", (3,), "out"), ("embed", (4, 2), "embed")])
    >>> rows_in(np.arange(6.0), 5, layout["embed"])
    (array([[0., 1.],
           [2., 3.],
           [4., 5.]]), 1)
    """
    width = segment.row_width
    first = max(segment.start, start)
    last = min(segment.stop, start + len(shard))
    rows = shard[first - start : last - start].reshape(-1, width)
    return rows, (first - segment.start) // width


class ShardPart(NamedTuple):
    """Which elements of the flat vector, all of one shard.

    dense  slices: all but what travels in rows
    rows   segments with ids of their rows, (n,) int64, ascending
    """

    dense: tuple[slice, ...]
    rows: tuple[tuple[Segment, Any], ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        rows = sum(len(ids) * segment.row_width for segment, ids in self.rows)
        return sum(span.stop - span.start for span in self.dense) + rows

    def cut(self, pieces: int) -> list[ShardPart]:
        """Return it in pieces: of its dense slices, and of the rows of each table.

        >>> [piece.dense for piece in ShardPart((slice(0, 5),), ()).cut(2)]
        [(slice(0, 2, None),), (slice(2, 5, None),)]
        """

        def share(start: int, stop: int, index: int) -> slice:
            length = stop - start
            ends = [start + number * length // pieces for number in (index, index + 1)]
            return slice(*ends)

        return [
            ShardPart(
                tuple(share(span.start, span.stop, index) for span in self.dense),
                tuple((s, ids[share(0, len(ids), index)]) for s, ids in self.rows),
            )
            for index in range(pieces)
        ]

    def pieces(self) -> list[ShardPart]:
        """Return it in pieces of about `PIECE` elements, to be copied one by one."""
        return self.cut(max(1, -(-self.size // PIECE)))

    @property
    def some_rows(self) -> list[tuple[Segment, Any]]:
        """The segments that it has rows of: of others the shard may have none."""
        return [(segment, ids) for segment, ids in self.rows if len(ids)]

    def head(self, *before: int) -> Any:
        """Return the numbers that say which rows, behind some others, int64."""
        ids = [ids for _, ids in self.rows]
        return np.concatenate([[*before, *map(len, ids)], *ids]).astype(np.int64)

    def of(self, vector: Any, start: int = 0) -> Any:
        """Return a copy of these elements of a vector that begins at `start`."""
        found = [vector[s.start - start : s.stop - start] for s in self.dense]
        for segment, ids in self.some_rows:
            table, first = rows_in(vector, start, segment)
            found.append(rows_at(table, ids - first).reshape(-1))
        return end_to_end(found or [vector[:0]])

    def set_(self, vector: Any, values: Any, start: int = 0) -> None:
        """Set what `of` returns."""
        done = 0
        for span in self.dense:
            part = vector[span.start - start : span.stop - start]
            part[:] = values[done : done + len(part)]
            done += len(part)
        for segment, ids in self.some_rows:
            table, first = rows_in(vector, start, segment)
            rows = values[done : done + len(ids) * segment.row_width]
            set_rows_(table, ids - first, rows.reshape(-1, segment.row_width))
            done += len(rows)


def spans_between(
    start: int, stop: int, segments: Iterable[Segment]
) -> tuple[slice, ...]:
    """Return the slices of start..stop that lie in none of the segments.

    >>> a, b, c = Layout.of([("a", (2,), ""), ("b", (3, 2), ""), ("c", (4,), "")])
    >>> spans_between(1, 10, [b])
    (slice(1, 2, None), slice(8, 10, None))
    """
    found = []
    for segment in sorted(segments, key=lambda segment: segment.start):
        if start < min(segment.start, stop):
            found.append(slice(start, min(segment.start, stop)))
        start = max(start, segment.stop)
    return (*found, slice(start, stop)) if start < stop else tuple(found)


def from_shards(comm: Comm, merged: Merged, name: str, shards: list[slice]) -> Any:
    """Return a vector of which ranks had their shards, (P,); 0 where it is lost.

    Communicates: collective, one Allreduce of 4P bytes, blocking.
    """
    whole_P = np.zeros(shards[-1].stop, np.float32)
    for rank, state in merged.held.items():
        if name in state:
            whole_P[shards[rank]] = state[name]
    if comm.size > 1:
        comm.exact.Allreduce(IN_PLACE, whole_P)
    return merged.means.get(name, whole_P)  # or one rank had all of it
