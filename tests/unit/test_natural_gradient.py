"""Online natural gradient: against Kaldi's C++, against dense matrices, invariants.

The outputs of Kaldi's own code lie in kaldi_ng_golden.h5 (env MPILM_DATA).
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mpilm.optim import natural_gradient, orthonormal
from mpilm.optim.natural_gradient import (
    NaturalGradient,
    NaturalGradientConfig,
    decompose,
)
from mpilm.optim.orthonormal import gram_schmidt, orthogonalised
from tests.reference.natural_gradient import DenseNaturalGradient

BESIDE = Path(__file__).parents[2] / "../shared/data"
GOLDEN = Path(os.environ.get("MPILM_DATA", BESIDE)) / "kaldi_ng_golden.h5"
CASES = (
    "basic",
    "dim_one",
    "n_less_than_r",
    "ones_column",
    "rank_ge_dim",
    "tall",
    "varying_n",
    "wide",
    "zero_minibatch",
    "zero_rows",
)
LIMIT_DOUBLE, LIMIT_SINGLE = 1e-6, 1e-4

needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no {GOLDEN}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def config_of(attributes, rank="rank"):
    return NaturalGradientConfig(
        rank=int(attributes[rank]),
        alpha=float(attributes["alpha"]),
        num_samples_history=float(attributes["num_samples_history"]),
        update_period=int(attributes["update_period"]),
        epsilon=float(attributes["epsilon"]),
        delta=float(attributes["delta"]),
    )


def distance(found, expected):
    """Return the relative Frobenius error."""
    expected = np.asarray(expected, dtype=np.float64)
    norm = np.linalg.norm(expected)
    error = np.linalg.norm(np.asarray(found, dtype=np.float64) - expected)
    return error / norm if norm > 0 else error


def replay(case, dtype, config=None, device="cpu"):
    """Yield (t, X_hat error, scale error, preconditioner) of each minibatch."""
    suffix = "_dp" if dtype == torch.float64 else ""
    with h5py.File(GOLDEN) as golden:
        group = golden[f"precondition/{case}"]
        precondition = NaturalGradient(config or config_of(group.attrs))
        offsets = group["row_offsets"][:]
        for t, (start, stop) in enumerate(pairwise(offsets)):
            X = torch.tensor(group["X"][start:stop], dtype=dtype, device=device)
            X_hat, scale = precondition(X)
            yield (
                t,
                distance(X_hat.cpu(), group["X_hat" + suffix][start:stop]),
                distance(scale.cpu(), group["scale" + suffix][t]),
                precondition,
            )


def dataset(case, name):
    with h5py.File(GOLDEN) as golden:
        return golden[f"precondition/{case}"][name][:]


def config_of_case(case):
    with h5py.File(GOLDEN) as golden:
        return config_of(golden[f"precondition/{case}"].attrs)


@needs_golden
def test_all_cases_are_tested():
    with h5py.File(GOLDEN) as golden:
        assert set(golden["precondition"]) == set(CASES)


@pytest.mark.long
@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_float64_equals_kaldi_in_double_precision(case):
    for t, error, scale_error, _ in replay(case, torch.float64):
        assert max(error, scale_error) <= LIMIT_DOUBLE, f"minibatch {t}"


def assert_single(case, device):
    spread, spread_scale = dataset(case, "spread"), dataset(case, "spread_scale")
    for t, error, scale_error, _ in replay(case, torch.float32, device=device):
        assert error <= max(LIMIT_SINGLE, 5 * spread[t]), f"minibatch {t}"
        assert scale_error <= max(LIMIT_SINGLE, 5 * spread_scale[t]), f"minibatch {t}"


@pytest.mark.long
@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_kaldi_in_single_precision(case):
    assert_single(case, "cpu")


@pytest.mark.gpu
@needs_gpu
@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_float32_on_a_gpu_equals_kaldi(case):
    assert_single(case, "cuda")


@pytest.mark.long
@needs_golden
@pytest.mark.parametrize("case", [case for case in CASES if case != "dim_one"])
def test_state_and_calls_that_update_equal_kaldi(case):
    rho, d = dataset(case, "rho_dp"), dataset(case, "d_dp")
    updated = dataset(case, "updated")
    before = None
    for t, _, _, precondition in replay(case, torch.float64):
        fisher = precondition.fisher
        assert distance(fisher.d_R, d[t]) < LIMIT_DOUBLE
        assert abs(fisher.rho - rho[t]) < LIMIT_DOUBLE * d[t].max()
        if before is not None:
            assert (fisher.W_RD is not before) == updated[t]
        before = fisher.W_RD
        assert fisher.t == t + 1
    W = dataset(case, "W_final_dp").astype(np.float64)
    assert distance((before.t() @ before).numpy(), W.T @ W) < LIMIT_DOUBLE


def worst(case, config):
    return max(error for _, error, _, _ in replay(case, torch.float64, config))


@needs_golden
@pytest.mark.parametrize(
    "change",
    [
        {"delta": 1e-5},
        {"alpha": 3.99},
        {"num_samples_history": 1990.0},
        {"update_period": 5},
        {"rank": 19},
    ],
    ids=str,
)
def test_a_wrong_setting_fails_the_comparison(change):
    case = "ones_column"
    wrong = replace(config_of_case(case), **change)
    assert worst(case, wrong) > 10 * LIMIT_DOUBLE


@needs_golden
@pytest.mark.parametrize(
    ("case", "constant", "value"),
    [
        ("basic", "START_PASSES", 2),
        ("basic", "NUM_FIRST_CALLS", 9),
        ("varying_n", "MAX_ETA", 1.0),
        ("n_less_than_r", "MAX_SKEW", 1e9),
    ],
)
def test_a_wrong_constant_fails_the_comparison(monkeypatch, case, constant, value):
    where = natural_gradient if hasattr(natural_gradient, constant) else orthonormal
    monkeypatch.setattr(where, constant, value)
    assert worst(case, None) > 10 * LIMIT_DOUBLE


@needs_golden
def test_updating_before_preconditioning_fails_the_comparison():
    """X_hat of call t made with the state after it: not what Kaldi returns."""
    X_all, offsets = dataset("basic", "X"), dataset("basic", "row_offsets")
    expected = dataset("basic", "X_hat_dp")
    first = slice(offsets[0], offsets[1])
    precondition = NaturalGradient(config_of_case("basic"))
    X = torch.tensor(X_all[first], dtype=torch.float64)
    precondition(X)
    late, _ = natural_gradient.apply(precondition.fisher.W_RD, X)
    assert distance(late.numpy(), expected[first]) > 1e-3


def minibatches(num, *, N=64, D=20, seed=0, decay=1.0):
    """Return (num, N, D) float64: Gaussian rows, falling spectrum, rotated."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(D, D)))
    spectrum = np.arange(1, D + 1) ** -decay
    return rng.normal(size=(num, N, D)) * spectrum @ basis


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("N", [8, 64])
def test_equals_the_dense_reference(period, N):
    """beta X G^-1 with G a D x D matrix, over 30 minibatches."""
    config = NaturalGradientConfig(
        rank=5, alpha=2.0, num_samples_history=500.0, update_period=period
    )
    fast = NaturalGradient(config)
    slow = DenseNaturalGradient(20, rank=5, alpha=2.0, history=500.0, period=period)
    for X in minibatches(30, N=N):
        X_hat, scale = fast(torch.from_numpy(X))
        expected, expected_scale = slow(X)
        assert distance(X_hat.numpy(), expected) < 1e-9
        assert abs(scale.item() - expected_scale) < 1e-9
    assert distance(fast.fisher.d_R, slow.d) < 1e-9
    assert abs(fast.fisher.rho - slow.rho) < 1e-9 * slow.d.max()


