"""Kaldi's online natural gradient: precondition the rows of a minibatch.

Source      D. Povey, X. Zhang, S. Khudanpur, "Parallel training of DNNs with natural
            gradient and parameter averaging", ICLR workshop 2015, appendix A; what the
            paper leaves open is as in Kaldi's class OnlineNaturalGradient.
Notation    X_ND -> minibatch, N rows of dimension D, one per sample
            F_t -> estimate of the rows' uncentred covariance (Fisher matrix), D x D
            R_t, D_t, rho_t -> its factors; d = diag(D_t); Q = D_t + rho_t I
            W_RD -> E_t^1/2 R_t, what is stored in place of R_t      t -> calls done
            primes: after the update      a -> eta / N

Model       F_t = R_t^T D_t R_t + rho_t I,   R_t R_t^T = I                       (1)
Smoothing   G_t = F_t + (alpha/D) tr(F_t) I = R_t^T D_t R_t + beta I             (2)
            beta = (1 + alpha) rho + (alpha/D) sum(d)                            (3)
Inverse     G_t^-1 = (I - R_t^T E R_t) / beta,   e_i = 1 / (beta/d_i + 1)        (4)
            (Woodbury). Without the factor 1/beta, with W = E^1/2 R_t:
Apply       H = X W^T,   X_hat = X - H W = beta X G_t^-1                         (5)
            scale = ||X|| / ||X_hat||, 1 if X = 0                                (6)
            scale * X_hat has the Frobenius norm of X.

Target      T_t = eta (1/N) X^T X + (1 - eta) F_t                                (7)
            eta = min(0.9, 1 - exp(-N / num_samples_history))                    (8)
            F_{t+1} is to approximate T_t. One step of subspace iteration from R_t:
            the rows of Y = R_t T_t span what becomes R_{t+1}. As R_t = E^-1/2 W,
            Y = a E^-1/2 B,   B = J + ((1-eta)/a) Q W,   J = H^T X               (9)
            Z = Y Y^T = a^2 E^-1/2 K E^-1/2 + (1-eta)^2 Q^2
                + a (1-eta) (E^-1/2 L E^-1/2 Q + Q E^-1/2 L E^-1/2)             (10)
            K = J J^T,   L = H^T H = J W^T                                      (11)
            Z = U C U^T, c_i falling, each at least ((1 - eta) rho)^2           (12)
            R_{t+1} = C^-1/2 U^T Y has orthonormal rows.
            Z = R_t T_t^2 R_t^T, so sqrt(c_i) are eigenvalues of T_t (of its
            restriction to span R_t once that is invariant): d'_i + rho' = sqrt(c_i).
            tr F_{t+1} = tr T_t then gives
            rho' = (eta/N ||X||^2 + (1-eta) (D rho + sum(d)) - sum(sqrt(c)))
                   / (D - R)                                                    (13)
            d'_i = sqrt(c_i) - rho'                                             (14)
            rho', d'_i <- max of themselves and
                          max(epsilon, delta max_i sqrt(c_i))                   (15)
            W' = E'^1/2 R_{t+1} = A B,   A = a E'^1/2 C^-1/2 U^T E^-1/2         (16)
            where e' comes from d', rho' by (3) and (4).
Rounding    where c_1 > 1e6 c_R or any c was raised in (12), R_{t+1} may have lost its
            orthogonality: O = E'^-1/2 W' W'^T E'^-1/2                          (17)
            If |O - I| > 1e-3 anywhere: O = M M^T by Cholesky,
            W' <- E'^1/2 M^-1 E'^-1/2 W'                                        (18)
            If that fails or M^-1 has an element of 100 or more: Gram-Schmidt on the
            rows of W', then times E'^1/2                                       (19)
Start       R_0: row r is 1.1, 1, 1, ... at columns r, r + R, r + 2R, ... and 0
            elsewhere, normalised; d_i = rho = epsilon; W by (4)                (20)
            The first minibatch X then updates it 3 times (once if N <= R), before it
            is preconditioned and, as every other, updates it.
When        calls 0 to 10 update; then those with (t - 10) mod update_period = 0 (21)

Invariants  R_t R_t^T = I; tr F_{t+1} = tr T_t unless (15) raised something;
            <X, X_hat> > 0; each X_hat uses the state from before the call.
Departs     from Kaldi: d, rho and the R x R problem (10) to (18) are float64 on the
            CPU also where X is float32 (Kaldi keeps d and rho in X's precision and
            decomposes Z in it). A minibatch without rows, or with numbers that are not
            finite, does not update; Kaldi has no such cases. The random rows that
            Gram-Schmidt puts in place of zero ones come from a fixed seed.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from math import exp
from typing import Annotated, Any

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from mpilm.optim.orthonormal import orthogonalised, to_like

MAX_ETA = 0.9  # these four: Kaldi, natural-gradient-online.cc
NUM_FIRST_CALLS = 10
START_PASSES = 3
MAX_CONDITION = 1e6
NUM_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class NaturalGradientConfig:
    """One preconditioner's settings; as a class Kaldi has these values."""

    rank: Annotated[int, Meta(ge=1)] = 40
    """R, dimension of the low-rank part; at most D - 1 is used"""
    alpha: Annotated[float, Meta(ge=0.0)] = 4.0
    """how much of the mean eigenvalue is added to all of them (2)"""
    num_samples_history: Annotated[float, Meta(gt=0.0)] = 2000.0
    """rows after which an old minibatch counts 1/e (8)"""
    update_period: Annotated[int, Meta(ge=1)] = 1
    """calls per update of the estimate (21)"""
    epsilon: Annotated[float, Meta(gt=0.0)] = 1e-10
    """least value of rho and d (15)"""
    delta: Annotated[float, Meta(gt=0.0)] = 5e-4
    """least value of rho and d, relative to the largest eigenvalue (15)"""


