"""Corpora from text files: WikiText, Penn Treebank, or any UTF-8 text.

Two passes over the files, both in blocks: one counts the train text and checks
everything, the other writes token ids. Neither holds more than a block of text; the
count holds the distinct words.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mpilm.data.hdf5 import (
    EOS,
    SPLITS,
    UNK,
    CorpusWriter,
    PrepareSummary,
    ShowProgress,
    new_hdf5,
)
from mpilm.data.sources import Part, Paths, count_bytes, plan_parts, read_text
from mpilm.data.vocabulary import ENCODERS, Encoder
from mpilm.errors import DataError
from mpilm.storage.files import require_apart

# Share of the train text that stands in for a split that is not given; the shares of
# the Penn Treebank are about 7%. Chosen, not tuned.
HELD_OUT_SHARE = 0.05


def prepare_text(
    train: Paths,
    valid: Paths | None,
    test: Paths | None,
    out: str | Path,
    *,
    vocab: int | None = None,
    level: Literal["word", "char"] = "word",
    lower: bool = False,
    share: float = HELD_OUT_SHARE,
    progress: ShowProgress | None = None,
) -> PrepareSummary:
    """Write the corpus file `out` from text files; return what it holds.

    Every line ends in `<eos>`, blank lines too. At level "word", words are what white
    space separates, as in the distributed WikiText and Penn Treebank files. At level
    "char", every character is a token, the line end being `<eos>`. A text whose lines
    end in a literal `<eos>` gives the same words as one without; its characters are
    not the same, which is a warning.

    Args:
        train: a file, several, or a folder; a folder that holds the files of a corpus
            as distributed (`wiki.train.tokens`, `wiki.valid.tokens`, ...) gives all
            splits.
        valid, test: the same; None: taken from the end of the train text.
        out: the HDF5 file to write; its folder is made if need be.
        vocab: keep that many most frequent words, `<unk>` and `<eos>` included;
            None: all of the train text.
        share: of the train text that goes to each split that is None, 0 to 0.5.
        progress: called with bytes done and in all, counted over both passes.

    Raises:
        DataError: a file is missing, empty, not UTF-8, or `out` cannot be written.
    """
    if level not in ENCODERS:
        raise DataError(f"level: {level!r} is not one of {', '.join(ENCODERS)}")
    if not 0.0 < share < 0.5:
        raise DataError(f"share: {share} is not between 0 and 0.5")
    out = Path(out)
    parts = plan_parts(train, valid, test, share)
    require_apart([out], (part.source.path for name in SPLITS for part in parts[name]))
    total, done = 2 * count_bytes(parts), 0

    def read(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress:
            progress(done, total)

    encoder = ENCODERS[level](lower)
    for name in SPLITS:
        for text in read_text(parts[name], read, hashing=True):
            if name == "train":
                encoder.count(text)
    options = {"vocab": vocab, "level": level, "lower": lower, "share": share}
    provenance = {
        "command": "prepare text",
        "options": options,
        "sources": _sources(parts),
    }
    if encoder.num_spelled:
        warnings.warn(
            f"in the train text {encoder.num_spelled:,} line ends are spelled {EOS}: at"
            f" level char these are {len(EOS)} characters each, beside the line end",
            stacklevel=2,
        )
    encoder.choose(vocab)
    return write_corpus(
        out, encoder, lambda name: read_text(parts[name], read), provenance
    )


def write_corpus(
    out: Path,
    encoder: Encoder,
    blocks: Callable[[str], Iterator[str]],
    provenance: dict[str, Any],
) -> PrepareSummary:
    """Write the blocks of each split, encoded; return what the file holds.

    Args:
        encoder: has counted the train text and chosen its vocabulary.
        blocks: split -> its text, in blocks of whole words.

    Raises:
        DataError: nothing but white space, or the text changed since it was counted.
    """
    words = {"words": int(encoder.counts.sum()), "lines": _lines(encoder)}
    words["words"] -= words["lines"]
    if words["words"] == 0:
        raise DataError(f"{_named(provenance)}: the train text has no words")
    with new_hdf5(out) as file:
        writer = CorpusWriter(
            file,
            level=encoder.level,
            vocabulary=encoder.vocabulary,
            counts=encoder.counts,
        )
        for name in SPLITS:
            for text in blocks(name):
                writer.append(name, encoder.encode(text))
        summary = writer.finish(out, provenance | {"train": words})
        if summary.tokens["train"] != int(encoder.counts.sum()):
            raise DataError(f"{_named(provenance)} changed while it was read")
    return summary


def _lines(encoder: Encoder) -> int:
    return int(encoder.counts[encoder.vocabulary.index(EOS)])


def _named(provenance: dict[str, Any]) -> str:
    return str(provenance["sources"][0]["path"])


def _sources(parts: dict[str, list[Part]]) -> list[dict[str, Any]]:
    """Return which bytes of which file went to which split, with the files' hashes."""
    return [
        {
            "split": name,
            "path": str(part.source.path),
            "bytes": part.source.size,
            "start": part.start,
            "stop": part.stop,
            "sha256": part.source.digest.hexdigest(),
        }
        for name in SPLITS
        for part in parts[name]
    ]


def encode_prompt(prompt: str, vocabulary: Sequence[str], level: str) -> list[int]:
    """Return the ids of a line that begins with `prompt`: `<eos>`, then its tokens.

    A word that is not in the vocabulary is tried in lower case, then is `<unk>`.

    Raises:
        DataError: it is not in the vocabulary, which has no `<unk>`.
    """
    ids = {word: index for index, word in enumerate(vocabulary)}
    begin = [ids[EOS]] if EOS in ids else []
    found = []
    for token in prompt.split() if level == "word" else prompt.replace("\n", ""):
        index = ids.get(token, ids.get(token.lower(), ids.get(UNK)))
        if index is None:
            raise DataError(f"prompt: {token!r} is not in the vocabulary")
        found.append(index)
    return begin + found or [0]


def text_from_ids(ids: Iterable[int], vocabulary: Sequence[str], level: str) -> str:
    """Return the text of token ids; `<eos>` ends a line."""
    glue = " " if level == "word" else ""
    text = glue.join("\n" if vocabulary[i] == EOS else vocabulary[i] for i in ids)
    return text.replace(" \n", "\n").replace("\n ", "\n").strip("\n")
