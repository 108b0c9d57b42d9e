"""What minibatches of frames are drawn from. frame_batches.py has the notation."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpilm.data.batch import Batch
from mpilm.data.frame_corpus import FrameSplit


class FrameBatch(NamedTuple):
    """A `Batch` of whole utterances.

    lengths  frames of each of the B utterances; what follows in inputs is padding
    """

    inputs: NDArray[np.float32]
    targets: NDArray[np.int64]
    num_samples: int
    start: bool
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """How a model looks at an utterance.

    context  frames on either side spliced to the input, c
    steps    T, frames of a sub-sequence; 0: single frames
    whole    evaluate whole utterances, though training cuts them (T > 0)
    """

    context: int = 0
    steps: int = 0
    whole: bool = True

    @property
    def item_frames(self) -> int:
        """Frames of an item."""
        return self.steps or 1

    def count(self, split: FrameSplit) -> NDArray[np.int64]:
        """Return the number of items in each utterance, (U,)."""
        if not self.steps:
            return split.labelled_U
        return np.where(split.labelled_U > 0, -(-split.lengths_U // self.steps), 0)

    def items(self, labels_T: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the first frame of each item of an utterance."""
        if not self.steps:
            return np.flatnonzero(labels_T >= 0)
        return np.arange(0, len(labels_T), self.steps)


class Block:
    """Utterances in memory, and the items that minibatches are made of.

    starts_N      first frame of each item in the memory
    low_N, high_N  the item's utterance: frames low to high - 1
    """

    def __init__(self, view: View, num_features: int) -> None:
        self.view = view
        self._features: list[NDArray[np.float32]] = [
            np.zeros((0, num_features), np.float32)
        ]
        self._labels: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
        self._items: list[NDArray[np.int64]] = [np.zeros((3, 0), np.int64)]
        self._size = 0

    def add(
        self,
        features_TF: NDArray[np.float32],
        labels_T: NDArray[np.int32],
        items: NDArray[np.int64],
    ) -> None:
        """Take in an utterance and those of its items that are wanted."""
        low, high = self._size, self._size + len(features_TF)
        bounds = np.broadcast_to([[low], [high]], (2, len(items)))
        self._items.append(np.concatenate([low + items[None], bounds]))
        self._features.append(features_TF)
        self._labels.append(labels_T)
        self._size = high

    def close(self, random: np.random.Generator | None = None) -> Block:
        """Return self, complete; in random order, if there is one."""
        self.features = np.concatenate(self._features)
        self.labels = np.concatenate(self._labels).astype(np.int64)
        starts, low, high = np.concatenate(self._items, axis=1)
        order = np.arange(len(starts))
        if random is not None:
            order = random.permutation(len(starts))
        self.starts_N, self.low_N, self.high_N = starts[order], low[order], high[order]
        return self

    def batch(self, first: int, last: int, steps: int) -> Batch:
        """Return items first to last - 1, each with `steps` frames, as a minibatch.

        Beyond the end of an utterance its last frame stands again, without a target.
        All places count as samples, so that ranks in step have equally many.
        """
        low_B, high_B = self.low_N[first:last], self.high_N[first:last]
        place_TB = self.starts_N[first:last] + np.arange(steps)[:, None]
        targets_TB = self.labels[np.minimum(place_TB, high_B - 1)]
        targets_TB[place_TB >= high_B] = -1
        inputs_TBF = splice(self.features, place_TB, low_B, high_B, self.view.context)
        return Batch(inputs_TBF, targets_TB, targets_TB.size, True)


def splice(
    features_NF: NDArray[np.float32],
    place_TB: NDArray[np.int64],
    low_B: NDArray[np.int64],
    high_B: NDArray[np.int64],
    context: int,
) -> NDArray[np.float32]:
    """Return frames with `context` frames on either side, (T, B, (2 c + 1) F).

    >>> one_to_four = np.arange(1.0, 5.0, dtype=np.float32)[:, None]
    >>> splice(one_to_four, np.array([[0, 2]]), np.array([0]), np.array([4]), 1)[0]
    array([[1., 1., 2.],
           [2., 3., 4.]], dtype=float32)
    """
    around_TBW = place_TB[..., None] + np.arange(-context, context + 1)
    around_TBW = np.clip(around_TBW, low_B[:, None], high_B[:, None] - 1)
    spliced = features_NF[around_TBW]
    return spliced.reshape(*place_TB.shape, -1)


def partition(lengths_U: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the rank of each utterance, (U,): longest first, to the least loaded.

    >>> partition(np.array([2, 9, 4, 3, 7]), 2)
    array([1, 0, 1, 0, 1])
    """
    ranks_U = np.zeros(len(lengths_U), np.int64)
    loads = [(0, rank) for rank in range(size)]
    for utterance in np.argsort(-lengths_U, kind="stable"):
        load, rank = heapq.heappop(loads)
        ranks_U[utterance] = rank
        heapq.heappush(loads, (load + int(lengths_U[utterance]), rank))
    return ranks_U


class Order:
    """The items of some utterances in a random order of utterances, read in blocks."""

    def __init__(
        self, split: FrameSplit, view: View, utterances: NDArray[np.int64], seed: int
    ) -> None:
        self.split, self.view = split, view
        self._utterances, self._seed = utterances, seed
        self._items = view.count(split)[utterances]
        self.num_items = int(self._items.sum())
        self._drawn = -1

    def _draw(self, epoch: int) -> None:
        if self._drawn == epoch:
            return
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._utterances))
        self._order = self._utterances[order]
        self._ends = np.cumsum(self._items[order])
        self._drawn = epoch

    def block(self, epoch: int, first: int, last: int) -> Block:
        """Return items first to last - 1 of an epoch, shuffled."""
        self._draw(epoch)
        block = Block(self.view, self.split.num_features)
        index = int(np.searchsorted(self._ends, first, side="right"))
        begin = int(self._ends[index - 1]) if index else 0
        while begin < last:
            utterance = int(self._order[index])
            labels_T = self.split.labels(utterance)
            items = self.view.items(labels_T)
            wanted = items[max(0, first - begin) : last - begin]
            block.add(self.split.features(utterance), labels_T, wanted)
            begin, index = int(self._ends[index]), index + 1
        # 1 + first: numpy takes a 0 at the end for nothing, and [seed, epoch] is drawn
        return block.close(np.random.default_rng([self._seed, epoch, 1 + first]))
