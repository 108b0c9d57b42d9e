"""How the recordings of a run were prepared, for new ones that its model shall hear."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpilm.data.frame_corpus import FrameCorpus
from mpilm.errors import DataError
from mpilm.speech.features import FeatureConfig
from mpilm.speech.hmm import WordHmms
from mpilm.train.folder import RunFolder


@dataclass(frozen=True)
class Preparation:
    """What must be the same for a model to understand other recordings.

    features  how a frame is made
    rate      samples/s
    hmms      the words, their states and silence
    rounds    of aligning
    """

    features: FeatureConfig
    rate: int
    hmms: WordHmms
    rounds: int


def prepared_like(run: Path) -> Preparation:
    """Return how the corpus of a run was prepared.

    Raises:
        CheckpointError: no run.
        DataError: its corpus is not there, or no work of `prepare wav`.
    """
    corpus = Path(RunFolder(run).require().read_config().data.corpus)
    with FrameCorpus.open(corpus) as frames:
        provenance, hmm = frames.provenance, frames.hmm
    while "options" not in provenance and "before" in provenance:
        provenance = provenance["before"]  # aligned anew
    try:
        options = provenance["options"]
        features = FeatureConfig(**options["features"])
        rate, rounds = int(options["rate"]), int(options["rounds"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{corpus}: was not made by prepare wav") from None
    try:
        hmms = WordHmms.from_json(hmm)
    except DataError as error:
        raise DataError(f"{corpus}: {error}") from None
    return Preparation(features, rate, hmms, rounds)
