"""Who mixes with whom at round t: pure functions of (seed, round). Mixing matrices.

Nobody negotiates: every rank computes the same answer from the same seed and round.
`python -m mpilm.strategies.topology` prints the table of contraction factors.

Notation    K    num_ranks
            t    round
            T    mixing matrix (K, K): theta_i <- sum_j T_ij theta_j
            rho  second largest eigenvalue of E[T^T T]: one mixing leaves at most this
                 share of the squared distance to the mean, in expectation
            gap  1 - second largest |eigenvalue| of T, or of the mean T of a run
Topologies  fixed_ring    T_ij = 1/3 for i and its two neighbours on the ring
            random_ring   the same on a ring of randomly permuted ranks, P^T T P
            exponential   T_ij = 1/2 for i and i - 2^(t mod ceil(log2 K))
            complete      T_ij = 1/K
            random_pairs  T_ij = 1/2 for i and its partner in a random matching
Source      X. Lian et al., "Asynchronous Decentralized Parallel Stochastic Gradient
            Descent", ICML 2018 (ring); X. Cui et al., arXiv 2110.11199, 2021 (random
            ring); M. Assran et al., "Stochastic Gradient Push", ICML 2019
            (exponential).
Invariants  every T is doubly stochastic: mixing preserves the mean of all models.
Departs     nowhere; a ring of two ranks has one neighbour, so there T_ij = 1/2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Weights = dict[int, float]


@lru_cache(maxsize=1024)
def permutation(
    seed: int, round_: int, num_ranks: int, salt: int = 0
) -> tuple[int, ...]:
    """Return a random order of the ranks, the same for the same arguments.

    >>> permutation(1, 0, 4) == permutation(1, 0, 4), sorted(permutation(1, 5, 4))
    (True, [0, 1, 2, 3])
    """
    rng = np.random.default_rng([seed, round_, salt])
    return tuple(rng.permutation(num_ranks).tolist())


@lru_cache(maxsize=64)
def places(seed: int, round_: int, num_ranks: int, salt: int = 0) -> tuple[int, ...]:
    """Return where each rank stands in `permutation` of the same arguments.

    To look for one is O(K), and each of K ranks asks.

    >>> order = permutation(1, 0, 4)
    >>> [order[place] for place in places(1, 0, 4)]
    [0, 1, 2, 3]
    """
    found = [0] * num_ranks
    for place, rank in enumerate(permutation(seed, round_, num_ranks, salt)):
        found[rank] = place
    return tuple(found)


def fixed_ring(rank: int, num_ranks: int, seed: int = 0, round_: int = 0) -> Weights:
    """Return whom `rank` averages with on the ring 0, 1, ..., K-1, and how much."""
    return _uniform(rank, {(rank - 1) % num_ranks, (rank + 1) % num_ranks})


def random_ring(rank: int, num_ranks: int, seed: int = 0, round_: int = 0) -> Weights:
    """Return whom `rank` averages with on a ring drawn anew in every round."""
    order, place = permutation(seed, round_, num_ranks), places(seed, round_, num_ranks)
    before, after = place[rank] - 1, (place[rank] + 1) % num_ranks
    return _uniform(rank, {order[before], order[after]})


def exponential(rank: int, num_ranks: int, seed: int = 0, round_: int = 0) -> Weights:
    """Return whose model `rank` receives in the one-peer exponential graph.

    It receives from rank - 2^(t mod ceil(log2 K)) and sends to rank + the same: T is
    doubly stochastic but not symmetric.

    >>> exponential(0, 8, round_=1)
    {0: 0.5, 6: 0.5}
    """
    return _uniform(rank, {(rank - _hop(num_ranks, round_)) % num_ranks})


def complete(rank: int, num_ranks: int, seed: int = 0, round_: int = 0) -> Weights:
    """Return equal weights for all ranks."""
    return _uniform(rank, set(range(num_ranks)))


def random_pairs(rank: int, num_ranks: int, seed: int = 0, round_: int = 0) -> Weights:
    """Return the partner of `rank` in a random matching; one rank of an odd K is idle.

    >>> random_pairs(1, 2)
    {1: 0.5, 0: 0.5}
    """
    order = permutation(seed, round_, num_ranks)
    place = places(seed, round_, num_ranks)[rank] ^ 1
    return _uniform(rank, {order[place]} if place < num_ranks else set())


def num_groups(num_ranks: int, group_size: int) -> int:
    """Return into how many groups `random_groups` cuts the ranks.

    As few as make none larger than `group_size`; but none has a single rank, which
    would be mixed with nobody: with `group_size` 2 one of an odd number has 3.

    >>> num_groups(8, 4), num_groups(7, 4), num_groups(7, 2)
    (2, 2, 3)
    """
    return max(1, min(-(-num_ranks // group_size), num_ranks // 2))


def random_groups(
    seed: int, round_: int, component: int, num_ranks: int, group_size: int
) -> list[list[int]]:
    """Return the ranks cut into random groups; members in ascending order.

    There are `num_groups`; their sizes differ by one at most.

    >>> groups = random_groups(1, 0, 0, num_ranks=7, group_size=3)
    >>> sorted(len(group) for group in groups)
    [2, 2, 3]
    """
    order = permutation(seed, round_, num_ranks, salt=component + 1)
    number = num_groups(num_ranks, group_size)
    return [sorted(order[first::number]) for first in range(number)]


def random_group(
    seed: int,
    round_: int,
    component: int,
    num_ranks: int,
    *,
    group_size: int,
    rank: int,
) -> list[int]:
    """Return the one of `random_groups` that `rank` is in.

    >>> random_group(1, 0, 0, 7, group_size=3, rank=4) in random_groups(1, 0, 0, 7, 3)
    True
    """
    order = permutation(seed, round_, num_ranks, salt=component + 1)
    place = places(seed, round_, num_ranks, salt=component + 1)[rank]
    number = num_groups(num_ranks, group_size)
    return sorted(order[place % number :: number])


TOPOLOGIES: dict[str, Callable[..., Weights]] = {
    "fixed_ring": fixed_ring,
    "random_ring": random_ring,
    "exponential": exponential,
    "complete": complete,
    "random_pairs": random_pairs,
}


def destinations(
    name: str, rank: int, num_ranks: int, seed: int = 0, round_: int = 0
) -> list[int]:
    """Return the other ranks that take the model of `rank` into their average.

    >>> destinations("exponential", 0, 8, round_=1)
    [2]
    """
    if name == "exponential":
        return [p for p in [(rank + _hop(num_ranks, round_)) % num_ranks] if p != rank]
    weights = TOPOLOGIES[name](rank, num_ranks, seed, round_)  # T is symmetric
    return [peer for peer in weights if peer != rank]


def mixing_matrix(name: str, num_ranks: int, seed: int = 0, round_: int = 0) -> Matrix:
    """Return T of a round, (K, K) float64: row i holds the weights of rank i.

    >>> mixing_matrix("complete", 2)
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    matrix = np.zeros((num_ranks, num_ranks))
    for rank in range(num_ranks):
        weights = TOPOLOGIES[name](rank, num_ranks, seed, round_)
        for peer, weight in weights.items():
            matrix[rank, peer] = weight
    return matrix


