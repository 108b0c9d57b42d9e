"""Minibatches from long streams of text: each row goes on where it stopped before.

A split of N tokens has N-1 targets: token i+1 is predicted from token i. `Streams` cuts
them into K*B equal rows, K ranks with B rows each, and moves a window of T over them:

    row 0 (rank 0)  |-- window 0 --|-- window 1 --| ... |
    row 1 (rank 0)  |-- window 0 --|-- window 1 --| ... |
    row 2 (rank 1)  |-- window 0 --|-- window 1 --| ... |
    row 3 (rank 1)  |-- window 0 --|-- window 1 --| ... | tail, dropped

So K ranks with minibatch B see the same data in the same order as one rank with K*B. A
row's last target is the first input of the next row: only the tail is never predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.batch import Batch, Batches
from mpilm.data.counts import counts_of
from mpilm.data.hdf5 import Announcer, origin, read_tokens
from mpilm.errors import DataError
from mpilm.world.base import World

# Tokens of all rows together that are read ahead: 2 or 4 MB a rank, and a read (some
# 16 us, measured, docs/data.md) every hundred steps or so. Chosen, not tuned.
READ_AHEAD_TOKENS = 1 << 20


class RowWindows:
    """Windows of T + 1 tokens of several rows, read ahead in blocks.

    When a block is taken, the system is told to read the next one (`Announcer`).

    starts_B   first token of each row
    targets_B  targets of each row: it holds targets_B + 1 tokens
    """

    def __init__(
        self,
        tokens: Any,
        starts_B: NDArray[np.int64],
        targets_B: NDArray[np.int64],
        steps: int,
    ) -> None:
        self.tokens, self.starts_B, self.targets_B = tokens, starts_B, targets_B
        self.steps = steps
        longest = int(targets_B.max(initial=0))
        self.num_windows = -(-longest // steps)
        ahead = READ_AHEAD_TOKENS // max(1, len(starts_B) * steps)
        self.num_ahead = max(1, min(ahead, self.num_windows))
        self._announcer = Announcer(tokens)
        self._first = 0
        self._block = np.zeros((len(starts_B), 0), tokens.dtype)

    def window(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return copies of inputs and targets of window `index`, (T, B) each.

        Beyond the end of a row they are 0.
        """
        at = (index - self._first) * self.steps
        if at < 0 or at + self.steps >= self._block.shape[1]:
            self._read(index)
            at = 0
        inputs_BT = self._block[:, at : at + self.steps]
        targets_BT = self._block[:, at + 1 : at + 1 + self.steps]
        return (
            inputs_BT.T.astype(np.int64, order="C"),
            targets_BT.T.astype(np.int64, order="C"),
        )

    def _read(self, index: int) -> None:
        num_windows = min(self.num_ahead, self.num_windows - index)
        begin, length = index * self.steps, num_windows * self.steps + 1
        block = np.zeros((len(self.starts_B), length), self.tokens.dtype)
        rows = zip(self.starts_B.tolist(), self.targets_B.tolist(), strict=True)
        for row, (start, num_targets) in enumerate(rows):
            stop = min(begin + length, num_targets + 1)
            if begin < stop:
                block[row, : stop - begin] = read_tokens(
                    self.tokens, start + begin, start + stop
                )
        self._first, self._block = index, block
        self._announce(index + num_windows)

    def _announce(self, index: int) -> None:
        """Let the next block be read beside computing; at the end that is the first."""
        begin = index % self.num_windows * self.steps
        length = self.num_ahead * self.steps + 1
        if self.num_ahead == self.num_windows:
            return  # all of it is here
        rows = zip(self.starts_B.tolist(), self.targets_B.tolist(), strict=True)
        for start, num_targets in rows:
            self._announcer.will_read(
                start + begin, start + min(begin + length, num_targets + 1)
            )


