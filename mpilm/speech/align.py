"""Alignment: which class of a word HMM each frame belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.errors import DataError
from mpilm.speech.hmm import WordHmms
from mpilm.speech.viterbi import Graph, NoPathError, viterbi

# Of the way from the softest to the loudest frame: what is below, at both ends of an
# utterance, begins as silence. Chosen, not tuned.
SILENCE_LEVEL = 0.2


def require_frames(
    name: str, hmms: WordHmms, words: Sequence[str], num_frames: int
) -> None:
    """Raise unless an utterance has a frame for each state of its words.

    Raises:
        DataError: one line with its name.
    """
    least = len(words) * hmms.num_states
    if not words:
        raise DataError(f"utterance {name}: has no words")
    if num_frames < least:
        raise DataError(
            f"utterance {name}: {num_frames} frames are shorter than the HMM of"
            f" {' '.join(words)!r} ({least} states)"
        )


def flat_start(
    hmms: WordHmms, ids: Sequence[int], loudness_T: NDArray[Any]
) -> NDArray[np.int64]:
    """Return a first alignment, (T,): all states of the words last equally long.

    With silence in the HMMs, the soft frames at both ends are silence, as far as the
    words leave any.

    >>> hmms = WordHmms.new(["a"], num_states=2)
    >>> flat_start(hmms, [0, 0], np.zeros(9)).tolist()
    [0, 0, 0, 1, 1, 0, 0, 1, 1]
    """
    states = hmms.chain(ids)
    num_frames = len(loudness_T)
    begin, end = 0, num_frames
    if hmms.silence_states:
        least, most = float(loudness_T.min()), float(loudness_T.max())
        is_soft_T = loudness_T < least + SILENCE_LEVEL * (most - least)
        loud = np.flatnonzero(~is_soft_T)
        if len(loud) and loud[-1] + 1 - loud[0] >= len(states):
            begin, end = int(loud[0]), int(loud[-1]) + 1
    labels_T = np.empty(num_frames, np.int64)
    labels_T[begin:end] = _spread(states, end - begin)
    if begin:
        labels_T[:begin] = _spread(hmms.silence, begin)
    if end < num_frames:
        labels_T[end:] = _spread(hmms.silence, num_frames - end)
    return labels_T


def _spread(classes: NDArray[np.int64], num_frames: int) -> NDArray[np.int64]:
    """Return the classes in order, each for as many frames as the others."""
    return classes[np.arange(num_frames) * len(classes) // num_frames]


class Aligner:
    """Aligns utterances with their texts, and counts how long the states last.

    hmms      what it aligns with
    stays_C   frames whose next frame is in the same visit of the class
    visits_C  visits of the class
    """

    def __init__(self, hmms: WordHmms) -> None:
        self.hmms = hmms
        self.stays_C = np.zeros(hmms.num_classes, np.int64)
        self.visits_C = np.zeros(hmms.num_classes, np.int64)
        self._graph = lru_cache(maxsize=1024)(self._make_graph)

    def _make_graph(self, words: tuple[str, ...]) -> Graph:
        return self.hmms.align_graph(self.hmms.ids(words))

    def align(
        self, name: str, words: Sequence[str], scores_TC: NDArray[Any]
    ) -> NDArray[np.int64]:
        """Return the class of each frame, (T,), on the best path of the words.

        Args:
            scores_TC: log-likelihood of each class in each frame.

        Raises:
            DataError: one line with the utterance's name: an unknown word, or fewer
                frames than states.
        """
        require_frames(name, self.hmms, words, len(scores_TC))
        try:
            graph = self._graph(tuple(words))
            path = viterbi(graph, scores_TC)
        except NoPathError as error:
            raise DataError(f"utterance {name}: {error}") from None
        except DataError as error:
            raise DataError(f"utterance {name}: {error}") from None
        labels_T = graph.class_S[path.states_T]
        stays_T = path.states_T[1:] == path.states_T[:-1]
        num_classes = self.hmms.num_classes
        self.stays_C += np.bincount(labels_T[1:][stays_T], minlength=num_classes)
        self.visits_C += np.bincount(labels_T[1:][~stays_T], minlength=num_classes)
        self.visits_C[labels_T[0]] += 1
        return labels_T

    def fitted(self) -> WordHmms:
        """Return the HMMs with the durations that the alignments had."""
        return self.hmms.with_stay(self.stays_C, self.visits_C)