def contraction(matrices: Matrix | Sequence[Matrix]) -> float:
    """Return rho: the second largest eigenvalue of the mean of T^T T.

    Args:
        matrices: one T, or draws of a random one.
    """
    draws = [matrices] if isinstance(matrices, np.ndarray) else matrices
    mean = np.mean([matrix.T @ matrix for matrix in draws], axis=0)
    return float(np.linalg.eigvalsh(mean)[-2]) if len(mean) > 1 else 0.0


def realised(shares: Matrix, rounds: float) -> Matrix:
    """Return the mean mixing matrix of a run: T = I + (S - diag(S 1)) / rounds.

    Args:
        shares: S, (K, K): S_ij is the sum over rounds of T_ij, 0 on the diagonal.
        rounds: how many there were, > 0.

    >>> realised(np.array([[0.0, 4.0], [4.0, 0.0]]), 10)
    array([[0.6, 0.4],
           [0.4, 0.6]])
    """
    loss = np.diag(shares.sum(axis=1))
    return np.eye(len(shares)) + (shares - loss) / rounds


def spectral_gap(matrix: Matrix) -> float:
    """Return 1 - |lambda|, lambda the second largest eigenvalue of T in modulus.

    For a fixed symmetric T it is 1 - sqrt(rho). 0: some ranks never agree.

    >>> spectral_gap(mixing_matrix("complete", 4)), spectral_gap(np.eye(4))
    (1.0, 0.0)
    """
    sizes = np.sort(np.abs(np.linalg.eigvals(matrix)))
    gap = 1.0 - float(sizes[-2]) if len(sizes) > 1 else 1.0
    return max(0.0, round(gap, 12))  # what rounding leaves of 0 and 1


