"""Scores of frames by a trained acoustic model, for the Viterbi algorithm.

    b(c) = ln p(c | frame) - kappa ln p(c)

kappa, the prior scale, is 1 by Bayes' rule (see mpilm/speech/scores.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpilm.data.frame_corpus import FrameCorpus
from mpilm.errors import DataError
from mpilm.speech.scores import Scorer, log_priors

if TYPE_CHECKING:
    from mpilm.train.run import TrainedModel


def require_fit(model: TrainedModel, corpus: FrameCorpus) -> None:
    """Raise unless a model can score the frames of a corpus.

    Raises:
        DataError: one line with both.
    """
    if corpus.fingerprint == model.fingerprint:
        return
    have, want = corpus.num_features, model.require("features")
    what = "classes are not the ones"
    if have != want:
        what = f"frames have {have} features, not the {want}"
    raise DataError(f"{corpus.path}: its {what} that {model.path} was trained with")


class ModelScores:
    """A trained model that scores utterances.

    Args:
        model: an acoustic model.
        prior_scale: kappa.
        device: "cpu", "cuda:0", ...
    """

    def __init__(
        self, model: TrainedModel, *, prior_scale: float = 1.0, device: str = "cpu"
    ) -> None:
        self._log_priors_C = prior_scale * log_priors(model.counts).astype(np.float64)
        self._scorer = Scorer(model, device, priors=False)

    def __call__(self, features_TF: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return b for the frames of an utterance, (T, C)."""
        found: NDArray[np.float64] = self._scorer(features_TF) - self._log_priors_C
        return found
