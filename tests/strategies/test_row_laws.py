"""Row tables: every law of every strategy that takes them; what pairs leave alone."""

from __future__ import annotations

import numpy as np
import pytest

from mpilm.errors import MpilmError
from mpilm.learner.flat import Rows
from mpilm.strategies import STRATEGIES
from mpilm.strategies.row_mixing import RowMean, agree_in_pairs
from mpilm.strategies.rows import ShardPart
from mpilm.strategies.shared_rows import SharedRows
from mpilm.testing import LawBroken, check_strategy
from mpilm.testing.fleet import ROWS
from mpilm.world.virtual import run_virtual
from tests.strategies.cases import CASES
from tests.strategies.fleets import fleet, thetas
from tests.strategies.schedules import takes_rows

TAKING = {
    name: case
    for name, case in CASES.items()
    if takes_rows(STRATEGIES[case.name], case.of(4))
}


def settings_of(name):
    return {k: v for k, v in CASES[name].of(4).items() if k not in ("eta", "zeta")}


@pytest.mark.long
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TAKING)
def test_every_law_is_kept_with_row_tables(name, wire):
    more = {} if name == "local" else {"wire": wire}
    check_strategy(
        CASES[name].name, sizes=(3,), schedules=8, layout=ROWS,
        **settings_of(name), **more,
    )  # fmt: skip


def test_a_pair_that_disagrees_on_its_rows_breaks_the_law(monkeypatch):
    """What one adds nobody takes off."""

    class Half(RowMean):
        """Adds for rows of even number only, on odd ranks."""

        def finish_(self, out=None):
            before = self.vector.copy()
            super().finish_(out)
            if self.comm.rank % 2:
                self.vector[-5::2] = before[-5::2]

    monkeypatch.setattr("mpilm.strategies.dpsgd.RowMean", Half)
    with pytest.raises(LawBroken, match="mass is conserved"):
        check_strategy("dpsgd", sizes=(3,), schedules=0, layout=ROWS)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("name", "settings", "reference"),
    [
        ("dpsgd", {"topology": "complete"}, "delay_by_one"),
        ("gossip_bmuf", {"period": 3, "eta": 0.5}, "bmuf"),
        ("gossip_bmuf", {"period": 4, "delay": 2, "eta": 0.5}, "bmuf"),
    ],
)
def test_where_all_average_with_all_it_is_the_collective(
    name, settings, reference, size
):
    whole = {"learner": {"layout": ROWS, "noise": 0.2}, "steps": 24}
    more = {"group_size": size, "components": "whole"} if "period" in settings else {}
    pairs = fleet(name, size, **whole, **settings, **more)
    settings = {k: v for k, v in settings.items() if k != "topology"}
    together = fleet(reference, size, **whole, **settings)
    np.testing.assert_allclose(thetas(pairs), thetas(together), atol=5e-6)
    assert np.ptp(thetas(pairs)[:, :9]) > 0.1


def test_a_mean_in_pairs_is_that_of_a_symmetric_matrix_for_each_row():
    """On a ring of 5: row r of x by W_r, of the edges with r in U_ij."""
    size, where = 5, slice(0, ROWS.size)
    draw = np.random.default_rng(3)
    x = draw.standard_normal((size, ROWS.size)).astype(np.float32)
    touched = draw.random((size, 17)) < 0.3  # of 7 + 5 + 5 rows

    def main(world):
        rank, vector = world.rank, x[world.rank].copy()
        rows = SharedRows(world.comm, ROWS)
        rows.touched[:] = touched[rank]
        ring = [(rank - 1) % size, rank, (rank + 1) % size]
        pairs = agree_in_pairs(rows, where, ring)
        assert not rows.touched.any()
        RowMean(world.comm, vector, pairs).finish_()
        return vector

    found = np.stack(run_virtual(main, size))
    expected = x.astype(np.float64).copy()
    ends = [(s.slice, s.shape[0], s.row_width) for s in ROWS.tables]
    of_element = np.concatenate(
        [np.full(ROWS.num_dense, -1)]
        + [
            start + np.repeat(np.arange(num), width)
            for start, (_, num, width) in zip((0, 7, 12), ends, strict=True)
        ]
    )
    for element, row in enumerate(of_element):
        weights = np.eye(size)
        for i in range(size):
            for j in ((i - 1) % size, (i + 1) % size):
                if row < 0 or touched[i, row] or touched[j, row]:
                    weights[i, j] += 1 / 3
                    weights[i, i] -= 1 / 3
        assert np.allclose(weights, weights.T)
        expected[:, element] = weights @ x[:, element]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    rests = ~touched.any(axis=0)[np.maximum(of_element, 0)] & (of_element >= 0)
    assert rests.any() and np.array_equal(found[:, rests], x[:, rests])


def test_what_pairs_cannot_do_is_refused_in_one_line():
    for name, settings in (
        ("dpsgd", {"topology": "exponential"}),
        ("gossip_bmuf", {"components": 3}),
        ("gossip_bmuf", {"leave_out": 1.0}),
    ):
        with pytest.raises(MpilmError, match=r"model\.sparse") as caught:
            fleet(name, 2, steps=1, learner={"layout": ROWS}, **settings)
        assert "\n" not in str(caught.value).strip()


def test_a_learner_with_tables_gives_rows_and_no_more():
    (rank,) = fleet("local", 1, steps=3, learner={"layout": ROWS})
    rows, grad = rank.learner.rows, rank.learner.grad
    assert len(grad) == ROWS.num_dense == 21
    assert rows.keys() == {segment.name for segment in ROWS.tables}
    assert all(isinstance(found, Rows) for found in rows.values())


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("model_averaging", "float32"),
        ("bmuf", "float32"),
        ("gossip_bmuf", "float32"),
        ("gossip_bmuf", "bfloat16"),
    ],
)
def test_in_pieces_it_is_the_same_to_the_bit(monkeypatch, name, wire):
    run = {"learner": {"layout": ROWS, "noise": 0.2}, "steps": 24, "wire": wire}
    at_once = thetas(fleet(name, 4, **run, period=3))
    monkeypatch.setattr("mpilm.strategies.rows.PIECE", 5)
    num_pieces = []
    pieces = ShardPart.pieces

    def counted(part):
        num_pieces.append(len(pieces(part)))
        return pieces(part)

    monkeypatch.setattr(ShardPart, "pieces", counted)
    np.testing.assert_array_equal(thetas(fleet(name, 4, **run, period=3)), at_once)
    assert (name == "bmuf" and wire == "bfloat16") or max(num_pieces) > 2
