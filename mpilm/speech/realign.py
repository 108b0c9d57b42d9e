"""A frames corpus with new labels: the best path of each text by a trained model."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.frames import FrameCorpus, FrameSplit, FrameSummary, FrameWriter
from mpilm.data.hdf5 import ShowProgress, new_hdf5
from mpilm.data.lists import split_words
from mpilm.errors import DataError
from mpilm.speech.align import Aligner
from mpilm.speech.hmm import WordHmms
from mpilm.speech.scorer import ModelScores
from mpilm.world.base import IN_PLACE, World

BLOCK = 64  # utterances of a rank between two exchanges; chosen, not tuned
# utterance -> its labels, or what is wrong with it
Aligned = dict[int, "NDArray[np.int64] | str"]


def realign(
    corpus: FrameCorpus,
    scores: ModelScores,
    out: Path,
    world: World,
    *,
    skip_bad: bool = False,
    provenance: dict[str, Any] | None = None,
    progress: ShowProgress | None = None,
) -> tuple[FrameSummary | None, list[str]]:
    """Write a corpus of the same features; return what it holds, and what was bad.

    The ranks share the work, block by block; rank 0 writes (others return None). The
    durations of the states are fitted to the new alignment.

    Raises:
        DataError: an utterance that cannot be aligned, named; `out` cannot be written.

    Communicates: collective, an allgather of the labels for every block, blocking.
    """
    hmms = WordHmms.from_json(corpus.hmm)
    aligner = Aligner(hmms)
    problems: list[str] = []
    total = sum(len(corpus.split(name)) for name in corpus.splits)
    done = 0
    with ExitStack() as stack:
        writer: FrameWriter | None = None
        with world.all_or_none():
            if world.rank == 0:
                writer = FrameWriter(
                    stack.enter_context(new_hdf5(out)),
                    num_features=corpus.num_features,
                    num_classes=corpus.num_classes,
                    classes=corpus.classes,
                    context=corpus.context,
                )
        for name in corpus.splits:
            split = corpus.split(name)
            for block in blocks(split, world.size):
                with world.all_or_none():
                    own = align_block(
                        split, block[world.rank :: world.size], aligner, scores
                    )
                everyone: Aligned = {}
                for part in world.comm.allgather(own):
                    everyone |= part
                with world.all_or_none():
                    for utterance in block:
                        found = everyone[utterance]
                        if isinstance(found, str):
                            if not skip_bad:
                                raise DataError(found)
                            problems.append(found)
                        elif writer:
                            copy(writer, split, utterance, found)
                done += len(block)
                if progress:
                    progress(done, total)
        for counts_C in (aligner.stays_C, aligner.visits_C):
            world.comm.Allreduce(IN_PLACE, counts_C)
        fitted = aligner.fitted()
        summary = None
        with world.all_or_none():
            if writer:
                facts = {"command": "align", "skipped": len(problems)}
                facts |= {"problems": problems[:20], "before": corpus.provenance}
                summary = writer.finish(
                    out, facts | (provenance or {}), hmm=fitted.to_json()
                )
                stack.close()
    return summary, problems


def blocks(split: FrameSplit, size: int) -> list[list[int]]:
    """Return the utterances of a split in order, some for each rank at a time."""
    step = BLOCK * size
    whole = list(range(len(split)))
    return [whole[i : i + step] for i in range(0, len(whole), step)]


def align_block(
    split: FrameSplit, utterances: list[int], aligner: Aligner, scores: ModelScores
) -> Aligned:
    """Return new labels of some utterances."""
    found: Aligned = {}
    for utterance in utterances:
        name, words = split.names[utterance], split_words(split.texts[utterance])
        scores_TC = scores(split.features(utterance))
        try:
            found[utterance] = aligner.align(name, words, scores_TC)
        except DataError as error:
            found[utterance] = str(error)
    return found


def copy(
    writer: FrameWriter, split: FrameSplit, utterance: int, labels_T: NDArray[Any]
) -> None:
    """Write an utterance with new labels."""
    old = split.utterance(utterance)
    writer.append(
        split.name,
        old.name,
        old.features_TF,
        labels_T,
        speaker=old.speaker,
        text=old.text,
    )
