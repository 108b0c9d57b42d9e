"""Word error rate, by jiwer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpilm.speech import require


@dataclass(frozen=True)
class WordErrors:
    """How recognised texts differ from what was said.

        WER = (substitutions + deletions + insertions) / words

    words       in what was said
    utterances  texts compared
    wrong       texts with an error
    """

    substitutions: int
    deletions: int
    insertions: int
    words: int
    utterances: int
    wrong: int

    @property
    def errors(self) -> int:
        """Substitutions, deletions and insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """WER; may be above 1."""
        return self.errors / self.words

    def __str__(self) -> str:
        return (
            f"WER {self.rate:.2%} ({self.errors} of {self.words:,} words:"
            f" {self.substitutions} substituted, {self.deletions} deleted,"
            f" {self.insertions} inserted; {self.wrong} of {self.utterances:,}"
            " utterances wrong)"
        )


def count_errors(
    said: Sequence[Sequence[str]], recognised: Sequence[Sequence[str]]
) -> WordErrors:
    """Return the word errors of texts, as Kaldi's compute-wer counts them.

    Where nothing was said, all that is recognised is inserted.

    >>> found = count_errors([["a", "b", "c"], []], [["a", "c", "d"], ["e"]])
    >>> found.errors, found.words, found.insertions
    (3, 3, 1)
    """
    jiwer = require("jiwer", "jiwer")
    pairs = list(zip(said, recognised, strict=True))
    insertions = sum(len(words) for reference, words in pairs if not reference)
    substitutions = deletions = 0
    spoken = [(reference, words) for reference, words in pairs if reference]
    if spoken:
        ids: dict[str, str] = {}  # jiwer gets numbers: it would split and strip words

        def numbers(words: Sequence[str]) -> str:
            return " ".join(ids.setdefault(word, str(len(ids))) for word in words)

        texts = [list(map(numbers, side)) for side in zip(*spoken, strict=True)]
        found = jiwer.process_words(*texts)
        substitutions, deletions = found.substitutions, found.deletions
        insertions += found.insertions
    return WordErrors(
        substitutions=substitutions,
        deletions=deletions,
        insertions=insertions,
        words=sum(len(reference) for reference, _ in pairs),
        utterances=len(pairs),
        wrong=sum(list(reference) != list(words) for reference, words in pairs),
    )
