"""A frames corpus, open for reading; frames.py has the layout of the file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpilm.data.hdf5 import SPLITS, open_corpus
from mpilm.errors import DataError
from mpilm.storage.files import reason

TEXTS = ("names", "speakers", "texts")


@dataclass(frozen=True)
class Utterance:
    """One utterance.

    name         unique in its split
    features_TF  float32
    labels_T     int32, class of each frame; -1: none
    speaker      who speaks; "": not known
    text         what is said; "": not known
    """

    name: str
    features_TF: NDArray[np.float32]
    labels_T: NDArray[np.int32]
    speaker: str
    text: str


def frames_fingerprint(
    num_features: int, num_classes: int, names: Sequence[str]
) -> str:
    """Return a hash of what a model's inputs and outputs mean."""
    meaning = json.dumps([num_features, num_classes, list(names)])
    return hashlib.sha256(meaning.encode()).hexdigest()


class FrameSplit:
    """A split: features and labels are read by slices, never whole.

    path, name   where it is
    lengths_U    frames of each utterance
    labelled_U   frames of each utterance that have a label
    """

    def __init__(self, group: h5py.Group, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._offsets: NDArray[np.int64] = group["offsets"][:]
        self.lengths_U: NDArray[np.int64] = np.diff(self._offsets)
        self.labelled_U: NDArray[np.int64] = group["labelled"][:]
        self._features, self._labels = group["features"], group["labels"]
        self._text = {key: group[key] for key in TEXTS}
        ends_well = self._offsets[0] == 0 and self._offsets[-1] == len(self._features)
        if (
            not ends_well
            or (self.lengths_U < 1).any()
            or len(self._features) != len(self._labels)
            or any(len(c) != len(self) for c in (self.labelled_U, *self._text.values()))
            or self._features.dtype != np.float32
            or self._labels.dtype != np.int32
        ):
            raise ValueError(f"split {name} is not as it was written")

    def __len__(self) -> int:
        """Number of utterances, U."""
        return len(self.lengths_U)

    def __iter__(self) -> Iterator[Utterance]:
        return map(self.utterance, range(len(self)))

    @property
    def num_features(self) -> int:
        """Numbers in a frame, F."""
        return int(self._features.shape[1])

    @property
    def num_frames(self) -> int:
        """Number of frames, N."""
        return int(self._offsets[-1])

    @property
    def num_labelled(self) -> int:
        """Number of frames that have a label."""
        return int(self.labelled_U.sum())

    @cached_property
    def names(self) -> list[str]:
        """The name of each utterance."""
        return self._texts("names")

    @cached_property
    def speakers(self) -> list[str]:
        """The speaker of each utterance; "": not known."""
        return self._texts("speakers")

    @cached_property
    def texts(self) -> list[str]:
        """What is said in each utterance; "": not known."""
        return self._texts("texts")

    def _texts(self, key: str) -> list[str]:
        texts: list[str] = self._read(self._text[key].asstr(), slice(None)).tolist()
        return texts

    def features(self, utterance: int) -> NDArray[np.float32]:
        """Return the features of an utterance, (T, F)."""
        return self._read(self._features, self._where(utterance))

    def labels(self, utterance: int) -> NDArray[np.int32]:
        """Return the labels of an utterance, (T,); -1: none."""
        return self._read(self._labels, self._where(utterance))

    def utterance(self, utterance: int) -> Utterance:
        """Return an utterance by its number.

        Raises:
            DataError: the file cannot be read there, or its checksum is wrong.
        """
        return Utterance(
            self.names[utterance],
            self.features(utterance),
            self.labels(utterance),
            self.speakers[utterance],
            self.texts[utterance],
        )

    def _where(self, utterance: int) -> slice:
        return slice(*self._offsets[utterance : utterance + 2].tolist())

    def _read(self, dataset: Any, where: slice) -> NDArray[Any]:
        try:
            return dataset[where]
        except Exception as error:  # as in `open_corpus`
            line = f"the {self.name} split of {self.path} is damaged: {reason(error)}"
            raise DataError(line) from error


class FrameCorpus:
    """A frames corpus, open for reading.

    path          the file
    kind          "frames"
    fingerprint   hash of F, C and the names of the classes
    num_features  numbers in a frame, F
    num_classes   C
    context       frames on either side that a DNN splices, unless told otherwise
    classes       names of the classes, or none
    counts        (C,) int64, how often each class stands in train
    provenance    where the data came from and how they were treated
    hmm           topology of the word HMMs, or None
    splits        their names
    """

    kind = "frames"

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file = file
        self.path = path
        self.fingerprint = str(file.attrs["fingerprint"])
        self.num_features = int(file.attrs["num_features"])
        self.num_classes = int(file.attrs["num_classes"])
        self.context = int(file.attrs["context"])
        self.counts: NDArray[np.int64] = file["classes/counts"][:]
        self.provenance: dict[str, Any] = json.loads(file["provenance"].asstr()[()])
        self.hmm: dict[str, Any] | None = None
        if "hmm" in file:
            self.hmm = json.loads(file["hmm"].asstr()[()])
        self.classes: list[str] = []
        if "classes/names" in file:
            self.classes = file["classes/names"].asstr()[:].tolist()
        meaning = (self.num_features, self.num_classes, self.classes)
        if frames_fingerprint(*meaning) != self.fingerprint:
            raise ValueError("its classes do not match its fingerprint")
        self.splits: tuple[str, ...] = tuple(
            sorted(file["splits"], key=lambda name: (*SPLITS, name).index(name))
        )
        self._splits = {
            name: FrameSplit(file["splits"][name], path, name) for name in self.splits
        }

    @classmethod
    def open(cls, path: str | Path) -> FrameCorpus:
        """Return the corpus at `path`, checked.

        Raises:
            DataError: missing, empty, truncated, damaged or not a frames corpus.
        """
        return open_corpus(path, cls, "frames")

    def split(self, name: str) -> FrameSplit:
        """Return a split.

        Raises:
            DataError: there is no such split.
        """
        if name not in self._splits:
            known = ", ".join(self.splits)
            raise DataError(f"{self.path} has no split {name!r}; it has {known}")
        return self._splits[name]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> FrameCorpus:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