def rows_of(state, alpha):
    return state.W_RD.numpy() / np.sqrt(state.e_R(alpha))[:, None]


@pytest.mark.parametrize("decay", [0.5, 1.5])
def test_kaldis_own_list_of_checks(decay):
    """Trace kept, rows orthonormal, inner products positive, norm restored."""
    config = NaturalGradientConfig(rank=6, num_samples_history=300.0)
    precondition = NaturalGradient(config)
    num_not_raised = 0
    for X in minibatches(25, decay=decay):
        before = precondition.fisher
        X_hat, scale = precondition(torch.from_numpy(X))
        after = precondition.fisher
        rows = rows_of(after, config.alpha)
        assert np.abs(rows @ rows.T - np.eye(6)).max() < 1e-9
        products = (X * X_hat.numpy()).sum(1)
        assert (products > 0).all()
        assert scale >= 1
        assert np.isclose(np.linalg.norm(scale * X_hat), np.linalg.norm(X), rtol=1e-12)
        least = config.delta * (after.d_R + after.rho).max() * 1.01
        if before is not None and min(after.rho, after.d_R.min()) > least:
            eta = 1 - np.exp(-len(X) / config.num_samples_history)
            trace = eta * (X**2).sum() / len(X) + (1 - eta) * before.trace()
            assert np.isclose(after.trace(), trace, rtol=1e-12)
            num_not_raised += 1
    assert num_not_raised > 10


