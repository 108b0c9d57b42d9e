"""What a decoder wants of an acoustic model: log-likelihoods up to a constant.

    ln p(frame | class) = ln p(class | frame) - ln p(class) + ln p(frame)        (1)

The last term is the same for all classes of a frame, and left out. p(class) is how
often the class stood in the train split; one that never did is never to be chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mpilm.data.frame_evaluation import assemble, frames_of
from mpilm.errors import DataError

if TYPE_CHECKING:
    from mpilm.train.run import TrainedModel

# As Kaldi's nnet-forward has it for classes without frames: sqrt(FLT_MAX), so that a
# score is far below all others, but sums of scores stay finite.
NEVER = float(np.sqrt(np.finfo(np.float32).max))


def log_priors(counts_C: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return ln p(class), (C,); NEVER for classes without a frame.

    >>> log_priors(np.array([1, 3])).round(3).tolist()
    [-1.3860000371932983, -0.2879999876022339]

    Raises:
        DataError: there are no frames at all.
    """
    total = counts_C.sum()
    if not total:
        raise DataError("the model's train split had no labels: there are no priors")
    with np.errstate(divide="ignore"):
        priors_C = np.log(counts_C / total)
    return np.where(counts_C > 0, priors_C, NEVER).astype(np.float32)


class Scorer:
    """A trained acoustic model: features of an utterance in, scores of classes out.

    model  where it was read from

    Args:
        device: "cpu", "cuda:0", ...; None: a GPU if there is one
        priors: whether to subtract the logarithm of the priors (1); else the scores are
            log-posteriors.
    """

    def __init__(
        self, model: TrainedModel, device: str | None = None, *, priors: bool = True
    ) -> None:
        import torch

        self.model, self._view = model, model.view
        has_gpu = torch.cuda.is_available()
        self._learner = model.learner(device or ("cuda" if has_gpu else "cpu"))
        self._learner.model.eval()
        self._priors_C = log_priors(model.counts) if priors else np.float32(0.0)

    def __call__(self, features_TF: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scores of an utterance, (T, C).

        Raises:
            DataError: the frames are not those that the model was trained with.
        """
        import torch

        expected, found = self.model.require("features"), features_TF.shape[1]
        if found != expected:
            raise DataError(
                f"{found} features in a frame, the model {self.model.path} was trained"
                f" with {expected}"
            )
        no_labels = np.full(len(features_TF), -1, np.int32)
        batch = assemble(self._view, [features_TF], [no_labels])
        inputs = torch.from_numpy(batch.inputs).to(self._learner.device)
        network: torch.nn.Module = self._learner.model
        outputs = network.log_posteriors(batch._replace(inputs=inputs))  # type: ignore[operator,arg-type]
        scores = frames_of(self._view, len(features_TF), outputs.cpu().numpy())
        return np.ascontiguousarray(scores - self._priors_C)
