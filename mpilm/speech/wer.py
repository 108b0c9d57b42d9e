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
    """Return the word errors of texts, each with at least one word said.

    >>> count_errors([["a", "b", "c"]], [["a", "c", "d"]]).rate
    0.6666666666666666
    """
    jiwer = require("jiwer", "jiwer")
    pairs = list(zip(said, recognised, strict=True))
    found = jiwer.process_words(
        [" ".join(reference) for reference, _ in pairs],
        [" ".join(hypothesis) for _, hypothesis in pairs],
    )
    return WordErrors(
        substitutions=found.substitutions,
        deletions=found.deletions,
        insertions=found.insertions,
        words=sum(len(reference) for reference, _ in pairs),
        utterances=len(pairs),
        wrong=sum(list(reference) != list(h) for reference, h in pairs),
    )
