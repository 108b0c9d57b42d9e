"""Kaldi's data folders and alignments.

    DIR/feats.scp   utterance -> archive:offset[rows,columns]
    DIR/utt2spk     utterance -> speaker
    DIR/text        utterance -> words; may be absent
    DIR/cmvn.scp    speaker -> statistics; may be absent, then they are computed

lists.py says what a line of them is, kaldi_archives.py how archives are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.data.kaldi_archives import (
    Archives,
    Bad,
    files_of,
    read_archive,
    utterance,
    whereabouts,
)
from mpilm.data.lists import read_list, split_words
from mpilm.errors import DataError


class KaldiFolder:
    """A data folder of Kaldi: DIR with feats.scp.

    speakers  utterance -> speaker; empty where there is no utt2spk
    texts     utterance -> words; empty where there is no text

    Raises:
        DataError: no feats.scp, or an empty one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.scp = path, path / "feats.scp"
        self.size = sum(1 for _ in self.places())
        if not self.size:
            raise DataError(f"{self.scp}: is empty")
        self.speakers = self._optional("utt2spk")
        self.texts = {
            name: " ".join(split_words(text))
            for name, text in self._optional("text").items()
        }

    def _optional(self, name: str) -> dict[str, str]:
        path = self.path / name
        return dict(read_list(path)) if path.exists() else {}

    def files(self) -> Iterator[Path]:
        """Yield the files that are read, archives too."""
        for name in ("feats.scp", "utt2spk", "text", "cmvn.scp"):
            yield from files_of(self.path / name)

    def names(self) -> Iterator[str]:
        """Yield the utterances, in the order of feats.scp."""
        return (name for name, _ in self.places())

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield (utterance, where its features are), in the order of feats.scp."""
        return read_list(self.scp, of_paths=True)

    def features(self, archives: Archives, name: str, place: str) -> NDArray[Any]:
        """Return the features of an utterance, (T, F).

        Raises:
            DataError: one line with its name.
        """
        with utterance(name):
            return archives.read(place, self.scp)

    def speaker(self, name: str) -> str:
        """Return the speaker of an utterance; "" where there is no utt2spk.

        Raises:
            DataError: there is one, but without this utterance.
        """
        if self.speakers and name not in self.speakers:
            raise DataError(f"utterance {name}: is not in {self.path / 'utt2spk'}")
        return self.speakers.get(name, "")


class Alignments:
    """Labels of utterances: pdf ids, or targets, from archives or lists of places.

    A vector has one class per frame. A matrix with one column is read as such; of one
    with more columns (targets) the largest in each row counts.

    num_classes  one more than the largest label

    Args:
        paths: files; *.scp are lists, others archives, binary or text.
        bad: what to do about alignments that cannot be read. What follows such a one
            in its archive is out of reach: those utterances have none.

    Raises:
        DataError: a file cannot be read, or is empty.
    """

    def __init__(self, paths: Sequence[Path], bad: Bad) -> None:
        self._places: dict[str, tuple[int, str]] = {}
        self._paths = list(paths)
        self._archives = Archives()
        self.num_classes = 0
        for index, path in enumerate(self._paths):
            before = len(self._places)
            for name, place, labels_T in self._entries(path, bad):
                if name in self._places:
                    bad.note(name, DataError(self._twice(name, place, path)))
                    continue
                self._places[name] = (index, place)
                if len(labels_T):
                    self.num_classes = max(self.num_classes, int(labels_T.max()) + 1)
            if len(self._places) == before:
                raise DataError(f"{path}: holds no alignment")

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def labels(self, name: str) -> NDArray[np.int32]:
        """Return the labels of an utterance, (T,).

        Raises:
            DataError: there are none.
        """
        if name not in self._places:
            raise DataError(f"utterance {name}: has no alignment")
        index, place = self._places[name]
        with utterance(name):
            return as_labels(self._archives.read(place, self._paths[index]))

    def _twice(self, name: str, place: str, path: Path) -> str:
        """Return the line for an alignment that there is already."""
        first = self._paths[self._places[name][0]]
        where = "" if first == path else f", first in {first}"
        if path.suffix == ".scp":
            names = [other for other, _ in read_list(path, of_paths=True)]
            at = f"line {names.index(name) + 1}"
        else:
            at = whereabouts(path, int(place.rpartition(":")[2]))
        return f"utterance {name}: {path}, {at}: {name} is there twice{where}"

    def _entries(
        self, path: Path, bad: Bad
    ) -> Iterator[tuple[str, str, NDArray[np.int32]]]:
        if path.suffix == ".scp":
            for name, place in read_list(path, of_paths=True):
                with utterance(name, bad):
                    labels_T = as_labels(self._archives.read(place, path))
                    yield name, place, labels_T
            return
        if path.suffix == ".gz":
            raise DataError(
                f"{path}: is compressed; Kaldi's ali.*.gz hold transition ids:"
                " ali-to-pdf makes pdf ids of them"
            )
        for name, offset, array in read_archive(path, bad):
            with utterance(name, bad):
                yield name, f"{path}:{offset}", as_labels(array)


def as_labels(array: NDArray[Any]) -> NDArray[np.int32]:
    """Return one class per frame, (T,).

    >>> as_labels(np.array([[0.1, 0.9], [0.8, 0.2]])), as_labels(np.array([[3.0]]))
    (array([1, 0], dtype=int32), array([3], dtype=int32))

    Raises:
        DataError: they are no whole numbers, or not finite.
    """
    if not np.isfinite(array).all():
        raise DataError("labels are not finite")
    if array.ndim == 2 and array.shape[1] > 1:
        return array.argmax(axis=1).astype(np.int32)
    flat = array.reshape(-1)
    labels = flat.astype(np.int32)
    if (labels != flat).any():
        raise DataError("labels are no whole numbers")
    return labels
