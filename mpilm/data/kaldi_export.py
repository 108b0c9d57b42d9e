"""Scores of an acoustic model as an archive that Kaldi's decoders read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from kaldiio.matio import write_array, write_array_ascii
from numpy.typing import NDArray

from mpilm.data.frame_corpus import FrameSplit
from mpilm.errors import DataError
from mpilm.storage.files import reason, sync_folder

Score = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def write_scores(
    score: Score,
    split: FrameSplit,
    out: Path,
    counts_C: NDArray[np.int64],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the scores of a split: `out`, and beside it .scp and .priors.

    Args:
        score: from features (T, F) to scores (T, C), float32.
        counts_C: how often each class stands in the train split.
        progress: called with utterances done and their number.

    Raises:
        DataError: they cannot be written; earlier ones stand.
    """
    with ExitStack() as files:
        archive = files.enter_context(new_file(out))
        listing = files.enter_context(new_file(out.with_suffix(".scp")))
        priors = files.enter_context(new_file(out.with_suffix(".priors")))
        for index, name in enumerate(split.names):
            archive.write(f"{name} ".encode())
            listing.write(f"{name} {out}:{archive.tell()}\n".encode())
            write_array(archive, score(split.features(index)))
            progress(index + 1, len(split))
        write_array_ascii(priors, counts_C / max(1, counts_C.sum()))


@contextmanager
def new_file(path: Path) -> Iterator[IO[Any]]:
    """Yield a new file that takes the place of `path` if the block succeeds.

    Raises:
        DataError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {reason(error)}") from error
