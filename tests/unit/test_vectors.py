"""Vectors that keep no zeros behave as dense ones do."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.errors import CheckpointError
from mpilm.storage.saved import restore_state_, saved_state
from mpilm.vectors import SparseVector


class Owner:
    def __init__(self, size=6):
        self.counts = SparseVector(size, np.int64)
        self.weights = SparseVector(size, np.float64)


@pytest.mark.parametrize("dtype", [np.int64, np.float64])
def test_it_counts_as_a_dense_vector(dtype):
    sparse, dense = SparseVector(9, dtype), np.zeros(9, dtype)
    draw = np.random.default_rng(3)
    for _ in range(200):
        where = draw.choice(9, size=3, replace=False).tolist()
        amount = draw.integers(0, 5) if dtype is np.int64 else draw.random()
        for vector in (sparse, dense):
            vector[where] += amount
            vector[where[0]] += 1
    np.testing.assert_array_equal(sparse.copy(), dense)
    assert sparse.copy().dtype == dense.dtype
    assert sparse.sum() == pytest.approx(dense.sum(), rel=1e-14)
    assert sparse[where].tolist() == dense[where].tolist()


def test_one_without_counts_is_all_zeros():
    empty = SparseVector(3, np.int64)
    assert empty.copy().tolist() == [0, 0, 0]
    assert empty.sum() == 0
    assert empty[2] == 0


def test_a_checkpoint_holds_it_as_a_dense_vector():
    owner, other = Owner(), Owner()
    owner.counts[[1, 5]] += 2
    owner.weights[4] += 0.25
    other.counts[0] += 7  # overwritten
    names = ("counts", "weights")
    state = saved_state(owner, names)
    assert state["counts"].tolist() == [0, 2, 0, 0, 0, 2]
    restore_state_(other, names, state, "owner")
    for name in names:
        assert np.array_equal(getattr(other, name).copy(), state[name])
    with pytest.raises(CheckpointError, match=r"has shape \(6,\) in the"):
        restore_state_(Owner(4), names, state, "owner")
