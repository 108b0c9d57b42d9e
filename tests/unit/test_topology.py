"""Mixing matrices: doubly stochastic, the same on all ranks, contracting as claimed."""

import doctest
import math
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mpilm.strategies import topology
from mpilm.strategies.topology import (
    TOPOLOGIES,
    contraction,
    contraction_table,
    cycle_contraction,
    destinations,
    expected_contraction,
    mixing_matrix,
    num_groups,
    permutation,
    random_groups,
)

RANDOM = ("random_ring", "random_pairs")

# Derived by hand: K -> fixed ring, random ring, random perfect matching
DERIVED = {
    8: (".648", ".238", ".429"),
    16: (".901", ".289", ".467"),
    32: (".975", ".312", ".484"),
    64: (".9936", ".323", ".492"),
    128: (".9984", ".328", ".496"),
}


def test_examples_hold():
    results = doctest.testmod(topology)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("size", range(1, 18))
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_matrix_is_doubly_stochastic(name, size):
    for round_ in range(6):
        matrix = mixing_matrix(name, size, seed=7, round_=round_)
        assert (matrix >= 0.0).all()
        np.testing.assert_allclose(matrix.sum(0), 1.0, atol=1e-15)
        np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-15)
        if name != "exponential":
            assert np.array_equal(matrix, matrix.T)


@pytest.mark.parametrize("size", range(1, 18))
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_destinations_are_the_columns_of_the_matrix(name, size):
    for round_ in range(6):
        matrix = mixing_matrix(name, size, seed=7, round_=round_)
        np.fill_diagonal(matrix, 0.0)
        for rank in range(size):
            to = destinations(name, rank, size, seed=7, round_=round_)
            assert sorted(to) == np.flatnonzero(matrix[:, rank]).tolist()


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_number_of_neighbours(name):
    most = {"fixed_ring": 2, "random_ring": 2, "complete": 8}.get(name, 1)
    for round_ in range(5):
        matrix = mixing_matrix(name, 9, round_=round_)
        neighbours = (matrix > 0).sum(axis=1) - 1
        assert neighbours.max() == most
        assert (neighbours == most).sum() == (8 if name == "random_pairs" else 9)


@pytest.mark.parametrize("size", DERIVED)
def test_contraction_is_that_of_the_published_table(size):
    fixed = contraction(mixing_matrix("fixed_ring", size))
    random = [expected_contraction(name, size) for name in RANDOM]
    for got, want in zip([fixed, *random], DERIVED[size], strict=True):
        digits = len(want) - 1
        # .9745 stands there as .975: half a unit of the last digit, and its rounding
        assert abs(got - float(want)) <= 0.51 * 10**-digits
    assert abs(contraction(mixing_matrix("complete", size))) < 1e-12