@dataclass(frozen=True)
class FisherState:
    """The estimate F_t of the covariance of a minibatch's rows.

    W_RD  (R, D), X's type and device, no unit: E^1/2 R_t, rows orthogonal
    d_R   (R,) float64 on the CPU, [X]^2, > 0: eigenvalues of F_t above rho
    rho   float, [X]^2, > 0: the eigenvalue of all other directions
    t     calls done; the start passes do not count
    """

    W_RD: Tensor
    d_R: np.ndarray
    rho: float
    t: int = 0

    def e_R(self, alpha: float) -> np.ndarray:
        """Return diag(E), (R,) float64, in (0, 1): (3) and (4)."""
        beta = self.beta(alpha)
        return np.asarray(1.0 / (beta / self.d_R + 1.0))

    def beta(self, alpha: float) -> float:
        """Return the eigenvalue that smoothing gives all other directions (3)."""
        D = self.W_RD.shape[1]
        return float((1 + alpha) * self.rho + alpha * self.d_R.sum() / D)

    def trace(self) -> float:
        """Return tr F_t."""
        return float(self.W_RD.shape[1] * self.rho + self.d_R.sum())


@dataclass(frozen=True)
class Statistics:
    """What an update needs of one minibatch.

    J_RD   H^T X, on X's device
    small  (2 R^2 + 1,) float64 on the CPU: K, L of (11) and ||X||^2, end to end
    N      rows
    event  on a GPU: recorded after the copy to `small`; None: it is complete
    """

    J_RD: Tensor
    small: Tensor
    N: int
    event: Any = None


def effective_rank(rank: int, D: int) -> int:
    """Return the rank that is used for rows of dimension D; 0: identity.

    >>> effective_rank(40, 12), effective_rank(40, 100), effective_rank(3, 1)
    (11, 40, 0)
    """
    return min(rank, D - 1)


def start_state(R: int, config: NaturalGradientConfig, X_ND: Tensor) -> FisherState:
    """Return the state before any minibatch (20), with type and device of `X_ND`."""
    D = X_ND.shape[1]
    R_0 = np.zeros((R, D))
    for r in range(R):
        R_0[r, r::R] = 1.0
        R_0[r, r] = 1.1
    R_0 /= np.sqrt((R_0**2).sum(1, keepdims=True))
    state = FisherState(
        X_ND.new_zeros(0, D), np.full(R, config.epsilon), config.epsilon
    )
    W = np.sqrt(state.e_R(config.alpha))[:, None] * R_0
    return replace(state, W_RD=torch.from_numpy(W).to(X_ND))