def test_zero_minibatches_first_and_later():
    precondition = NaturalGradient(NaturalGradientConfig(rank=4))
    for X in (np.zeros((32, 20)), minibatches(1)[0], np.zeros((32, 20))):
        X_hat, scale = precondition(torch.from_numpy(X))
        assert torch.isfinite(X_hat).all()
        if not X.any():
            assert scale == 1
            assert not X_hat.any()
    assert precondition.fisher.t == 3
    assert np.isfinite(precondition.fisher.d_R).all()


@pytest.mark.parametrize("shape", [(8, 1), (0, 5)])
def test_identity_for_one_column_or_no_rows(shape):
    precondition = NaturalGradient(NaturalGradientConfig())
    X = torch.randn(shape)
    X_hat, scale = precondition(X)
    assert X_hat is X
    assert scale == 1
    assert precondition.fisher is None
    assert precondition.state() == {}


def test_numbers_that_are_not_finite_do_not_reach_the_state():
    precondition = NaturalGradient(NaturalGradientConfig(rank=4))
    good = torch.from_numpy(minibatches(1)[0])
    bad = torch.full_like(good, torch.nan)
    precondition(good)
    before = precondition.fisher
    X_hat, _ = precondition(bad)
    assert X_hat.isnan().all()
    assert precondition.fisher.W_RD is before.W_RD
    assert torch.isfinite(precondition(good)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_before", [0, 11, 12])
def test_resumed_equals_uninterrupted_to_the_bit(dtype, num_before):
    config = NaturalGradientConfig(rank=5, update_period=4)
    batches = torch.tensor(minibatches(24), dtype=dtype)
    whole, resumed = NaturalGradient(config), NaturalGradient(config)
    for X in batches[:num_before]:
        whole(X)
    resumed.load_state(whole.state())
    for X in batches[num_before:]:
        assert torch.equal(whole(X)[0], resumed(X)[0])


def test_input_is_not_changed():
    X = torch.from_numpy(minibatches(1)[0])
    copy = X.clone()
    NaturalGradient(NaturalGradientConfig(rank=4))(X)
    assert torch.equal(X, copy)


def damaged(e, skew):
    """Return W whose rows E^-1/2 W are not orthonormal: the last leans on the first."""
    rows = np.eye(4, 9)
    rows[3] = skew * rows[0] + (1 - skew) * rows[3]
    return torch.from_numpy(np.sqrt(e)[:, None] * rows)


@pytest.mark.parametrize(
    ("skew", "branch"),
    [(1e-4, "none"), (0.5, "cholesky"), (0.999, "large inverse"), (1.0, "fails")],
)
def test_orthogonality_is_mended(monkeypatch, skew, branch):
    """By Cholesky; by Gram-Schmidt where that fails or has a large inverse."""
    e = np.array([0.9, 0.5, 0.2, 0.1])
    calls = []

    def spy(rows):
        calls.append(rows)
        return gram_schmidt(rows)

    monkeypatch.setattr(orthonormal, "gram_schmidt", spy)
    W = damaged(e, skew)
    mended = orthogonalised(W, e)
    assert (mended is W) == (branch == "none")
    assert bool(calls) == (branch in ("large inverse", "fails"))
    rows = mended.numpy() / np.sqrt(e)[:, None]
    limit = 1e-3 if branch == "none" else 1e-9
    assert np.abs(rows @ rows.T - np.eye(4)).max() < limit


def test_gram_schmidt_keeps_the_span_and_replaces_zero_rows():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(3, 6))
    rows[2] = rows[0] + 1e-9 * rows[2]  # nearly dependent: needs a second pass
    found = gram_schmidt(np.vstack([rows, np.zeros((1, 6))]))
    assert np.abs(found @ found.T - np.eye(4)).max() < 1e-12
    inside = rows[:2] @ found[:2].T @ found[:2]
    assert np.abs(inside - rows[:2]).max() < 1e-12


def test_eigenvalues_are_ordered_by_size_and_raised():
    Z = np.diag([1.0, 4.0, -2.0])
    c, U, in_doubt = decompose(Z, least=0.5)
    assert c.tolist() == [4.0, 0.5, 1.0]
    assert np.argmax(np.abs(U), axis=0).tolist() == [1, 2, 0]
    assert in_doubt
    assert not decompose(np.diag([1.0, 4.0]), least=0.5)[2]
    assert decompose(np.diag([1.0, 2e6]), least=0.5)[2]
