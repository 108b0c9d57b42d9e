"""Counting text, choosing its vocabulary, and turning it into token ids.

`Words` and `Characters` do the same for their level: `count` blocks of the train text,
`choose` the vocabulary, then `encode` blocks of any split. Every line ends in `<eos>`.

Both work on whole blocks inside the interpreter's C code (str.split, Counter.update,
map over a dictionary's lookup, numpy): docs/data.md has the measured rates.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpilm.data.hdf5 import EOS, UNK
from mpilm.errors import DataError

EOS_AND_END = re.compile(rf"{EOS}[^\S\n]*\n")


class Encoder(ABC):
    """Text to token ids at one level.

    level        "word" or "char"
    vocabulary   the words (or characters), most frequent first, after `choose`
    counts       (V,) int64, how often each stands in the text that was counted
    num_spelled  lines so far whose end is spelled `<eos>`, character by character
    """

    level: ClassVar[str]

    def __init__(self, lower: bool = False) -> None:
        self.lower = lower
        self.vocabulary: list[str] = []
        self.counts: NDArray[np.int64] = np.zeros(0, np.int64)
        self.num_spelled = 0

    @abstractmethod
    def count(self, text: str) -> None:
        """Count a block of train text."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.uint32]:
        """Return the token ids of a block, (n,)."""

    @abstractmethod
    def _counted(self) -> dict[str, int]:
        """Return word -> count, `<unk>` and `<eos>` among them if they were seen."""

    def choose(self, limit: int | None, least: int = 1) -> None:
        """Take the most frequent words that were counted.

        Ids follow the frequency in the train text after the replacement of rare words
        by `<unk>`; equal frequencies are ordered by the word itself.

        Args:
            limit: words to take, `<unk>` and `<eos>` always among them; None: all.
            least: leave out words that were counted less often.
        """
        if limit is not None and limit < 3:
            raise DataError(f"vocab: {limit} words are too few; 3 is the least")
        counted = self._counted()
        special = {UNK: counted.pop(UNK, 0), EOS: counted.pop(EOS, 0)}
        ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
        kept = [item for item in ranked if item[1] >= least]
        kept = kept if limit is None else kept[: limit - 2]
        special[UNK] += sum(counted.values()) - sum(count for _, count in kept)
        chosen = sorted([*kept, *special.items()], key=lambda item: (-item[1], item[0]))
        self.vocabulary = [word for word, _ in chosen]
        self.counts = np.array([count for _, count in chosen], np.int64)

    def normal(self, text: str) -> str:
        """Return the block in the case that the vocabulary is in."""
        return text.lower() if self.lower else text


class _Ids(dict[str, int]):
    """Word -> id; the id of `<unk>` for every other word."""

    def __missing__(self, word: str) -> int:
        return self[UNK]


class Words(Encoder):
    """Words are what white space separates; a line end is the word `<eos>`.

    A literal `<eos>` at the end of a line is that line end, not one more.
    """

    level = "word"

    def __init__(self, lower: bool = False) -> None:
        super().__init__(lower)
        self._seen: Counter[str] = Counter()
        self._ids = _Ids()

    def _split(self, text: str) -> list[str]:
        text = self.normal(text)
        if EOS in text:
            text = EOS_AND_END.sub("\n", text)
        return text.replace("\n", f" {EOS} ").split()

    def count(self, text: str) -> None:
        self._seen.update(self._split(text))

    def _counted(self) -> dict[str, int]:
        counted, self._seen = self._seen, Counter()
        return counted

    def choose(self, limit: int | None, least: int = 1) -> None:
        super().choose(limit, least)
        self._ids = _Ids((word, index) for index, word in enumerate(self.vocabulary))

    def encode(self, text: str) -> NDArray[np.uint32]:
        words = self._split(text)
        return np.fromiter(map(self._ids.__getitem__, words), np.uint32, len(words))


class Characters(Encoder):
    """Characters are Unicode code points; a line end is the character `<eos>`."""

    level = "char"
    _num_codes = 0x110000

    def __init__(self, lower: bool = False) -> None:
        super().__init__(lower)
        self._seen = np.zeros(self._num_codes, np.int64)
        self._ids: NDArray[np.uint32] = np.zeros(0, np.uint32)

    def _codes(self, text: str) -> NDArray[Any]:
        text = self.normal(text).replace("\r\n", "\n")
        return np.frombuffer(text.encode("utf-32-le"), "<u4")

    def count(self, text: str) -> None:
        if EOS in text:
            self.num_spelled += len(EOS_AND_END.findall(text))
        counts = np.bincount(self._codes(text))
        self._seen[: len(counts)] += counts

    def _counted(self) -> dict[str, int]:
        codes = np.flatnonzero(self._seen)
        counted = {chr(code): int(self._seen[code]) for code in codes.tolist()}
        counted[EOS] = counted.pop("\n", 0)
        return counted

    def choose(self, limit: int | None, least: int = 1) -> None:
        super().choose(limit, least)
        self._ids = np.full(self._num_codes, self.vocabulary.index(UNK), np.uint32)
        for index, character in enumerate(self.vocabulary):
            if len(character) == 1:
                self._ids[ord(character)] = index
        self._ids[ord("\n")] = self.vocabulary.index(EOS)

    def encode(self, text: str) -> NDArray[np.uint32]:
        return self._ids[self._codes(text)]


ENCODERS: dict[str, type[Encoder]] = {
    encoder.level: encoder for encoder in (Words, Characters)
}
