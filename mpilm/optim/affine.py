"""One affine map of a model: its preconditioned gradient, from its rows.

Equations   those of ng_sgd.py, where the notation stands.
Cheaper     The ones column of x1 is never laid beside x: with W_in = [W_x, w_1],
            H = x W_x^T + w_1,  x_hat = x - H W_x,  ones_hat = 1 - H w_1         (a)
            ||X_hat||^2 = ||X||^2 - 2 tr L + sum_ij L_ij S_ij                    (b)
            with L = H^T H, S = W W^T saves a pass over X_hat. It cancels: where less
            than a tenth of ||X||^2 is left, X_hat is measured itself.
            The derivatives of the sum are N dy: (5) and (6) of natural_gradient.py do
            not see the N, and what is learned is small, so that dy stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mpilm.optim.configs import NgSgdConfig
from mpilm.optim.natural_gradient import (
    NaturalGradient,
    NaturalGradientConfig,
    norm_ratio,
    statistics,
)

MIN_LEFT = 0.1  # (b): float32 keeps 6 digits of what is left


class Hat(NamedTuple):
    """Preconditioned rows.

    rows   (N, D), without the ones column
    ones   (N,), the preconditioned ones column; None: there is none
    scale  0-d
    """

    rows: Tensor
    ones: Tensor | None
    scale: Tensor


def preconditioner(config: NgSgdConfig, rank: int, D: int) -> NaturalGradient:
    """Return one for rows of D values (for inputs: without the ones column)."""
    return NaturalGradient(
        NaturalGradientConfig(
            rank=min(rank, (D + 1) // 2),
            alpha=config.alpha,
            num_samples_history=config.num_samples_history,
            update_period=config.update_period,
        )
    )


def precondition(
    ng: NaturalGradient, X_ND: Tensor, *, ones: bool = False, gain: float = 1.0
) -> Hat:
    """Return `ng` of the rows [X, 1] or gain * X; the result lacks the gain.

    The same numbers, and the same learning, as of `ng(...)` itself, to rounding.
    """
    N, D = X_ND.shape
    one = X_ND.new_ones(())
    if N == 0 or D + ones == 1:
        return Hat(X_ND, one.expand(N) if ones else None, one)
    state = ng.fisher or ng.start(with_ones(X_ND) if ones else X_ND * gain)
    W = state.W_RD
    if ones:
        H = torch.addmm(W[:, -1], X_ND, W[:, :-1].t())  # (a)
        rows = torch.addmm(X_ND, H, W[:, :-1], alpha=-1.0)
        ones_hat = torch.addmv(one.expand(N), H, W[:, -1], alpha=-1.0)
    else:
        H = X_ND @ W.t()
        rows, ones_hat = torch.addmm(X_ND, H, W, alpha=-1.0), None
    hats = [rows] if ones_hat is None else [rows, ones_hat]
    due = ng.is_due(state)
    L = H.t() @ H if due or not H.is_cuda else None
    if L is None or L.is_cuda:
        squares, *parts = squares_of(X_ND, *hats)
        squares, left = squares + N if ones else squares, sum(parts[1:], parts[0])
    else:
        (squares,) = squares_of(X_ND)
        squares = squares + N if ones else squares
        left = squares_left(squares, L, gram(ng, W))
        if not left > MIN_LEFT * squares:
            parts = squares_of(*hats)
            left = sum(parts[1:], parts[0])
    found = None
    if due:
        assert L is not None
        J = H.t() @ X_ND
        J = torch.cat([J, H.sum(0)[:, None]], dim=1) if ones else J
        found = statistics(J * gain**2, L * gain**2, squares * gain**2, N)
    ng.learn(state, found)
    return Hat(rows, ones_hat, norm_ratio(squares.sqrt(), left.sqrt()))


def squares_of(*parts: Tensor) -> list[Tensor]:
    """Return ||part||^2 of each, 0-d.

    With the fewest kernels: on a GPU a call costs more than a pass over the rows.
    """
    return list(torch.stack(torch._foreach_norm(parts)).square().unbind())


def with_ones(X_ND: Tensor) -> Tensor:
    """Return [X, 1]."""
    return torch.cat([X_ND, X_ND.new_ones(len(X_ND), 1)], dim=1)


def gram(ng: NaturalGradient, W_RD: Tensor) -> Tensor:
    """Return S = W W^T of `ng`'s state, computed once for each W."""
    if ng.gram is None or ng.gram[0] is not W_RD:
        ng.gram = (W_RD, W_RD @ W_RD.t())
    return ng.gram[1]


