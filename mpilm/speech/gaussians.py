"""One Gaussian with a diagonal covariance for each class: the first acoustic model.

    log N(x; mu, v) = -1/2 sum_f [ (x_f - mu_f)^2 / v_f + log(2 pi v_f) ]

Alignments by it, from a flat start on, are good enough to train a network with (Viterbi
training, also called segmental k-means).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of the variance of all frames; chosen, not tuned.
VARIANCE_FLOOR = 0.01
# Frames of the whole corpus that each class is thought to have seen besides its own.
PRIOR_FRAMES = 5.0


class Gaussians:
    """Sums over the frames of each class, and the Gaussians that fit them."""

    def __init__(self, num_classes: int, num_features: int) -> None:
        self.count_C = np.zeros(num_classes)
        self.sum_CF = np.zeros((num_classes, num_features))
        self.squares_CF = np.zeros((num_classes, num_features))

    def add(self, features_TF: NDArray[Any], labels_T: NDArray[Any]) -> None:
        """Count the frames of an utterance."""
        wide_TF = features_TF.astype(np.float64)
        one_hot_CT = (labels_T == np.arange(len(self.count_C))[:, None]).astype(float)
        self.count_C += one_hot_CT.sum(axis=1)
        self.sum_CF += one_hot_CT @ wide_TF
        self.squares_CF += one_hot_CT @ np.square(wide_TF)

    def fit(self) -> GaussianScores:
        """Return the Gaussians, drawn a little towards the one of all frames."""
        total = self.count_C.sum()
        mean_F = self.sum_CF.sum(axis=0) / total
        squares_F = self.squares_CF.sum(axis=0) / total
        variance_F = np.maximum(squares_F - np.square(mean_F), 1e-8)
        count_C1 = (self.count_C + PRIOR_FRAMES)[:, None]
        mean_CF = (self.sum_CF + PRIOR_FRAMES * mean_F) / count_C1
        raw_CF = (self.squares_CF + PRIOR_FRAMES * squares_F) / count_C1
        variance_CF = np.maximum(
            raw_CF - np.square(mean_CF), VARIANCE_FLOOR * variance_F
        )
        return GaussianScores(mean_CF, variance_CF)


class GaussianScores:
    """Log-likelihoods of frames.

    >>> one = GaussianScores(np.array([[0.0], [1.0]]), np.ones((2, 1)))
    >>> one(np.array([[1.0]])).round(4).tolist()
    [[-1.4189, -0.9189]]
    """

    def __init__(self, mean_CF: NDArray[Any], variance_CF: NDArray[Any]) -> None:
        precision_CF = 1.0 / variance_CF
        self._quadratic_FC = -0.5 * precision_CF.T
        self._linear_FC = (mean_CF * precision_CF).T
        self._constant_C = -0.5 * (
            np.square(mean_CF) * precision_CF + np.log(2 * np.pi * variance_CF)
        ).sum(axis=1)

    def __call__(self, features_TF: NDArray[Any]) -> NDArray[np.float64]:
        """Return the log-likelihood of each class in each frame, (T, C)."""
        wide_TF = features_TF.astype(np.float64)
        squares_TC = np.square(wide_TF) @ self._quadratic_FC
        return squares_TC + wide_TF @ self._linear_FC + self._constant_C
