"""Utterances to evaluate or to score: each once, whatever the number of ranks.

    framewise (DNN)      utterances one after another, some thousand frames a minibatch
    whole utterances     utterances of similar length side by side, padded at the end
    sub-sequences        as in training: T frames, each from a zero state

Which utterances share a minibatch depends on the corpus alone, and whole minibatches
are dealt over the ranks: so every number of ranks computes the same, to the bit; only
the order in which the sums of minibatches are added up differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.batch import Batch
from mpilm.data.frame_corpus import FrameSplit
from mpilm.data.frame_items import Block, FrameBatch, View
from mpilm.errors import DataError

# Frames of a minibatch of a DNN. Chosen, not tuned.
EVALUATED_FRAMES = 4096


class FrameEvaluation:
    """One rank's part of a split: finite, every labelled frame on exactly one rank.

    Args:
        streams: utterances side by side, for a recurrent model.

    Raises:
        DataError: the split has no label.
    """

    def __init__(
        self, split: FrameSplit, view: View, streams: int, rank: int = 0, size: int = 1
    ) -> None:
        if not split.num_labelled:
            raise DataError(
                f"the {split.name} split of {split.path} has no frame with a label",
                everywhere=True,
            )
        self._split, self._view = split, view
        self._groups = groups(split, view, streams)[rank::size]

    def __len__(self) -> int:
        """Number of minibatches."""
        return len(self._groups)

    def __iter__(self) -> Iterator[Batch | FrameBatch]:
        split = self._split
        for group in self._groups:
            features = [split.features(u) for u in group]
            yield assemble(self._view, features, [split.labels(u) for u in group])


def groups(split: FrameSplit, view: View, streams: int) -> list[list[int]]:
    """Return which utterances are evaluated together; those without a label are not."""
    found: list[list[int]] = []
    if view.steps:
        useful = np.flatnonzero(split.labelled_U)
        order = useful[np.argsort(-split.lengths_U[useful], kind="stable")].tolist()
        return [order[i : i + streams] for i in range(0, len(order), streams)]
    frames = EVALUATED_FRAMES
    for utterance in np.flatnonzero(split.labelled_U).tolist():
        if frames >= EVALUATED_FRAMES:
            found.append([])
            frames = 0
        found[-1].append(utterance)
        frames += int(split.lengths_U[utterance])
    return found


def assemble(
    view: View,
    features: Sequence[NDArray[np.float32]],
    labels: Sequence[NDArray[np.int32]],
) -> Batch | FrameBatch:
    """Return all frames of some utterances as one minibatch, as the model sees them.

    `num_samples` counts the frames that have a label.
    """
    whole = view.steps > 0 and view.whole
    steps = max(map(len, features)) if whole else view.item_frames
    block = Block(view, features[0].shape[1])
    for features_TF, labels_T in zip(features, labels, strict=True):
        block.add(features_TF, labels_T, np.arange(0, len(labels_T), steps))
    block.close()
    inputs, targets, *_ = block.batch(0, len(block.starts_N), steps)
    num_samples = int(np.count_nonzero(targets >= 0))
    if whole:
        lengths = tuple(map(len, features))
        return FrameBatch(inputs, targets, num_samples, True, lengths)
    return Batch(inputs, targets, num_samples, True)


def frames_of(view: View, length: int, outputs_TBC: Any) -> Any:
    """Return the outputs for an utterance that was assembled alone, (length, C)."""
    if view.steps and not view.whole:
        outputs_TBC = outputs_TBC.swapaxes(0, 1)
    return outputs_TBC.reshape(-1, outputs_TBC.shape[-1])[:length]
