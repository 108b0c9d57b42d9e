"""The flat vector: where each named parameter lies in theta, and which belong together.

A `Layout` is pure bookkeeping (no torch). theta_P and grad_P have the same layout, but
for row tables: segments whose gradient is rows (`learner.rows`). They lie last, and
grad ends before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Segment:
    """One parameter inside the flat vector.

    name       the module's own name for it, such as "lstm.weight_ih_l0"
    start      first element
    shape      its shape; the rows of a matrix are its first axis
    component  the group that must be mixed as one (tied weights, a layer)
    is_table   whether its gradient is some of its rows, and not in grad
    """

    name: str
    start: int
    shape: tuple[int, ...]
    component: str
    is_table: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def row_width(self) -> int:
        """Elements in a row: a step along the first axis."""
        return self.size // self.shape[0] if self.shape else 1

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.size

    @property
    def slice(self) -> slice:
        """Where it lies in the flat vector."""
        return slice(self.start, self.stop)


class Rows(NamedTuple):
    """Some rows of a matrix (or elements of a vector): a gradient.

    ids     (n,) int64, ascending, each once
    values  (n, width) float32
    """

    ids: Any
    values: Any


@dataclass(frozen=True)
class Layout:
    """Segments in the order in which they lie, without gaps.

    >>> layout = Layout.of([("embed", (4, 2), "embed"), ("out", (3,), "out")])
    >>> layout.size, layout["out"].slice
    (11, slice(8, 11, None))
    """

    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, parts: Iterable[tuple[str, tuple[int, ...], str]]) -> Layout:
        """Return the layout of (name, shape, component) laid end to end."""
        segments, start = [], 0
        for name, shape, component in parts:
            segment = Segment(name, start, tuple(shape), component)
            segments.append(segment)
            start = segment.stop
        return cls(tuple(segments))

    @cached_property
    def _by_name(self) -> dict[str, Segment]:
        return {segment.name: segment for segment in self.segments}

    def __getitem__(self, name: str) -> Segment:
        return self._by_name[name]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    @cached_property
    def size(self) -> int:
        """Number of parameters, P."""
        return self.segments[-1].stop if self.segments else 0

    @cached_property
    def tables(self) -> tuple[Segment, ...]:
        """The row tables, which lie behind all other segments."""
        return tuple(segment for segment in self.segments if segment.is_table)

    @cached_property
    def num_dense(self) -> int:
        """Number of elements of grad: those before the row tables."""
        return self.tables[0].start if self.tables else self.size

    @cached_property
    def components(self) -> dict[str, tuple[slice, ...]]:
        """Component name -> the slices it covers, neighbours merged, in order."""
        found: dict[str, list[slice]] = {}
        for segment in self.segments:
            slices = found.setdefault(segment.component, [])
            if slices and slices[-1].stop == segment.start:
                slices[-1] = slice(slices[-1].start, segment.stop)
            else:
                slices.append(segment.slice)
        return {name: tuple(slices) for name, slices in found.items()}

    def buckets(self, num_elements: int) -> list[tuple[Segment, ...]]:
        """Return runs of whole segments of `num_elements` or more, last ones first.

        Together they are grad, without the row tables.

        A backward pass completes the last layers first; so do these buckets.
        """
        buckets: list[tuple[Segment, ...]] = []
        run: list[Segment] = []
        for segment in reversed(self.segments[: -len(self.tables) or None]):
            run.insert(0, segment)
            if sum(s.size for s in run) >= num_elements:
                buckets.append(tuple(run))
                run = []
        if run:
            buckets.append(tuple(run))
        return buckets
