"""Scores of frames by a trained acoustic model.

    b(c) = ln p(c | frames) - kappa ln p(c)

p(c) are the shares of the classes in the train split of the model (add-one), kappa is
the prior scale: by Bayes' rule with kappa = 1, b(c) is ln p(frames | c) up to what all
classes have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.frame_corpus import FrameCorpus, FrameSplit
from mpilm.data.frame_evaluation import assemble, frames_of
from mpilm.errors import DataError
from mpilm.run import TrainedModel


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
        counts_C = model.counts + 1.0
        self._log_priors_C = prior_scale * np.log(counts_C / counts_C.sum())
        self._view = model.view
        self._learner: Any = model.learner(device)
        self._learner.model.eval()
        self._streams = model.config.train.eval_streams

    def groups(self, split: FrameSplit) -> list[list[int]]:
        """Return which utterances are scored together: of similar length."""
        streams = self._streams if self._view.steps and self._view.whole else 1
        order = np.argsort(-split.lengths_U, kind="stable").tolist()
        return [order[i : i + streams] for i in range(0, len(order), streams)]

    def __call__(
        self, features: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float64]]:
        """Return b for the frames of some utterances, (T, C) each.

        They are one of `groups`: several only where the model sees whole utterances.
        """
        labels = [np.full(len(f), -1, np.int32) for f in features]
        found = self._log_posteriors(assemble(self._view, features, labels))
        if len(features) == 1:
            parts = [frames_of(self._view, len(features[0]), found)]
        else:
            parts = [found[: len(f), b] for b, f in enumerate(features)]
        return [part - self._log_priors_C for part in parts]

    def _log_posteriors(self, batch: Any) -> NDArray[np.float64]:
        import torch

        device = self._learner.device
        tensors = {
            key: torch.from_numpy(value).to(device)
            for key, value in batch._asdict().items()
            if isinstance(value, np.ndarray)
        }
        posteriors = self._learner.model.log_posteriors(batch._replace(**tensors))
        return posteriors.cpu().numpy().astype(np.float64)
