"""Scores of an acoustic model as an archive that Kaldi's decoders read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from kaldiio.matio import write_array, write_array_ascii
from numpy.typing import NDArray

from mpilm.data.frame_corpus import FrameSplit
from mpilm.data.hdf5 import ShowProgress
from mpilm.storage.files import new_output

Score = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def written_beside(out: Path) -> list[Path]:
    """Return the files that `write_scores` writes: archive, list, priors."""
    return [out, out.with_suffix(".scp"), out.with_suffix(".priors")]


def write_scores(
    score: Score,
    split: FrameSplit,
    out: Path,
    counts_C: NDArray[np.int64],
    progress: ShowProgress = lambda done, total: None,
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
        archive, listing, priors = (
            files.enter_context(files.enter_context(new_output(path)).open("wb"))
            for path in written_beside(out)
        )
        for index, name in enumerate(split.names):
            archive.write(f"{name} ".encode())
            place = f"{out}:{archive.tell()}"
            listing.write(f"{name} {place}\n".encode("utf-8", "surrogateescape"))
            write_array(archive, score(split.features(index)))
            progress(index + 1, len(split))
        write_array_ascii(priors, counts_C / max(1, counts_C.sum()))
