"""The frames corpus: features and labels of utterances in one HDF5 file.

Layout (docs/formats.md has the table):

    /                      attributes: format, version, kind, fingerprint, context,
                           num_features F, num_classes C
    /classes/counts        (C,) int64      how often each class stands in train
    /classes/names         (C,) text       where the classes have names
    /hmm                   JSON text       word HMMs (mpilm prepare wav)
    /provenance            JSON text
    /splits/NAME/features  (N, F) float32  all utterances end to end, with checksums
    /splits/NAME/labels    (N,) int32      class of each frame; -1: none
    /splits/NAME/offsets   (U+1,) int64    utterance u is offsets[u]:offsets[u+1]
    /splits/NAME/labelled  (U,) int64      frames of the utterance that have a label
    /splits/NAME/names, speakers, texts    (U,) text

A file is written under a temporary name, fsynced and renamed: it is whole or absent.
It is written utterance by utterance, and read by slices; memory stays constant.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpilm.data.frame_corpus import (
    TEXTS,
    FrameCorpus,
    FrameSplit,
    Utterance,
    frames_fingerprint,
)
from mpilm.data.hdf5 import FORMAT, SPLITS, VERSION, library_version
from mpilm.data.lists import is_utf8
from mpilm.errors import DataError

__all__ = ["FrameCorpus", "FrameSplit", "FrameSummary", "FrameWriter", "Utterance"]

TEXT = h5py.string_dtype("utf-8")
NO_LABEL = -1

# Chosen, not tuned: as many bytes as a chunk of the text corpus. HDF5 reads whole
# chunks, and an utterance of 3 s with 40 features has 48 KB.
CHUNK_BYTES = 1 << 16
# Utterances whose names are collected before they are written.
FLUSH_UTTERANCES = 256


@dataclass(frozen=True)
class FrameSummary:
    """What a `prepare` command wrote.

    path        the corpus file
    features    numbers in a frame, F
    classes     C
    utterances  split -> number of utterances
    frames      split -> number of frames
    labelled    split -> number of frames that have a label
    """

    path: Path
    features: int
    classes: int
    utterances: dict[str, int]
    frames: dict[str, int]
    labelled: dict[str, int]


class FrameWriter:
    """Writes a frames corpus utterance by utterance, in constant memory.

        with new_hdf5(path) as file:
            writer = FrameWriter(file, num_features=40, num_classes=120)
            writer.append("train", name, features_TF, labels_T, speaker=..., text=...)
            summary = writer.finish(path, {"command": ...})

    counts  (C,) int64, how often each class stands in train so far

    Args:
        file: an empty HDF5 file, see `mpilm.data.hdf5.new_hdf5`.
        classes: names of the classes, C of them, or none.
        context: frames on either side that a DNN splices to the input, unless its
            configuration says another number.
    """

    def __init__(
        self,
        file: h5py.File,
        *,
        num_features: int,
        num_classes: int,
        classes: Sequence[str] = (),
        context: int = 0,
    ) -> None:
        self.num_features, self.num_classes = num_features, num_classes
        self.counts = np.zeros(num_classes, np.int64)
        self._file = file
        self._splits: dict[str, _SplitWriter] = {}
        file.attrs["format"] = FORMAT
        file.attrs["version"] = VERSION
        file.attrs["kind"] = "frames"
        file.attrs["num_features"] = num_features
        file.attrs["num_classes"] = num_classes
        file.attrs["context"] = context
        file.attrs["fingerprint"] = frames_fingerprint(
            num_features, num_classes, classes
        )
        group = file.create_group("classes")  # made on the way, it would hold a time
        if classes:
            group.create_dataset("names", data=list(classes), dtype=TEXT)

    def append(
        self,
        split: str,
        name: str,
        features_TF: NDArray[Any],
        labels_T: NDArray[Any] | None = None,
        *,
        speaker: str = "",
        text: str = "",
    ) -> None:
        """Write an utterance behind what the split has.

        Raises:
            DataError: one line with its name; nothing of it is written.
        """
        features_TF = self.check_features(name, features_TF)
        labels_T = self.check_labels(name, labels_T, len(features_TF))
        if "\0" in name + speaker + text:
            raise DataError(f"utterance {name!r}: a zero byte in its name or text")
        if not is_utf8(name + speaker + text):
            raise DataError(f"utterance {name!r}: name or text is not UTF-8")
        if split not in self._splits:
            self._splits[split] = _SplitWriter(self._file, split, self.num_features)
        labelled = labels_T[labels_T >= 0]
        self._splits[split].append(
            features_TF, labels_T, len(labelled), (name, speaker, text)
        )
        if split == "train":
            self.counts += np.bincount(labelled, minlength=self.num_classes)

    def check_features(
        self, name: str, features_TF: NDArray[Any]
    ) -> NDArray[np.float32]:
        """Return features as float32.

        Raises:
            DataError: no frames, another number of features, or not finite.
        """
        features_TF = np.asarray(features_TF)
        if features_TF.ndim != 2 or features_TF.dtype.kind not in "fiu":
            raise DataError(f"utterance {name}: features are no matrix of numbers")
        if not len(features_TF):
            raise DataError(f"utterance {name}: has no frames")
        if features_TF.shape[1] != self.num_features:
            raise DataError(
                f"utterance {name}: {features_TF.shape[1]} features in a frame,"
                f" expected {self.num_features}"
            )
        with np.errstate(over="ignore"):
            features_TF = features_TF.astype(np.float32)
        is_bad_T = ~np.isfinite(features_TF).all(axis=1)
        if is_bad_T.any():
            raise DataError(
                f"utterance {name}: features are not finite in frame"
                f" {int(is_bad_T.argmax())}"
            )
        return features_TF

    def check_labels(
        self, name: str, labels_T: NDArray[Any] | None, num_frames: int
    ) -> NDArray[np.int32]:
        """Return labels as int32; all -1 where there are none.

        Raises:
            DataError: not one for each frame, or no class of this corpus.
        """
        if labels_T is None:
            return np.full(num_frames, NO_LABEL, np.int32)
        labels_T = np.asarray(labels_T)
        if labels_T.ndim != 1 or labels_T.dtype.kind not in "iu":
            raise DataError(f"utterance {name}: labels are no vector of integers")
        if len(labels_T) != num_frames:
            compared = "longer" if len(labels_T) > num_frames else "shorter"
            raise DataError(
                f"utterance {name}: alignment of {len(labels_T)} frames is {compared}"
                f" than the features ({num_frames})"
            )
        least, most = int(labels_T.min()), int(labels_T.max())
        if least < NO_LABEL or most >= self.num_classes:
            wrong = most if most >= self.num_classes else least
            raise DataError(
                f"utterance {name}: label {wrong}, there are {self.num_classes} classes"
            )
        return labels_T.astype(np.int32)

    def finish(
        self, path: Path, provenance: dict[str, Any], hmm: dict[str, Any] | None = None
    ) -> FrameSummary:
        """Write counts and provenance; return what the file at `path` will hold.

        Args:
            hmm: topology of the word HMMs, anything that JSON holds.

        Raises:
            DataError: no utterance was written.
        """
        if not self._splits:
            raise DataError(f"{path}: no utterance is left to write")
        for writer in self._splits.values():
            writer.flush()
        names = sorted(self._splits, key=lambda name: (*SPLITS, name).index(name))
        splits = {name: self._splits[name] for name in names}
        summary = FrameSummary(
            path=path,
            features=self.num_features,
            classes=self.num_classes,
            utterances={name: s.num_utterances for name, s in splits.items()},
            frames={name: s.num_frames for name, s in splits.items()},
            labelled={name: s.num_labelled for name, s in splits.items()},
        )
        facts = {
            "utterances": summary.utterances,
            "frames": summary.frames,
            "labelled": summary.labelled,
            "mpilm": library_version(),
        }
        self._file["classes/counts"] = self.counts
        self._file["provenance"] = json.dumps(provenance | facts, indent=1)
        if hmm is not None:
            self._file["hmm"] = json.dumps(hmm)
        return summary


class _SplitWriter:
    """Writes one split."""

    def __init__(self, file: h5py.File, name: str, num_features: int) -> None:
        self.num_utterances = self.num_frames = self.num_labelled = 0
        rows = max(1, CHUNK_BYTES // (4 * num_features))
        self._group = file.create_group(f"splits/{name}")
        self._create("features", np.float32, (rows, num_features), checksum=True)
        self._create("labels", np.int32, (CHUNK_BYTES // 4,), checksum=True)
        self._create("offsets", np.int64, (1024,), checksum=True)
        self._create("labelled", np.int64, (1024,), checksum=True)
        for text in TEXTS:
            self._create(text, TEXT, (1024,))
        self._pending: list[tuple[int, int, tuple[str, str, str]]] = []
        self._extend("offsets", np.zeros(1, np.int64))

    def append(
        self,
        features_TF: NDArray[np.float32],
        labels_T: NDArray[np.int32],
        num_labelled: int,
        texts: tuple[str, str, str],
    ) -> None:
        self._extend("features", features_TF)
        self._extend("labels", labels_T)
        self.num_frames += len(features_TF)
        self.num_labelled += num_labelled
        self.num_utterances += 1
        self._pending.append((self.num_frames, num_labelled, texts))
        if len(self._pending) >= FLUSH_UTTERANCES:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        ends, labelled, texts = zip(*self._pending, strict=True)
        self._pending = []
        self._extend("offsets", np.array(ends, np.int64))
        self._extend("labelled", np.array(labelled, np.int64))
        for key, column in zip(TEXTS, zip(*texts, strict=True), strict=True):
            self._extend(key, np.array(column, object))

    def _create(
        self, key: str, dtype: Any, chunks: tuple[int, ...], *, checksum: bool = False
    ) -> None:
        self._group.create_dataset(
            key,
            shape=(0, *chunks[1:]),
            maxshape=(None, *chunks[1:]),
            chunks=chunks,
            dtype=dtype,
            fletcher32=checksum,
        )

    def _extend(self, key: str, values: NDArray[Any]) -> None:
        dataset = self._group[key]
        start = len(dataset)
        dataset.resize(start + len(values), axis=0)
        dataset[start:] = values
