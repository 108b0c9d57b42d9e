"""Words from scores: Viterbi over a loop of all words, and the word error rate.

A word more costs the insertion penalty. `tune` finds it on another split: that with the
fewest errors among `PENALTIES`; of several, the middle one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mpilm.data.frame_corpus import FrameSplit
from mpilm.data.hdf5 import ShowProgress
from mpilm.data.lists import split_words
from mpilm.errors import DataError
from mpilm.speech.hmm import WordHmms
from mpilm.speech.scorer import ModelScores
from mpilm.speech.viterbi import NoPathError, viterbi
from mpilm.speech.wer import WordErrors, count_errors
from mpilm.world.base import World

# nats; chosen, not tuned
PENALTIES = tuple(range(-10, 61, 5))


@dataclass(frozen=True)
class Decoded:
    """What was recognised in a split with one penalty.

    penalty     of a word, nats
    recognised  name of the utterance -> words, in the order of the split
    errors      None: the split has no texts to compare with
    """

    split: str
    penalty: float
    recognised: dict[str, list[str]]
    errors: WordErrors | None

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        found: dict[str, Any] = {"split": self.split, "penalty": self.penalty}
        if self.errors is not None:
            found |= {"wer": self.errors.rate} | asdict(self.errors)
        return found


def decode(
    split: FrameSplit,
    scores: ModelScores,
    hmms: WordHmms,
    world: World,
    *,
    penalties: Sequence[float] = (0.0,),
    progress: ShowProgress | None = None,
) -> list[Decoded]:
    """Return what is recognised in a split, for each penalty.

    The ranks share the utterances; what comes out does not depend on how many they are.
    An utterance too short for any word has none.

    Communicates: collective, one allgather of the words, blocking.
    """
    graphs = [hmms.loop_graph(penalty) for penalty in penalties]
    own: dict[int, list[list[str]]] = {}
    with world.all_or_none():
        order = np.argsort(-split.lengths_U, kind="stable")  # shares the work evenly
        share = order[world.rank :: world.size].tolist()
        for done, utterance in enumerate(share, start=1):
            scores_TC = scores(split.features(utterance))
            own[utterance] = [recognise(hmms, graph, scores_TC) for graph in graphs]
            if progress:
                progress(done, len(share))
    everyone: dict[int, list[list[str]]] = {}
    for part in world.comm.allgather(own):
        everyone |= part
    ordered = [everyone[u] for u in range(len(split))]
    return [
        _decoded(split, penalty, [words[i] for words in ordered])
        for i, penalty in enumerate(penalties)
    ]


def recognise(hmms: WordHmms, graph: Any, scores_TC: Any) -> list[str]:
    """Return the words of the best path through a loop of words."""
    try:
        return hmms.words_of(graph, viterbi(graph, scores_TC))
    except NoPathError:
        return []


def _decoded(split: FrameSplit, penalty: float, recognised: list[list[str]]) -> Decoded:
    said = [split_words(text) for text in split.texts]
    errors = count_errors(said, recognised) if any(said) else None
    names = dict(zip(split.names, recognised, strict=True))
    return Decoded(split.name, penalty, names, errors)


def tune(
    split: FrameSplit, scores: ModelScores, hmms: WordHmms, world: World
) -> Decoded:
    """Return the decoding of a split with the best of `PENALTIES`.

    Raises:
        DataError: the split has no texts.

    Communicates: as `decode`.
    """
    tried = decode(split, scores, hmms, world, penalties=PENALTIES)
    counts = [result.errors.errors for result in tried if result.errors]
    if not counts:
        raise DataError(
            f"the {split.name} split of {split.path} has no texts", everywhere=True
        )
    best = [i for i, count in enumerate(counts) if count == min(counts)]
    return tried[best[len(best) // 2]]