class Streams(Batches):
    """Endless minibatches of one rank: `batch` rows of the split, `steps` at a time.

    tokens       (N,) token ids: an HDF5 dataset or an array
    num_windows  minibatches in an epoch
    num_dropped  targets never visited: the tail that fills no window in all rows

    The carried state is zeroed at the start of every epoch.

    Args:
        world: ranks out of lockstep: they count samples through it; None: in lockstep.

    Raises:
        DataError: the split is too short for so many ranks.
    """

    def __init__(
        self,
        tokens: Any,
        batch: int,
        steps: int,
        rank: int = 0,
        size: int = 1,
        *,
        world: World | None = None,
    ) -> None:
        num_rows = size * batch
        num_targets = len(tokens) - 1
        self.num_windows = num_targets // (num_rows * steps)
        if self.num_windows < 1:
            raise DataError(
                f"{size} ranks x batch {batch} x steps {steps} need at least"
                f" {num_rows * steps + 1} tokens, {origin(tokens)} has {len(tokens)}"
            )
        row_targets = self.num_windows * steps
        self.num_dropped = num_targets - num_rows * row_targets
        geometry = {"rows": num_rows, "steps": steps, "tokens": len(tokens)}
        super().__init__(counts_of(rank, size, world), geometry)
        self._num_tokens, self._steps = len(tokens), steps
        self._passes = 0
        self._window = 0
        rows = np.arange(rank * batch, (rank + 1) * batch, dtype=np.int64)
        self._rows = RowWindows(
            tokens, rows * row_targets, np.full_like(rows, row_targets), steps
        )

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self._passes + self._window / self.num_windows

    def draw(self) -> Batch:
        inputs_TB, targets_TB = self._rows.window(self._window)
        start = self._window == 0
        self._window += 1
        if self._window == self.num_windows:
            self._passes, self._window = self._passes + 1, 0
        return Batch(inputs_TB, targets_TB, targets_TB.size, start)

    def place(self) -> dict[str, Any]:
        return {"passes": self._passes, "window": self._window}

    def go_to(self, place: dict[str, Any]) -> None:
        self._passes, self._window = int(place["passes"]), int(place["window"])

    def resize(self, places: Sequence[Mapping[str, Any]], rank: int, size: int) -> None:
        """Go on at the same share of the epoch, in rows of another length."""
        left = [place for place in places if place]
        place = left[rank % len(left)]
        num_windows = (self._num_tokens - 1) // (int(place["rows"]) * self._steps)
        window = int(place["window"]) * self.num_windows // num_windows
        self._passes, self._window = int(place["passes"]), window


class EvaluationStreams:
    """One rank's part of a split to evaluate: finite, every target exactly once.

    The split is cut into `streams` rows of nearly equal length, whatever the number of
    ranks, and whole rows are dealt over the ranks: what is predicted, and from which
    carried state, is the same at any number of ranks. A rank without a row has no
    minibatch. Where a row has ended, the target is -1 and the input 0.

    num_targets  targets of this rank

    Raises:
        DataError: the split has no target.
    """

    def __init__(
        self, tokens: Any, streams: int, steps: int, rank: int = 0, size: int = 1
    ) -> None:
        total = len(tokens) - 1
        if total < 1:
            raise DataError(f"{origin(tokens)} has no token to predict")
        streams = min(streams, total)
        bounds = np.array([total * row // streams for row in range(streams + 1)])
        first, last = streams * rank // size, streams * (rank + 1) // size
        self._targets_B = np.diff(bounds)[first:last]
        self._rows = RowWindows(tokens, bounds[first:last], self._targets_B, steps)
        self.num_targets = int(self._targets_B.sum())

    def __len__(self) -> int:
        """Number of minibatches."""
        return self._rows.num_windows

    def __iter__(self) -> Iterator[Batch]:
        steps = np.arange(self._rows.steps)[:, None]
        for index in range(len(self)):
            inputs_TB, targets_TB = self._rows.window(index)
            real_TB = index * self._rows.steps + steps < self._targets_B
            inputs_TB[~real_TB] = 0
            targets_TB[~real_TB] = -1
            yield Batch(inputs_TB, targets_TB, int(real_TB.sum()), index == 0)
