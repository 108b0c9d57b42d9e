"""Normalisation of features as Kaldi's compute-cmvn-stats and apply-cmvn do it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mpilm.data.kaldi_archives import Archives
from mpilm.data.lists import read_list
from mpilm.errors import DataError

CmvnMode = Literal["speaker", "utterance", "none"]

SMALLEST_VARIANCE = 1e-20  # as in Kaldi's apply-cmvn


class Cmvn:
    """Mean (and variance) normalisation: x <- (x - mean) [/ sqrt(variance)].

    Statistics are Kaldi's: (2, F+1), sums and count, sums of squares.

    Args:
        mode: over what the statistics are taken.
        variance: whether the variance is made 1, too.
    """

    def __init__(self, mode: CmvnMode, *, variance: bool = False) -> None:
        self.mode, self.variance = mode, variance
        self._stats: dict[str, NDArray[np.float64]] = {}

    def read(self, path: Path, keys: Iterable[str]) -> None:
        """Take the statistics of these speakers from a list of places.

        Raises:
            DataError: it cannot be read, or a speaker is missing.
        """
        places, archives = dict(read_list(path, of_paths=True)), Archives()
        for key in sorted(set(keys)):
            if key not in places:
                raise DataError(f"{path}: has no speaker {key}")
            stats = archives.read(places[key], path).astype(np.float64)
            if stats.ndim != 2 or len(stats) != 2 or stats[0, -1] <= 0:
                raise DataError(f"{path}: speaker {key} has no CMVN statistics")
            self._stats[key] = stats
        archives.close()

    def add(self, key: str, features_TF: NDArray[np.float32]) -> None:
        """Count in the frames of an utterance of a speaker."""
        stats = cmvn_statistics(features_TF)
        self._stats[key] = self._stats[key] + stats if key in self._stats else stats

    def apply(self, key: str, features_TF: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the features of an utterance of a speaker, normalised.

        Raises:
            DataError: the statistics have another number of features.
        """
        if self.mode == "none":
            return features_TF
        stats = (
            self._stats[key] if self.mode == "speaker" else cmvn_statistics(features_TF)
        )
        if stats.shape[1] != features_TF.shape[1] + 1:
            raise DataError(
                f"CMVN statistics of {stats.shape[1] - 1} features,"
                f" the utterance has {features_TF.shape[1]}"
            )
        count = stats[0, -1]
        mean_F = stats[0, :-1] / count
        centred = features_TF - mean_F
        if self.variance:
            variance_F = stats[1, :-1] / count - mean_F**2
            centred /= np.sqrt(np.maximum(variance_F, SMALLEST_VARIANCE))
        return centred.astype(np.float32)


def cmvn_statistics(features_TF: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return Kaldi's CMVN statistics, (2, F+1).

    >>> cmvn_statistics(np.array([[1.0, 2.0], [3.0, 5.0]], np.float32)).tolist()
    [[4.0, 7.0, 2.0], [10.0, 29.0, 0.0]]
    """
    x = features_TF.astype(np.float64)
    sums = np.append(x.sum(axis=0), len(x))
    return np.stack([sums, np.append((x**2).sum(axis=0), 0.0)])
