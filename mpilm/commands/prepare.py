"""`mpilm prepare text`, `docs` and `synthetic`: corpora in HDF5."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from mpilm.data.hdf5 import PrepareSummary, ShowProgress
from mpilm.errors import DataError

Paths = tuple[Path, ...]


def text(
    *,
    train: Paths,
    out: Path,
    valid: Paths = (),
    test: Paths = (),
    vocab: int | None = None,
    level: Literal["word", "char", "subword"] = "word",
    lower: bool = False,
    tokenizer: Path | None = None,
) -> None:
    """Make a corpus of UTF-8 text: WikiText, Penn Treebank, or any other.

    Words are what white space separates; every line ends in <eos>. The text is read
    in blocks, so it may be larger than the memory.

    Args:
        train: files, or the folder of a corpus as it is distributed
        out: HDF5 file to write
        valid: files; if none, taken from the end of the train text
        test: files; if none, taken from the end of the train text
        vocab: keep the most frequent words only, <unk> and <eos> included; level
            subword: pieces to learn
        level: what a token is; subword: pieces of words, by the library tokenizers
        lower: lower-case the text
        tokenizer: level subword: a tokenizer.json, in the place of one that is learned
    """
    from mpilm.data.text import prepare_text

    with progress_bar() as progress:
        summary = prepare_text(
            train,
            valid or None,
            test or None,
            out,
            vocab=positive("--vocab", vocab),
            level=level,
            lower=lower,
            tokenizer=tokenizer,
            progress=progress,
        )
    print_summary(summary)


def docs(*, out: Path = Path("data/docs.h5"), vocab: int = 10_000) -> None:
    """Make a corpus of English from the documentation that every Python carries.

    Args:
        out: HDF5 file to write
        vocab: keep the most frequent words only, <unk> and <eos> included
    """
    from mpilm.data.docs import prepare_docs

    with progress_bar() as progress:
        summary = prepare_docs(out, vocab=positive("--vocab", vocab), progress=progress)
    print_summary(summary)


def synthetic(
    *,
    out: Path,
    vocab: int = 1000,
    tokens: int = 1_000_000,
    seed: int = 1,
    order: int = 1,
    branching: int | None = None,
) -> None:
    """Make a corpus of a random language whose entropy rate is known.

    No model can get below the perplexity floor that is printed.

    Args:
        out: HDF5 file to write
        vocab: words of the language
        tokens: length of the train split; valid and test have 1/20 of it each
        seed: of the language and the text
        order: words that the next one depends on
        branching: words that can follow; fewer: a lower floor
    """
    from mpilm.data.synthetic import prepare_synthetic

    with progress_bar() as progress:
        summary = prepare_synthetic(
            out,
            vocab=vocab,
            tokens=tokens,
            seed=seed,
            order=order,
            branching=branching,
            progress=progress,
        )
    print_summary(summary)


def positive(option: str, value: int | None) -> int | None:
    """Return `value`.

    Raises:
        DataError: it is less than 1.
    """
    if value is not None and value < 1:
        raise DataError(f"{option} {value}: must be 1 or more")
    return value


@contextmanager
def progress_bar() -> Iterator[ShowProgress]:
    """Show a bar on a terminal, elsewhere a line every few seconds, on stderr.

    Yields what to call with counts.
    """
    from rich.console import Console
    from rich.progress import Progress

    from mpilm.train.screen import PLAIN_EVERY_S

    console = Console(stderr=True)
    shown_s = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal shown_s
        now_s = time.monotonic()
        if now_s - shown_s >= PLAIN_EVERY_S and total:
            shown_s = now_s
            print(f"preparing: {done / total:.0%}", file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield say
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_summary(summary: PrepareSummary) -> None:
    """Print what was written."""
    what = {"word": "words", "char": "characters"}.get(summary.level, "pieces")
    print(f"{summary.path}: vocabulary of {summary.vocabulary:,} {what}")
    for split, num_tokens in summary.tokens.items():
        unknown = summary.unknown[split]
        print(f"  {split:<6}{num_tokens:>13,} tokens, {unknown:.2%} of them <unk>")
    if summary.floor is not None:
        print(f"  perplexity floor {summary.floor:.4f}")
