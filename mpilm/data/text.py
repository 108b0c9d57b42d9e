"""Corpora from text files: WikiText, Penn Treebank, or any UTF-8 text.

One pass over the files, in blocks, counts the train text, checks everything, and keeps
the numbers of all words in a file without a name; then numbers become ids, or, where
that is faster (characters), a second pass makes them. Neither holds more than a block
of text; the count holds the distinct words.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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
from mpilm.data.subwords import Subwords, read_tokenizer, train_bpe
from mpilm.data.vocabulary import ENCODERS, Encoder
from mpilm.errors import DataError
from mpilm.storage.files import reason, require_apart

# Share of the train text that stands in for a split that is not given; the shares of
# the Penn Treebank are about 7%. Chosen, not tuned.
HELD_OUT_SHARE = 0.05
# Numbers that become ids at a time. Chosen, not tuned: 1 MiB.
BLOCK_NUMBERS = 1 << 18


def prepare_text(
    train: Paths,
    valid: Paths | None,
    test: Paths | None,
    out: str | Path,
    *,
    vocab: int | None = None,
    level: Literal["word", "char", "subword"] = "word",
    lower: bool = False,
    tokenizer: Path | None = None,
    share: float = HELD_OUT_SHARE,
    progress: ShowProgress | None = None,
) -> PrepareSummary:
    """Write the corpus file `out` from text files; return what it holds.

    Every line ends in `<eos>`, blank lines too. At level "word", words are what white
    space separates, as in the distributed WikiText and Penn Treebank files. At level
    "char", every character is a token, the line end being `<eos>`. A text whose lines
    end in a literal `<eos>` gives the same words as one without; its characters are
    not the same, which is a warning. Level "subword": see subwords.py.

    Args:
        train: a file, several, or a folder; a folder that holds the files of a corpus
            as distributed (`wiki.train.tokens`, `wiki.valid.tokens`, ...) gives all
            splits.
        valid, test: the same; None: taken from the end of the train text.
        out: the HDF5 file to write; its folder is made if need be.
        vocab: keep that many most frequent words, `<unk>` and `<eos>` included;
            None: all of the train text. Level "subword": pieces to learn.
        tokenizer: level "subword": a tokenizer.json; None: one is learned.
        share: of the train text that goes to each split that is None, 0 to 0.5.
        progress: called with bytes done and in all, counted over both passes.

    Raises:
        DataError: a file is missing, empty, not UTF-8, or `out` cannot be written; or
            options that do not go together.
    """
    levels = (*ENCODERS, Subwords.level)
    if level not in levels:
        raise DataError(f"level: {level!r} is not one of {', '.join(levels)}")
    is_subword = level == Subwords.level
    if tokenizer and not is_subword:
        raise DataError(f"tokenizer: goes with level subword, not {level}")
    if is_subword and (vocab is None) == (tokenizer is None):
        raise DataError(
            "level subword: either vocab, the pieces to learn, or a tokenizer.json"
        )
    if not 0.0 < share < 0.5:
        raise DataError(f"share: {share} is not between 0 and 0.5")
    out = Path(out)
    parts = plan_parts(train, valid, test, share)
    require_apart([out], (part.source.path for name in SPLITS for part in parts[name]))
    total, done = 2 * count_bytes(parts), 0
    is_learned = is_subword and tokenizer is None
    total += count_bytes({"train": parts["train"]}) if is_learned else 0

    def read(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress:
            progress(done, total)

    encoder: Encoder
    if is_subword:
        made = read_tokenizer(tokenizer) if tokenizer else None
        if made is None:
            texts = read_text(parts["train"], read)
            cased = (text.lower() if lower else text for text in texts)
            made = train_bpe(cased, (vocab or 0) - 1)
        encoder = Subwords(made, lower)
    else:
        encoder = ENCODERS[level](lower)
    num_words: dict[str, int] = {}
    kept = {name: NumbersFile(out) for name in SPLITS if encoder.is_slow}
    for name in SPLITS:
        for text in read_text(parts[name], read, hashing=True):
            if name == "train":
                numbers = encoder.count(text)
            elif encoder.is_slow:
                numbers = encoder.number(text)
            if encoder.is_slow:
                kept[name].append(numbers)
        if isinstance(encoder, Subwords):
            num_words[name], encoder.num_words = encoder.num_words, 0
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
    encoder.choose(None if is_subword else vocab)

    def ids(name: str) -> Iterator[NDArray[np.uint32]]:
        if not encoder.is_slow:
            yield from map(encoder.encode, read_text(parts[name], read))
            return
        share_bytes = sum(part.stop - part.start for part in parts[name])
        for numbers, share_done in kept[name].blocks():
            yield encoder.ids_of(numbers)
            read(int(share_done * share_bytes))

    tokenizer_json = encoder.tokenizer.to_str() if isinstance(encoder, Subwords) else ""
    return write_corpus(
        out,
        encoder,
        ids,
        provenance,
        tokenizer_json=tokenizer_json,
        num_words=num_words,
    )


class NumbersFile:
    """Numbers of tokens, in a file without a name: it goes when the program does.

    Args:
        out: the corpus that is made of them; it lies in the same folder, or in the
            first one above that is there.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        folder = next(path for path in out.absolute().parents if path.is_dir())
        with self._named():
            self._file = TemporaryFile(dir=folder)  # noqa: SIM115

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            problem = f"cannot be written: {reason(error)}"
            raise DataError(f"{self.out} {problem}") from error

    def append(self, numbers: NDArray[np.uint32]) -> None:
        """Write numbers, (n,), behind those that are there."""
        with self._named():
            self._file.write(numbers.data)

    def blocks(self) -> Iterator[tuple[NDArray[np.uint32], float]]:
        """Yield all of them in blocks, each with its share of the whole."""
        with self._named():
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(0)
            while raw := self._file.read(4 * BLOCK_NUMBERS):
                yield np.frombuffer(raw, np.uint32), len(raw) / size


def write_corpus(
    out: Path,
    encoder: Encoder,
    ids: Callable[[str], Iterator[NDArray[np.uint32]]],
    provenance: dict[str, Any],
    *,
    tokenizer_json: str = "",
    num_words: Mapping[str, int] = MappingProxyType({}),
) -> PrepareSummary:
    """Write the blocks of each split, encoded; return what the file holds.

    Args:
        encoder: has counted the train text and chosen its vocabulary.
        ids: split -> its token ids, in blocks.
        tokenizer_json: of level "subword", and
        num_words: split -> its words, see subwords.py.

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
            for block in ids(name):
                writer.append(name, block)
        if tokenizer_json:
            file["tokenizer"] = tokenizer_json
        for name, number in num_words.items():
            file["splits"][name].attrs["num_words"] = number
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