def squares_left(squares: Tensor, L_RR: Tensor, S_RR: Tensor) -> Tensor:
    """Return ||X_hat||^2 by (b), 0-d."""
    taken = 2 * L_RR.diagonal().double().sum() - (L_RR * S_RR).double().sum()
    return (squares.double() - taken).to(squares.dtype)


class AffineMap:
    """One map y = x W^T + b and its two preconditioners.

    name     of the module in the model, or of a part of it
    owned    its parameters: weights first
    sides    "in", "out" -> preconditioner and the dimension of its rows; an embedding
             has no "in"
    rate     returns the learning rate; the optimiser sets it

    Args:
        name: as above.
        owned: as above.
        num_inputs: I; 0: the inputs are ids, each of which is its own direction.
        num_outputs: O.
        has_bias: whether there is a bias, thus a ones column.
        config: ranks and rates.
    """

    def __init__(
        self,
        name: str,
        owned: Sequence[nn.Parameter],
        *,
        num_inputs: int,
        num_outputs: int,
        has_bias: bool,
        config: NgSgdConfig,
    ) -> None:
        I, O = num_inputs, num_outputs  # noqa: E741
        self.name, self.owned, self.config = name, tuple(owned), config
        self.has_bias = has_bias
        self.sides: dict[str, tuple[NaturalGradient, int]] = {}
        if I:
            width = I + has_bias
            self.sides["in"] = preconditioner(config, config.rank_in, I), width
        self.sides["out"] = preconditioner(config, config.rank_out, O), O
        self.rate: Callable[[], float] = lambda: config.lr

    def gradient(self, x_NI: Tensor, dy_NO: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return g_W (O, I) and g_b (O,) or None: (1) to (6).

        Args:
            x_NI: inputs.
            dy_NO: derivatives of the mean loss.
        """
        N = len(x_NI)
        x = precondition(self.sides["in"][0], x_NI, ones=self.has_bias)  # (1)
        dy = precondition(self.sides["out"][0], dy_NO, gain=N)
        norms = row_norms(x.rows, x.ones), row_norms(dy.rows)
        factor = self.factor(N, x.scale * dy.scale, *norms)
        g_b = None if x.ones is None else dy.rows.t() @ (x.ones * factor)
        return product(dy.rows.t(), x.rows, factor), g_b  # (2)

    def row_gradient(self, ids_N: Tensor, dy_NO: Tensor, num_rows: int) -> Tensor:
        """Return g_W (num_rows, O) of an embedding: (1) to (6) with x one-hot.

        Args:
            ids_N: which row each was.
            dy_NO: derivatives of the mean loss.
        """
        N = len(ids_N)
        dy = precondition(self.sides["out"][0], dy_NO, gain=N)
        norms = dy.rows.new_ones(N), row_norms(dy.rows)
        rows = dy.rows * self.factor(N, dy.scale, *norms)
        backward = torch.ops.aten.embedding_dense_backward
        return backward(rows, ids_N, num_rows, -1, False)

    def factor(self, N: int, scale: Tensor, x_norms: Any, dy_norms: Any) -> Tensor:
        """Return what dy_hat^T x_hat is multiplied by, 0-d: (2), (3), (5), (6).

        Args:
            N: rows.
            scale: s_in s_out.
            x_norms: norms of the rows of x1_hat, (N,), or what returns them.
            dy_norms: the same of dy_hat, of the mean loss.
        """
        config = self.config
        result = scale * N if config.summed else scale
        if config.max_change in ("nnet2", "su_chen"):
            x_N, dy_N = (v() if callable(v) else v for v in (x_norms, dy_norms))
            bound = scale * N * (x_N @ dy_N)  # (4)
            if config.max_change == "nnet2":
                bound = bound * self.rate() / (1 if config.summed else N)
            limit = config.max_change_per_sample * N
            result = result * (limit / bound).clamp(max=1.0)  # a bound of 0 gives 1
        return result


def row_norms(rows_ND: Tensor, ones_N: Tensor | None = None) -> Callable[[], Tensor]:
    """Return a call that returns the norms of the rows [rows, ones], (N,)."""

    def norms() -> Tensor:
        norms_N = torch.linalg.vector_norm(rows_ND, dim=1)
        return norms_N if ones_N is None else torch.hypot(norms_N, ones_N)

    return norms


def product(a: Tensor, b: Tensor, factor: Tensor) -> Tensor:
    """Return factor * a b; on a CPU without a pass over the result."""
    if factor.is_cuda:  # its value would have to be waited for
        return (a @ b).mul_(factor)
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0.0, alpha=factor.item(), out=out)
