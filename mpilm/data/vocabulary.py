"""Counting text, choosing its vocabulary, and turning it into token ids.

`Words` and `Characters` do the same for their level: `count` blocks of the train text,
`choose` the vocabulary, then `encode` blocks of any split. Every line ends in `<eos>`.
A token has a *number* before it has an id: of a word, how many others were seen before
it; of a character, its code point. `ids_of` makes ids of numbers.

All work on whole blocks inside the interpreter's C code (str.split, map over a
dictionary's lookup) and numpy: docs/data.md has the measured rates.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mpilm.data.hdf5 import EOS, UNK
from mpilm.errors import DataError

EOS_AND_END = re.compile(rf"{EOS}[^\S\n]*\n")


class Encoder(ABC):
    """Text to token ids at one level.

    level        "word" or "char"
    is_slow      numbers are better kept than made again
    vocabulary   the words (or characters), most frequent first, after `choose`
    counts       (V,) int64, how often each stands in the text that was counted
    num_spelled  lines so far whose end is spelled `<eos>`, character by character
    """

    level: ClassVar[str]
    is_slow: ClassVar[bool]

    def __init__(self, lower: bool = False) -> None:
        self.lower = lower
        self.vocabulary: list[str] = []
        self.counts: NDArray[np.int64] = np.zeros(0, np.int64)
        self.num_spelled = 0

        self._seen: NDArray[np.int64] = np.zeros(0, np.int64)  # by number
        self._ids: NDArray[np.uint32] = np.zeros(0, np.uint32)  # by number

    @abstractmethod
    def number(self, text: str) -> NDArray[np.uint32]:
        """Return the numbers of the tokens of a block, (n,)."""

    def count(self, text: str) -> NDArray[np.uint32]:
        """Count a block of train text; return its numbers."""
        numbers = self.number(text)
        counts = np.bincount(numbers, minlength=len(self._seen))
        counts[: len(self._seen)] += self._seen
        self._seen = counts
        return numbers

    def ids_of(self, numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return the ids of numbers, `<unk>`'s for those that were not counted."""
        return self._ids[numbers]

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Return the token ids of a block, (n,)."""
        return self.ids_of(self.number(text))

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


class _Numbers(dict[str, int]):
    """Word -> its number; a word that is looked up gets the next one."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


class Words(Encoder):
    """Words are what white space separates; a line end is the word `<eos>`.

    A literal `<eos>` at the end of a line is that line end, not one more.
    """

    level, is_slow = "word", True

    def __init__(self, lower: bool = False) -> None:
        super().__init__(lower)
        self._numbers = _Numbers()

    def _split(self, text: str) -> list[str]:
        text = self.normal(text)
        if EOS in text:
            text = EOS_AND_END.sub("\n", text)
        return text.replace("\n", f" {EOS} ").split()

    def number(self, text: str) -> NDArray[np.uint32]:
        words = self._split(text)
        return np.fromiter(map(self._numbers.__getitem__, words), np.uint32, len(words))

    def ids_of(self, numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
        return self._ids[np.minimum(numbers, len(self._ids) - 1)]  # later: <unk>

    def _counted(self) -> dict[str, int]:
        # words that only other splits have come after those that were counted
        counts = self._seen.tolist()
        pairs = zip(self._numbers, counts, strict=False)
        return {word: count for word, count in pairs if count}

    def choose(self, limit: int | None, least: int = 1) -> None:
        super().choose(limit, least)
        ids = {word: index for index, word in enumerate(self.vocabulary)}
        found = (ids.get(word, ids[UNK]) for word in self._numbers)
        self._ids = np.fromiter((*found, ids[UNK]), np.uint32, len(self._numbers) + 1)


class Characters(Encoder):
    """Characters are Unicode code points; a line end is the character `<eos>`."""

    level, is_slow = "char", False
    _num_codes = 0x110000

    def number(self, text: str) -> NDArray[np.uint32]:
        text = self.normal(text).replace("\r\n", "\n")
        return np.frombuffer(text.encode("utf-32-le"), "<u4")

    def count(self, text: str) -> NDArray[np.uint32]:
        if EOS in text:
            self.num_spelled += len(EOS_AND_END.findall(text))
        return super().count(text)

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


ENCODERS: dict[str, type[Encoder]] = {
    encoder.level: encoder for encoder in (Words, Characters)
}