@pytest.mark.parametrize("size", range(2, 18))
@pytest.mark.parametrize("name", ["fixed_ring", "complete"])
def test_closed_form_is_the_eigenvalue(name, size):
    computed = contraction(mixing_matrix(name, size))
    assert computed == pytest.approx(expected_contraction(name, size), abs=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("size", [3, 5, 8])
@pytest.mark.parametrize("name", RANDOM)
def test_sample_mean_of_many_draws_agrees_with_the_closed_form(name, size):
    num = 4000
    draws = [mixing_matrix(name, size, seed=1, round_=t) for t in range(num)]
    squares = [matrix.T @ matrix for matrix in draws]
    rho = expected_contraction(name, size)
    mean_matrix = np.full((size, size), 1.0 / size)
    expected = rho * (np.eye(size) - mean_matrix) + mean_matrix
    # an element lies in [0, 1]: standard error at most 0.5 / sqrt(num); 4 of them
    assert abs(np.mean(squares, axis=0) - expected).max() < 4 * 0.5 / num**0.5
    assert contraction(draws) == pytest.approx(rho, abs=0.03)


@pytest.mark.parametrize("name", RANDOM)
def test_random_matrices_change_with_round_and_seed(name):
    first = mixing_matrix(name, 9, seed=0, round_=0)
    assert np.array_equal(first, mixing_matrix(name, 9, seed=0, round_=0))
    assert not np.array_equal(first, mixing_matrix(name, 9, seed=0, round_=1))
    assert not np.array_equal(first, mixing_matrix(name, 9, seed=1, round_=0))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_contraction_bounds_what_a_round_leaves(name):
    """In the mean over many rounds, from the direction that contracts slowest."""
    size, num = 8, 1500
    draws = [mixing_matrix(name, size, seed=3, round_=t) for t in range(num)]
    slowest = np.cos(2 * np.pi * np.arange(size) / size)
    left = np.mean([np.sum((matrix @ slowest) ** 2) for matrix in draws])
    share = left / np.sum(slowest**2)
    assert share <= contraction(draws) + 1e-9
    if name == "fixed_ring":
        assert share == pytest.approx(contraction(draws), rel=1e-9)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_exponential_graph_of_a_power_of_two_averages_exactly_in_a_cycle(size):
    product = np.eye(size)
    for round_ in range(size.bit_length() - 1):
        assert not np.allclose(product, 1.0 / size)
        product = mixing_matrix("exponential", size, round_=round_) @ product
    np.testing.assert_allclose(product, 1.0 / size, atol=1e-15)
    assert cycle_contraction(size) == 0.0
    assert 0.0 < cycle_contraction(size + 1) < 1.0


def test_exponential_graph_has_no_closed_form():
    with pytest.raises(ValueError, match="exponential: no closed form"):
        expected_contraction("exponential", 8)


@pytest.mark.parametrize("group_size", range(2, 9))
def test_random_groups_are_balanced_and_not_larger_than_asked_for(group_size):
    for size, round_ in product(range(1, 41), range(3)):
        groups = random_groups(5, round_, 2, size, group_size)
        assert len(groups) == num_groups(size, group_size)
        assert sorted(rank for group in groups for rank in group) == list(range(size))
        assert all(group == sorted(group) for group in groups)
        lengths = [len(group) for group in groups]
        assert max(lengths) - min(lengths) <= 1
        if group_size == 2 and size % 2 and size > 1:
            assert sorted(lengths) == [2] * (size // 2 - 1) + [3]
            continue
        assert max(lengths) <= group_size
        assert min(lengths) >= min(2, size)
        assert len(groups) == math.ceil(size / group_size)  # no more than that takes


@pytest.mark.parametrize("group_size", range(2, 9))
def test_group_means_are_doubly_stochastic(group_size):
    for size in range(1, 41):
        matrix = np.zeros((size, size))
        for group in random_groups(5, 1, 2, size, group_size):
            matrix[np.ix_(group, group)] = 1.0 / len(group)
        np.testing.assert_allclose(matrix.sum(0), 1.0, atol=1e-15)
        np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-15)
        # what a rank learned is diluted to this, on average
        assert np.trace(matrix) == pytest.approx(num_groups(size, group_size))


def test_random_groups_are_drawn_for_every_round_and_component():
    draws = [random_groups(0, t, c, 12, 3) for t in range(3) for c in range(3)]
    assert draws[0] == random_groups(0, 0, 0, 12, 3)
    assert len({str(groups) for groups in draws}) == len(draws)


def test_permutations_are_uniform():
    num = 3000
    places = np.zeros((4, 4))
    for round_ in range(num):
        for place, rank in enumerate(permutation(2, round_, 4)):
            places[place, rank] += 1
    assert abs(places / num - 0.25).max() < 4 * (0.25 * 0.75 / num) ** 0.5


def test_docs_show_the_table_that_the_command_prints():
    page = Path(__file__).parents[2] / "docs/convergence.md"
    rows = re.findall(r"^\| \d+ \|.*\|$", page.read_text(), re.MULTILINE)
    assert [int(row.split("|")[1]) for row in rows] == list(DERIVED)
    assert rows == contraction_table(list(DERIVED)).splitlines()[2:]
    command = [sys.executable, "-m", "mpilm.strategies.topology", "8", "16"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout.splitlines()[2:] == rows[:2]


@pytest.mark.parametrize("num_ranks", [3, 5, 6, 8, 12])
def test_what_a_cycle_leaves_per_round(num_ranks):
    """The n-th root of ||T_n ... T_1 - 1/K||^2: 0 where K is a power of 2."""
    num_rounds = int(np.ceil(np.log2(num_ranks)))
    product = np.eye(num_ranks)
    for round_ in range(num_rounds):
        product = mixing_matrix("exponential", num_ranks, round_=round_) @ product
    left = np.linalg.norm(product - 1.0 / num_ranks, 2) ** 2
    found = cycle_contraction(num_ranks) ** num_rounds
    assert found == pytest.approx(left, abs=1e-12)
    assert (left > 1e-3) == (num_ranks != 8)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.5])
def test_the_gap_of_two_ranks_is_twice_what_each_takes_over(share):
    T = np.array([[1.0 - share, share], [share, 1.0 - share]])
    assert topology.spectral_gap(T) == pytest.approx(2.0 * share)
    assert contraction(T) == pytest.approx((1.0 - 2.0 * share) ** 2)
    assert topology.spectral_gap(np.eye(1)) == 1.0
