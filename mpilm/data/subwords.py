"""Sub-words: byte-pair encoding by the library `tokenizers`, an optional extra.

Source      R. Sennrich, B. Haddow and A. Birch, "Neural Machine Translation of Rare
            Words with Subword Units", ACL 2016; T. Kudo and J. Richardson,
            SentencePiece, EMNLP 2018: the mark before a word.
Tokens      trained here: words are what white space separates, each begins with the
            mark U+2581, and pieces never reach over two words. Of a tokenizer.json:
            whatever it makes of a line, without its special tokens around it.
            A line end is `<eos>`, as at level "word".
Words       w -> words and line ends of a split, as level "word" counts them: what a
            perplexity per word is reckoned by, exp(nll of the split / (w - 1)), so that
            levels can be compared (the first token of a split is never predicted)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.hdf5 import EOS, UNK
from mpilm.data.vocabulary import EOS_AND_END, Encoder
from mpilm.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARK = "\u2581"
LEAST_PIECES = 16


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            f"tokenizers is missing ({error}): pip install 'mpilm[subwords]'"
        ) from None
    return tokenizers


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json.

    Raises:
        DataError: it is none, or the library is missing.
    """
    library = _library()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return tokenizer_of(text, str(path), library)


def tokenizer_of(text: str, origin: str, library: Any = None) -> Tokenizer:
    """Return the tokenizer of the JSON text of one.

    Raises:
        DataError: it is none, or the library is missing.
    """
    library = library or _library()
    try:
        return library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise DataError(
            f"{origin} is no tokenizer.json: {str(error).splitlines()[0]}"
        ) from None


def train_bpe(texts: Iterable[str], num_pieces: int) -> Tokenizer:
    """Return a byte-pair encoding learned from texts.

    Args:
        texts: blocks of text.
        num_pieces: of the vocabulary, `<unk>` included, `<eos>` not.

    Raises:
        DataError: too few pieces, or the library is missing.
    """
    library = _library()
    if num_pieces < LEAST_PIECES:
        raise DataError(
            f"vocab: {num_pieces + 1} pieces are too few; {LEAST_PIECES + 1} is the"
            " least"
        )
    tokenizer = library.Tokenizer(library.models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.WhitespaceSplit(),
            library.pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        ]
    )
    tokenizer.decoder = library.decoders.Metaspace(prepend_scheme="always")
    trainer = library.trainers.BpeTrainer(
        vocab_size=num_pieces, special_tokens=[UNK], show_progress=False
    )

    def lines() -> Iterator[list[str]]:
        for text in texts:
            yield _without_eos(text).split("\n")

    tokenizer.train_from_iterator(lines(), trainer)
    return tokenizer


def _without_eos(text: str) -> str:
    return EOS_AND_END.sub("\n", text) if EOS in text else text


class Subwords(Encoder):
    """Pieces of words; a line end is `<eos>`.

    num_words  w of what was numbered since it was last set to 0
    """

    level, is_slow = "subword", True

    def __init__(self, tokenizer: Tokenizer, lower: bool = False) -> None:
        super().__init__(lower)
        self.tokenizer = tokenizer
        self.num_words = 0
        self._pieces = [
            tokenizer.id_to_token(number) or UNK
            for number in range(tokenizer.get_vocab_size(with_added_tokens=True))
        ]
        self._eos = len(self._pieces)

    def number(self, text: str) -> NDArray[np.uint32]:
        text = _without_eos(self.normal(text))
        self.num_words += len(text.split()) + text.count("\n")
        *lines, rest = text.split("\n")  # rest: of a line that goes on
        found: list[int] = []
        made = self.tokenizer.encode_batch([*lines, rest], add_special_tokens=False)
        for line in made[:-1]:
            found += line.ids
            found.append(self._eos)
        return np.array(found + made[-1].ids, np.uint32)

    def _counted(self) -> dict[str, int]:
        counted: dict[str, int] = {}
        numbers = zip_longest([*self._pieces, EOS], self._seen.tolist(), fillvalue=0)
        for piece, count in numbers:
            counted[str(piece)] = counted.get(str(piece), 0) + int(count)
        return counted

    def choose(self, limit: int | None, least: int = 0) -> None:
        """Take all pieces, those that the train text has not among them.

        They are what other words are made of; as `<unk>` these would be too easy.
        """
        super().choose(limit, least)
        ids = {piece: index for index, piece in enumerate(self.vocabulary)}
        found = [ids.get(piece, ids[UNK]) for piece in [*self._pieces, EOS]]
        self._ids = np.array(found, np.uint32)


def prompt_pieces(
    prompt: str, vocabulary: Sequence[str], tokenizer: Tokenizer
) -> list[int]:
    """Return the ids of a line that begins with `prompt`: `<eos>`, then its pieces."""
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    unknown = ids.get(UNK, 0)
    pieces = tokenizer.encode(prompt, add_special_tokens=False).tokens
    begin = [ids[EOS]] if EOS in ids else []
    return begin + [ids.get(piece, unknown) for piece in pieces] or [0]


def text_of_pieces(
    found: Iterable[int], vocabulary: Sequence[str], tokenizer: Tokenizer
) -> str:
    """Return the text of ids; `<eos>` ends a line."""
    lines: list[list[int]] = [[]]
    for index in found:
        if vocabulary[index] == EOS:
            lines.append([])
        elif (piece := tokenizer.token_to_id(vocabulary[index])) is not None:
            lines[-1].append(piece)
    texts = (tokenizer.decode(line, skip_special_tokens=False) for line in lines)
    return re.sub(r"\n+", "\n", "\n".join(texts)).strip("\n")
