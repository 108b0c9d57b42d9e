"""From wav files to a frames corpus with alignments, in constant memory.

    1  read and check each wav file, join those of a string, compute features; write
       them beside `out` for a while, and sum what normalisation needs
    2  one Gaussian for each class from the flat start; align train by them, fit them
       to that, and so on for some rounds
    3  align everything by the last of them; write `out`

Durations of the states are fitted with the Gaussians.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from mpilm.data.frames import FrameCorpus, FrameSummary, FrameWriter, Utterance
from mpilm.data.hdf5 import ShowProgress, new_hdf5
from mpilm.data.lists import split_words
from mpilm.data.wav import Recording, WavReader
from mpilm.errors import DataError
from mpilm.speech.align import Aligner, flat_start, require_frames
from mpilm.speech.features import FeatureConfig, Normaliser
from mpilm.speech.gaussians import Gaussians
from mpilm.speech.hmm import WordHmms
from mpilm.speech.plan import (
    SplitConfig,
    StringConfig,
    Take,
    choose_words,
    make_strings,
    plan_splits,
    single,
)
from mpilm.storage.files import create_hdf5, reason, require_apart

MOST_LISTED = 20  # bad recordings named in the provenance


@dataclass
class Skipped:
    """Bad utterances: raised at once, or counted where that is allowed."""

    allowed: bool
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def each(self) -> Iterator[None]:
        """Handle one utterance inside the block."""
        try:
            yield
        except DataError as error:
            if not self.allowed:
                raise
            self.problems.append(str(error))


@dataclass(frozen=True)
class WavSummary:
    """What `prepare wav` wrote.

    frames    the corpus
    words     its vocabulary
    rate      samples/s of the recordings
    problems  what was wrong with those left out, a line each
    """

    frames: FrameSummary
    words: tuple[str, ...]
    rate: int
    problems: tuple[str, ...]


def prepare_wav(
    out: Path,
    splits: SplitConfig,
    *,
    strings: StringConfig | None = None,
    features: FeatureConfig | None = None,
    words: Sequence[str] = (),
    num_states: int = 8,
    silence_states: int = 0,
    rounds: int = 8,
    rate: int | None = None,
    skip_bad: bool = False,
    progress: ShowProgress | None = None,
) -> WavSummary:
    """Write a frames corpus of recordings; return what it holds.

    Args:
        words: the vocabulary; none: the words of train.
        num_states: of each word's HMM.
        silence_states: of the HMM of silence; 0: none.
        rounds: alignments of train by Gaussians before the last one.
        rate: samples/s that all recordings have; None: as the first.
        skip_bad: leave bad recordings out and count them.
        progress: called with utterances done and in all, passes added up.

    Raises:
        DataError: a bad recording or option, or `out` cannot be written.
    """
    if num_states < 1 or silence_states < 0 or rounds < 0:
        raise DataError("HMMs: one state or more; silence and rounds 0 or more")
    features = features or FeatureConfig()
    recordings = plan_splits(splits)
    read = (recording.path for split in recordings.values() for recording in split)
    require_apart([out], chain(splits.lists(), read))
    strings = strings or StringConfig()
    hmms = WordHmms.new(
        words or choose_words(recordings),
        num_states=num_states,
        silence_states=silence_states,
    )
    making = _Making(hmms, features, WavReader(rate), Skipped(skip_bad), progress)
    sizes = {s: len(found) + strings.count(s) for s, found in recordings.items()}
    making.total = 2 * sum(sizes.values()) + (rounds + 1) * sizes["train"]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            making.extract(recordings, strings, Path(folder) / "features.h5")
            with FrameCorpus.open(Path(folder) / "features.h5") as raw:
                making.train(raw, rounds)
                options = {
                    "splits": asdict(splits),
                    "strings": asdict(strings),
                    "features": features.to_dict(),
                    "rate": making.reader.rate,
                    "rounds": rounds,
                }
                summary = making.write(raw, out, options)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {reason(error)}") from error
    assert making.reader.rate is not None
    problems = tuple(making.skipped.problems)
    return WavSummary(summary, hmms.words, making.reader.rate, problems)


class _Making:
    """A corpus in the making."""

    def __init__(
        self,
        hmms: WordHmms,
        features: FeatureConfig,
        reader: WavReader,
        skipped: Skipped,
        progress: ShowProgress | None,
    ) -> None:
        self.hmms, self.features, self.reader = hmms, features, reader
        self.skipped, self.progress = skipped, progress
        self.normalise = Normaliser(features.cmvn, features.num_features)
        self.total = self.done = 0

    def count(self) -> None:
        """Show that one more utterance is done."""
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total)

    def extract(
        self, splits: dict[str, list[Recording]], strings: StringConfig, path: Path
    ) -> None:
        """Write features as they are, with the flat start as labels.

        Strings are of recordings that are good.
        """
        with create_hdf5(path) as file:
            writer = FrameWriter(
                file,
                num_features=self.features.num_features,
                num_classes=self.hmms.num_classes,
            )
            for split, recordings in splits.items():
                good = []
                for recording in recordings:
                    with self.skipped.each():
                        self.extract_one(single(split, recording), writer)
                        good.append(recording)
                    self.count()
                for take in make_strings(good, split, strings):
                    self.extract_one(take, writer)
                    self.count()
            if not any(writer.counts):
                raise DataError("no utterance of train is left")
            writer.finish(path, {})

    def extract_one(self, take: Take, writer: FrameWriter) -> None:
        """Write the features of one utterance."""
        parts = [self.reader.read(recording) for recording in take.recordings]
        assert self.reader.rate is not None
        found_TF = self.features.extract(
            take.name, np.concatenate(parts), self.reader.rate
        )
        try:
            ids = self.hmms.ids(take.words)
        except DataError as error:
            raise DataError(f"recording {take.name}: {error}") from None
        require_frames(take.name, self.hmms, take.words, len(found_TF))
        labels_T = flat_start(self.hmms, ids, self.features.loudness(found_TF))
        writer.append(
            take.split,
            take.name,
            found_TF,
            labels_T,
            speaker=take.speaker,
            text=" ".join(take.words),
        )
        self.normalise.see((take.split, take.speaker), found_TF)

    def utterances(self, raw: FrameCorpus, split: str) -> Iterator[Utterance]:
        """Yield the utterances of a split, normalised."""
        for utterance in raw.split(split):
            group = (split, utterance.speaker)
            yield Utterance(
                utterance.name,
                self.normalise(group, utterance.features_TF),
                utterance.labels_T,
                utterance.speaker,
                utterance.text,
            )
            self.count()

    def gaussians(self) -> Gaussians:
        return Gaussians(self.hmms.num_classes, self.features.num_features)

    def train(self, raw: FrameCorpus, rounds: int) -> None:
        """Fit Gaussians and durations to train: flat start, then `rounds` rounds."""
        gaussians = self.gaussians()
        for utterance in self.utterances(raw, "train"):
            gaussians.add(utterance.features_TF, utterance.labels_T)
        for _ in range(rounds):
            scores, aligner = gaussians.fit(), Aligner(self.hmms)
            gaussians = self.gaussians()
            for utterance in self.utterances(raw, "train"):
                labels_T = aligner.align(
                    utterance.name,
                    split_words(utterance.text),
                    scores(utterance.features_TF),
                )
                gaussians.add(utterance.features_TF, labels_T)
            self.hmms = aligner.fitted()
        self.scores = gaussians.fit()

    def write(
        self, raw: FrameCorpus, out: Path, options: Mapping[str, object]
    ) -> FrameSummary:
        """Write the corpus, aligned by the Gaussians of `train`."""
        aligner = Aligner(self.hmms)
        with new_hdf5(out) as file:
            writer = FrameWriter(
                file,
                num_features=self.features.num_features,
                num_classes=self.hmms.num_classes,
                classes=self.hmms.class_names(),
            )
            for split in raw.splits:
                for utterance in self.utterances(raw, split):
                    scores_TC = self.scores(utterance.features_TF)
                    labels_T = aligner.align(
                        utterance.name, split_words(utterance.text), scores_TC
                    )
                    writer.append(
                        split,
                        utterance.name,
                        utterance.features_TF,
                        labels_T,
                        speaker=utterance.speaker,
                        text=utterance.text,
                    )
            problems = self.skipped.problems
            provenance = {
                "command": "prepare wav",
                "options": json_ready(options),
                "skipped": len(problems),
                "problems": problems[:MOST_LISTED],
            }
            return writer.finish(out, provenance, hmm=self.hmms.to_json())


def json_ready(value: object) -> object:
    """Return `value` with paths as text, all through it."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return str(value) if isinstance(value, Path) else value
