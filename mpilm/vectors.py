"""Vectors under one face: numpy arrays, and torch tensors on a CPU or a GPU.

torch is never imported here: a tensor can only come from somebody who has.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

# Elements: 256 KB of float32, so that some vectors' parts fit into an L2 cache together
# (BMUF's filter of 10.8 MB takes two thirds of the time; docs/scaling.md).
CACHED = 1 << 16


def is_vector(value: Any) -> bool:
    """Return whether `value` is a numpy array or a tensor."""
    return hasattr(value, "dtype") and hasattr(value, "shape") and len(value.shape) > 0


def is_tensor(vector: Any) -> bool:
    """Return whether a vector is torch's; torch is not loaded for it."""
    return hasattr(vector, "new_tensor")


def chunked(*vectors: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the same part of each vector, one part after the other.

    Parts are short enough to stay in a CPU's cache between several operations on them;
    a GPU, for which many short operations are slow, gets the vectors whole.

    >>> import numpy as np
    >>> [len(part) for part, _ in chunked(np.zeros(70_000), np.ones(70_000))]
    [65536, 4464]
    """
    if getattr(vectors[0], "is_cuda", False):
        yield vectors
        return
    for start in range(0, len(vectors[0]), CACHED):
        yield tuple(vector[start : start + CACHED] for vector in vectors)


def copy_of(vector: Any) -> Any:
    """Return a copy of a numpy array or a tensor, where the original lies."""
    return vector.detach().clone() if hasattr(vector, "clone") else vector.copy()


LENDING = ContextVar("LENDING", default=False)  # of a rank: virtual ones have their own


@contextmanager
def lending() -> Iterator[None]:
    """Let `to_array` return the vector's own memory within the block, where it can.

    For who reads it before it changes: a checkpoint would copy the whole state else.
    """
    token = LENDING.set(True)
    try:
        yield
    finally:
        LENDING.reset(token)


def to_array(vector: Any) -> Any:
    """Return a numpy array or a tensor as a numpy array of its own memory.

    Under `lending` it is the vector's memory, if that is a CPU's. What lies on a GPU
    comes in pinned memory.

    >>> import numpy as np
    >>> vector = np.zeros(2)
    >>> with lending():
    ...     lent = to_array(vector)
    >>> lent is vector, to_array(vector) is vector
    (True, False)
    """
    if getattr(vector, "is_cuda", False):  # a GPU writes into pinned memory directly
        host = vector.new_empty(vector.shape, device="cpu", pin_memory=True)
        return host.copy_(vector.detach()).numpy()
    array = vector.detach().numpy() if hasattr(vector, "detach") else vector
    lends = LENDING.get() and isinstance(array, np.ndarray)
    return array if lends else array.copy()


def fill_(vector: Any, array: Any) -> None:
    """Set a numpy array or a tensor to the values of a numpy array."""
    vector[:] = sys.modules["torch"].as_tensor(array) if is_tensor(vector) else array


def is_finite(vector: Any) -> bool:
    """Return whether all elements are finite, in one pass over them.

    >>> import numpy as np
    >>> is_finite(np.ones(2)), is_finite(np.array([1.0, np.inf, -np.inf]))
    (True, False)
    """
    with np.errstate(all="ignore"):
        if math.isfinite(float(vector.sum())):
            return True
        return bool((vector * 0.0 == 0.0).all())  # or the sum has overflowed


def zeros(num_elements: int, like: Any) -> Any:
    """Return a vector of zeros, of the kind and type of another and where that lies."""
    if is_tensor(like):
        return like.new_zeros(num_elements)
    return np.zeros(num_elements, like.dtype)


def end_to_end(vectors: Sequence[Any]) -> Any:
    """Return one new vector with all of them, one after the other."""
    if is_tensor(vectors[0]):
        return sys.modules["torch"].cat([vector.detach() for vector in vectors])
    return np.concatenate(vectors)


def rows_at(table: Any, ids: Any) -> Any:
    """Return a copy of rows of a matrix.

    Args:
        table: (V, width), numpy or torch.
        ids: (n,) int64, numpy.
    """
    if is_tensor(table):  # several times as fast as table[ids]
        return table.detach().index_select(0, as_ids(ids, table))
    return table[ids]


def set_rows_(table: Any, ids: Any, values: Any) -> None:
    """Set what `rows_at` returns."""
    if is_tensor(table):
        table.detach().index_copy_(0, as_ids(ids, table), values)
    else:
        table[ids] = values


def add_rows_(table: Any, ids: Any, values: Any) -> None:
    """Add to rows of a matrix, each once."""
    if is_tensor(table):
        table.detach().index_add_(0, as_ids(ids, table), values)
    else:
        table[ids] += values


def as_ids(ids: Any, like: Any) -> Any:
    """Return numpy's int64 as it is, or as torch's where the tensor `like` lies."""
    if not is_tensor(like):
        return ids
    return sys.modules["torch"].from_numpy(ids).to(like.device)


def finish_kernels() -> None:
    """Wait for the GPU, if one is in use, so that its time counts as computing."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class SparseVector:
    """A numpy vector that keeps no zeros: counts of ranks, of whom few are not 0.

    K ranks with a dense one each are K^2 numbers: 840 MB at K = 10,240.

    >>> counts = SparseVector(4, np.int64)
    >>> counts[[1, 3]] += 1
    >>> counts[3] += 2
    >>> counts.copy(), int(counts.sum())
    (array([0, 1, 0, 3]), 4)
    """

    def __init__(self, size: int, dtype: Any) -> None:
        self.shape, self.dtype = (size,), np.dtype(dtype)
        self._values: dict[int, Any] = {}

    def __getitem__(self, where: int | Sequence[int]) -> Any:
        zero = self.dtype.type(0)
        if isinstance(where, Sequence):
            return np.array([self._values.get(i, zero) for i in where], self.dtype)
        return self._values.get(where, zero)

    def __setitem__(self, where: int | Sequence[int] | slice, new: Any) -> None:
        if isinstance(where, slice):  # all of it
            assert where == slice(None), "only [:]"
            where = np.flatnonzero(new).tolist()
            self._values, new = {}, np.asarray(new, self.dtype)[where]
        if isinstance(where, Sequence):
            self._values.update(zip(where, new, strict=True))
        else:
            self._values[where] = new

    def sum(self) -> Any:
        """Return the sum of all elements."""
        return sum(self._values.values(), self.dtype.type(0))

    def copy(self) -> Any:
        """Return it as a dense numpy array."""
        dense = np.zeros(self.shape, self.dtype)
        dense[list(self._values)] = list(self._values.values())
        return dense
