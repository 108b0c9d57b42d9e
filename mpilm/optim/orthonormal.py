"""Rows made orthonormal again: (17) to (19) of natural_gradient.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_SKEW, MAX_INVERSE = 1e-3, 100.0  # Kaldi, natural-gradient-online.cc


def orthogonalised(W_RD: Tensor, e_R: np.ndarray) -> Tensor:
    """Return W with the rows of E^-1/2 W orthonormal, or W itself: (17) to (19)."""
    root_e = np.sqrt(e_R)
    ee = np.outer(root_e, root_e)
    O = (W_RD @ W_RD.t()).double().cpu().numpy() / ee  # noqa: E741
    if np.abs(O - np.eye(len(O))).max() <= MAX_SKEW:
        return W_RD
    try:
        inverse = np.linalg.inv(np.linalg.cholesky(O))
    except np.linalg.LinAlgError:
        inverse = None
    if inverse is not None and inverse.max() < MAX_INVERSE:
        M = np.tril(inverse) * root_e[:, None] / root_e  # (18)
        return to_like(M, W_RD) @ W_RD
    rows = gram_schmidt(W_RD.double().cpu().numpy())
    return to_like(root_e[:, None] * rows, W_RD)  # (19)


def gram_schmidt(rows: np.ndarray) -> np.ndarray:
    """Return orthonormal rows that span what `rows` do; R <= D.

    A row is repeated while a pass leaves 1% of its squared norm or less; a zero row
    becomes a random one.

    >>> gram_schmidt(np.array([[2.0, 0.0], [2.0, 1.0]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    random = np.random.default_rng(0)
    rows = rows.copy()
    for index, row in enumerate(rows):
        while True:
            before = row @ row
            if before == 0.0 or not np.isfinite(before):
                row[:] = random.standard_normal(len(row))
                continue
            for other in rows[:index]:
                row -= (row @ other) * other
            after = row @ row
            if after > 0.01 * before:
                break
        row /= np.sqrt(after)
    return rows


def to_like(array: np.ndarray, like: Tensor) -> Tensor:
    """Return float64 numbers of the CPU with the type and device of `like`."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(like.dtype)
    if like.is_cuda:
        return tensor.pin_memory().to(like.device, non_blocking=True)
    return tensor