def apply(W_RD: Tensor, X_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return X_hat (N, D) and H (N, R) (5)."""
    H_NR = X_ND @ W_RD.t()
    return torch.addmm(X_ND, H_NR, W_RD, alpha=-1.0), H_NR


def norm_ratio(norm: Tensor, norm_hat: Tensor) -> Tensor:
    """Return the scale (6), 0-d; 1 where `norm` is 0."""
    return torch.where(norm > 0, norm / norm_hat, 1.0)


def statistics(J_RD: Tensor, L_RR: Tensor, squares: Tensor, N: int) -> Statistics:
    """Return what `update` needs of a minibatch; on a GPU the copy is under way.

    Args: H^T X; H^T H; ||X||^2, 0-d; rows of X.
    """
    parts = [J_RD @ J_RD.t(), L_RR, squares]  # (11)
    small = torch.cat([part.reshape(-1).double() for part in parts])
    if not small.is_cuda:
        return Statistics(J_RD, small, N)
    host = torch.empty(small.shape, dtype=small.dtype, pin_memory=True)
    host.copy_(small, non_blocking=True)
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(small.device))
    return Statistics(J_RD, host, N, event)


@dataclass(frozen=True)
class Solution:
    """What an update makes of the small matrices; all float64 on the CPU.

    d_R, rho  of the new state
    e_R       diag(E) of the new state, (3) and (4)
    A_RR      of (16)
    q_R       what W is multiplied by in (9), over a
    in_doubt  whether orthogonality must be looked at
    """

    d_R: np.ndarray
    rho: float
    e_R: np.ndarray
    A_RR: np.ndarray
    q_R: np.ndarray
    in_doubt: bool


def update(
    state: FisherState, found: Statistics, config: NaturalGradientConfig
) -> FisherState:
    """Return the state after a minibatch; `t` is left as it is.

    The input state is not changed. Not finite numbers: the same state comes back.
    """
    return updated(state, found, solve(state, found, config))


def solve(
    state: FisherState, found: Statistics, config: NaturalGradientConfig
) -> Solution | None:
    """Return the part of an update that needs only small matrices; numpy's work.

    None: the numbers are not finite.
    """
    if found.event is not None:
        found.event.synchronize()
    R, D = state.W_RD.shape
    numbers = found.small.numpy()
    if not np.isfinite(numbers).all():
        return None
    K, L = numbers[: R * R].reshape(R, R), numbers[R * R : -1].reshape(R, R)
    squares = float(numbers[-1])
    d, rho = state.d_R, state.rho
    e = state.e_R(config.alpha)
    eta = min(MAX_ETA, 1.0 - exp(-found.N / config.num_samples_history))  # (8)
    a = eta / found.N
    q = d + rho
    root_e = np.sqrt(e)
    ee = np.outer(root_e, root_e)
    Z = (  # (10)
        a**2 * K / ee
        + a * (1 - eta) * (L / ee * q + q[:, None] * (L / ee))
        + np.diag((1 - eta) ** 2 * q**2)
    )
    c, U, in_doubt = decompose(Z, least=((1 - eta) * rho) ** 2)
    root_c = np.sqrt(c)
    trace = eta / found.N * squares + (1 - eta) * state.trace()
    rho_new = (trace - root_c.sum()) / (D - R)  # (13)
    d_new = root_c - rho_new  # (14)
    least = max(config.epsilon, config.delta * root_c.max())
    d_new, rho_new = np.maximum(d_new, least), max(rho_new, least)  # (15)
    e_new = replace(state, d_R=d_new, rho=rho_new).e_R(config.alpha)
    A = a * (np.sqrt(e_new) / root_c)[:, None] * U.T / root_e  # (16)
    return Solution(d_new, rho_new, e_new, A, (1 - eta) / a * q, in_doubt)


def updated(
    state: FisherState, found: Statistics, solution: Solution | None
) -> FisherState:
    """Return the state after a minibatch whose small matrices gave `solution`."""
    if solution is None:
        return state
    W = state.W_RD
    B = torch.addcmul(found.J_RD, to_like(solution.q_R[:, None], W), W)  # (9)
    W = to_like(solution.A_RR, W) @ B  # (16)
    if solution.in_doubt:
        W = orthogonalised(W, solution.e_R)
    return FisherState(W, solution.d_R, solution.rho, state.t)


def decompose(Z: np.ndarray, *, least: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return eigenvalues and vectors of Z, and whether orthogonality is in doubt (12).

    Args:
        Z: (R, R) float64; symmetric to rounding.
        least: floor of the eigenvalues.
    """
    size = max(1.0, float(np.trace(Z)))  # Kaldi: keeps the solver in range
    c, U = np.linalg.eigh((Z + Z.T) / (2 * size))
    order = np.argsort(-np.abs(c), kind="stable")
    c, U = c[order] * size, U[:, order]
    in_doubt = bool(c[0] > MAX_CONDITION * c[-1] or (c < least).any())
    return np.maximum(c, least), U, in_doubt


@cache
def threads() -> ThreadPoolExecutor:
    """Return the threads that decompose what comes from GPUs."""
    return ThreadPoolExecutor(NUM_THREADS, "natural-gradient")


class NaturalGradient:
    """A preconditioner of rows of one kind, such as a layer's inputs.

    An update is begun in one call and ended in the next, or when the state is asked
    for. From a GPU its small matrices travel to the CPU meanwhile, a thread decomposes
    them there, and nothing waits.

    Args:
        config: its settings.
    """

    def __init__(self, config: NaturalGradientConfig) -> None:
        self.config = config
        self._state: FisherState | None = None
        self._pending: tuple[Statistics, Future[Solution | None] | None] | None = None
        self.gram: tuple[Tensor, Tensor] | None = None  # W and W W^T, see affine.py

    @property
    def fisher(self) -> FisherState | None:
        """The estimate after the calls so far; None before the first, and if D = 1."""
        self._finish()
        return self._state

    @torch.no_grad()
    def __call__(self, X_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return X_hat (5) and scale (6); learn from X where (21) says so.

        Args:
            X_ND: float32 or float64, any device, the same in all calls; not changed.

        Returns:
            X_hat: (N, D), not yet multiplied by the scale; X itself if D = 1 or N = 0.
            scale: 0-d of X's type and device, >= 1.
        """
        N, D = X_ND.shape
        if D == 1 or N == 0:
            return X_ND, X_ND.new_ones(())
        norm = torch.linalg.vector_norm(X_ND)
        state = self.fisher or self.start(X_ND)
        X_hat, H = apply(state.W_RD, X_ND)
        found = None
        if self.is_due(state):
            found = statistics(H.t() @ X_ND, H.t() @ H, norm.square(), N)
        self.learn(state, found)
        return X_hat, norm_ratio(norm, torch.linalg.vector_norm(X_hat))

    def start(self, X_ND: Tensor) -> FisherState:
        """Return the state in which the first minibatch is preconditioned (20)."""
        N, D = X_ND.shape
        R = effective_rank(self.config.rank, D)
        state, squares = start_state(R, self.config, X_ND), X_ND.square().sum()
        for _ in range(START_PASSES if N > R else 1):
            H = X_ND @ state.W_RD.t()
            found = statistics(H.t() @ X_ND, H.t() @ H, squares, N)
            state = update(state, found, self.config)
        return state

    def is_due(self, state: FisherState) -> bool:
        """Return whether the minibatch that `state` preconditions updates it (21)."""
        late = state.t - NUM_FIRST_CALLS
        return late <= 0 or late % self.config.update_period == 0

    def learn(self, state: FisherState, found: Statistics | None) -> None:
        """End a call that used `state` and, if an update is due, found its input."""
        self._state, self._pending = replace(state, t=state.t + 1), None
        if found is not None and found.event is not None:
            self._pending = found, threads().submit(solve, state, found, self.config)
        elif found is not None:
            self._pending = found, None

    def _finish(self) -> None:
        """End the update that is under way."""
        if self._pending is not None and self._state is not None:
            found, solving = self._pending
            if solving is None:
                self._state = update(self._state, found, self.config)
            else:
                self._state = updated(self._state, found, solving.result())
        self._pending = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: W, d, rho, t; empty before the start."""
        state = self.fisher
        if state is None:
            return {}
        W = state.W_RD.detach().cpu().numpy().copy()
        return {"W": W, "d": state.d_R.copy(), "rho": state.rho, "t": state.t}

    def load_state(self, state: dict[str, Any], device: Any = "cpu") -> None:
        """Take up what `state` returned; W goes to `device`."""
        self._pending = None
        self._state = None
        if state:
            self._state = FisherState(
                torch.as_tensor(state["W"]).to(device, copy=True),
                torch.as_tensor(state["d"], dtype=torch.float64).numpy().copy(),
                float(state["rho"]),
                int(state["t"]),
            )
