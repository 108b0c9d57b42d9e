"""From Kaldi's folders to a frames corpus, utterance by utterance."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpilm.data.cmvn import Cmvn, CmvnMode
from mpilm.data.frames import FrameSummary, FrameWriter
from mpilm.data.hdf5 import ShowProgress, new_hdf5
from mpilm.data.kaldi import Alignments, KaldiFolder
from mpilm.data.kaldi_archives import Archives, Bad, files_of, utterance
from mpilm.errors import DataError
from mpilm.storage.files import require_apart


def prepare_kaldi(
    folders: Mapping[str, Path],
    out: Path,
    *,
    alignments: Sequence[Path] = (),
    num_classes: int | None = None,
    cmvn: CmvnMode = "speaker",
    variance: bool = False,
    context: int = 0,
    shares: Mapping[str, float] | None = None,
    bad: Bad | None = None,
    progress: ShowProgress = lambda done, total: None,
) -> FrameSummary:
    """Write the corpus of some Kaldi folders; memory holds one utterance.

    Args:
        folders: split -> folder.
        alignments: files with labels, see `Alignments`.
        num_classes: C; None: one more than the largest label.
        context: recorded for splicing.
        shares: split -> share of the train folder's utterances, for splits without a
            folder; which ones, a hash of their names decides.
        progress: called with utterances done and their number.

    Raises:
        DataError: one line, with the utterance's name where there is one.
    """
    bad = bad or Bad()
    found = {split: KaldiFolder(path) for split, path in folders.items()}
    read = (folder.files() for folder in found.values())
    require_apart([out], chain(*read, *map(files_of, alignments)))
    labels = Alignments(alignments, bad) if alignments else None
    if num_classes is None:
        if labels is None:
            raise DataError("without --ali, give the number of --classes")
        num_classes = labels.num_classes
    with new_hdf5(out) as file:
        writer = FrameWriter(
            file,
            num_features=_num_features(found, bad),
            num_classes=num_classes,
            context=context,
        )
        works = [
            _Work(split, folder, labels, Cmvn(cmvn, variance=variance), bad)
            for split, folder in found.items()
        ]
        passes = [p for work in works for p in work.passes(writer, shares or {})]
        total = sum(work.folder.size * work.num_passes for work in works)
        done = 0
        for each in passes:
            for _ in each:
                done += 1
                progress(done, total)
        provenance = {
            "command": "prepare kaldi",
            "folders": {split: str(path) for split, path in folders.items()},
            "alignments": [str(path) for path in alignments],
            "cmvn": cmvn,
            "variance": variance,
            "shares": dict(shares or {}),
            "skipped": len(bad.lines),
        }
        return writer.finish(out, provenance)


def _num_features(folders: Mapping[str, KaldiFolder], bad: Bad) -> int:
    """Return the numbers in a frame of the first utterance that can be read."""
    archives = Archives()
    for folder in folders.values():
        for name, place in folder.places():
            with utterance(name, bad):
                features = folder.features(archives, name, place)
                if features.ndim == 2 and features.size:
                    return int(features.shape[1])
    raise DataError("no utterance has features")


class _Work:
    """What is to be done for one folder."""

    def __init__(
        self,
        split: str,
        folder: KaldiFolder,
        labels: Alignments | None,
        cmvn: Cmvn,
        bad: Bad,
    ) -> None:
        self.split, self.folder, self.cmvn, self.bad = split, folder, cmvn, bad
        self.labels = labels
        if split == "train" and labels is None:
            raise DataError(f"{folder.path}: training data need --ali")
        aligned = labels is not None and any(name in labels for name in folder.names())
        if split != "train" and not aligned:
            self.labels = None  # to be recognised
        self._stats = folder.path / "cmvn.scp"
        if cmvn.mode == "speaker" and not folder.speakers:
            raise DataError(
                f"{folder.path}: has no utt2spk; --cmvn utterance or none needs none"
            )
        self._computes = cmvn.mode == "speaker" and not self._stats.exists()
        self.num_passes = 2 if self._computes else 1

    def passes(
        self, writer: FrameWriter, shares: Mapping[str, float]
    ) -> Iterator[Iterator[None]]:
        """Yield what is to be gone through, one element per utterance."""
        if self._computes:
            yield self._collect(writer)
        elif self.cmvn.mode == "speaker":
            self.cmvn.read(self._stats, self.folder.speakers.values())
        yield self._write(writer, shares if self.split == "train" else {})

    def _collect(self, writer: FrameWriter) -> Iterator[None]:
        """Sum up the statistics of each speaker."""
        for _, speaker, features_TF in self._utterances(writer):
            if features_TF is not None:
                self.cmvn.add(speaker, features_TF)
            yield

    def _write(
        self, writer: FrameWriter, shares: Mapping[str, float]
    ) -> Iterator[None]:
        for name, speaker, features_TF in self._utterances(writer):
            if features_TF is not None:
                with utterance(name, self.bad):
                    writer.append(
                        chosen_split(self.split, name, shares),
                        name,
                        self.cmvn.apply(speaker, features_TF),
                        self.labels.labels(name) if self.labels else None,
                        speaker=speaker,
                        text=self.folder.texts.get(name, ""),
                    )
            yield

    def _utterances(
        self, writer: FrameWriter
    ) -> Iterator[tuple[str, str, NDArray[np.float32] | None]]:
        """Yield name, speaker and checked features; None for what is left out."""
        archives = Archives()
        for name, place in self.folder.places():
            speaker, checked_TF = "", None
            if name not in self.bad.lines:
                with utterance(name, self.bad):
                    speaker = self.folder.speaker(name)
                    features_TF = self.folder.features(archives, name, place)
                    checked_TF = writer.check_features(name, features_TF)
            yield name, speaker, checked_TF
        archives.close()


def chosen_split(split: str, name: str, shares: Mapping[str, float]) -> str:
    """Return where an utterance goes: to its folder's split, or a share to another.

    >>> chosen = [chosen_split("train", f"u{i}", {"valid": 0.1}) for i in range(1000)]
    >>> chosen.count("valid"), chosen.count("train")
    (107, 893)
    """
    place = zlib.crc32(name.encode()) / 2**32
    for other, share in shares.items():
        if place < share:
            return other
        place -= share
    return split