def expected_contraction(name: str, num_ranks: int) -> float:
    """Return rho of a topology in closed form.

        fixed_ring    ((1 + 2 cos(2 pi / K)) / 3)^2
        random_ring   1/3 - (2/3) / (K - 1)
        random_pairs  1/2 - 1/(2 (K - 1)), K even; 1/2, K odd
        complete      0

    For a random T, E[T^T T] = a I + b (11^T - I), so rho = a - b; the rows sum to 1,
    and a is the expected sum of the squares in a row of T: 1/3 on a ring, 1/2 in a
    pair, 1 for an idle rank.

    Raises:
        ValueError: there is no closed form here (`exponential`).

    >>> round(expected_contraction("random_ring", 128), 3)
    0.328
    """
    if name not in TOPOLOGIES or name == "exponential":
        raise ValueError(f"{name}: no closed form")
    if name == "complete" or num_ranks <= 2:
        return 0.0
    if name == "fixed_ring":
        return float(((1 + 2 * np.cos(2 * np.pi / num_ranks)) / 3) ** 2)
    if name == "random_ring":
        return 1 / 3 - (2 / 3) / (num_ranks - 1)
    return 0.5 - 0.5 / (num_ranks - 1) if num_ranks % 2 == 0 else 0.5


def cycle_contraction(num_ranks: int) -> float:
    """Return what a whole cycle of the exponential graph leaves, per round.

    A single round may leave a direction as it is; the product T_n ... T_1 over the
    n = ceil(log2 K) rounds of a cycle does not. This is the n-th root of its rho.

    >>> cycle_contraction(8) < 1e-9
    True
    """
    num_rounds = _num_hops(num_ranks)
    product = np.eye(num_ranks)
    for round_ in range(num_rounds):
        product = mixing_matrix("exponential", num_ranks, round_=round_) @ product
    rho = contraction(product)
    return float(rho ** (1 / num_rounds)) if rho > 1e-12 else 0.0  # rounding


def contraction_table(sizes: Sequence[int]) -> str:
    """Return the contraction factors of all topologies as a table in Markdown."""
    rows = ["| K | fixed_ring | random_ring | random_pairs | exponential | complete |"]
    rows.append("|---|---|---|---|---|---|")
    for size in sizes:
        fixed = contraction(mixing_matrix("fixed_ring", size))
        ring = expected_contraction("random_ring", size)
        pairs = expected_contraction("random_pairs", size)
        every = contraction(mixing_matrix("complete", size))
        factors = [fixed, ring, pairs, cycle_contraction(size), every]
        cells = [f"{abs(factor):.4f}" for factor in factors]
        rows.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _num_hops(num_ranks: int) -> int:
    return max(1, (num_ranks - 1).bit_length())  # ceil(log2 K)


def _hop(num_ranks: int, round_: int) -> int:
    return 1 << (round_ % _num_hops(num_ranks))


def _uniform(rank: int, peers: set[int]) -> Weights:
    """Return equal weights for `rank` and `peers`, `rank` itself first."""
    others = sorted(peers - {rank})
    return dict.fromkeys([rank, *others], 1.0 / (1 + len(others)))


if __name__ == "__main__":
    print(
        contraction_table([int(size) for size in sys.argv[1:]] or [8, 16, 32, 64, 128])
    )
