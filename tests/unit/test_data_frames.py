"""The frames corpus: what was written is read; what is bad is one line."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpilm.data.frames import FrameCorpus, FrameWriter
from mpilm.data.hdf5 import Corpus, new_hdf5
from mpilm.errors import DataError

F, C = 3, 5


def features(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_frames, F)).astype(np.float32)


def write(path: Path, num_utterances: int = 4, **settings) -> Path:
    """Write a corpus: utterance u has u + 2 frames, labels u, u + 1, ... mod C."""
    with new_hdf5(path) as file:
        writer = FrameWriter(file, num_features=F, num_classes=C, **settings)
        for u in range(num_utterances):
            labels = (u + np.arange(u + 2)) % C
            labels[0] = -1
            name = f"utt-{u}"
            writer.append(
                "train",
                name,
                features(u + 2, u),
                labels,
                speaker=f"s{u % 2}",
                text="\u00e4",
            )
        writer.append("test", "silent", features(7).astype(np.float64))
        writer.finish(path, {"command": "test"}, hmm={"words": ["one"]})
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    with FrameCorpus.open(write(tmp_path / "c.h5", context=2)) as corpus:
        assert (corpus.num_features, corpus.num_classes, corpus.context) == (F, C, 2)
        assert corpus.splits == ("train", "test")
        assert corpus.hmm == {"words": ["one"]}
        assert corpus.provenance["command"] == "test"
        assert corpus.provenance["labelled"] == {"train": 10, "test": 0}
        train = corpus.split("train")
        assert (len(train), train.num_frames, train.num_labelled) == (4, 14, 10)
        assert train.lengths_U.tolist() == [2, 3, 4, 5]
        assert train.labelled_U.tolist() == [1, 2, 3, 4]
        for u, utterance in enumerate(train):
            assert utterance.name == f"utt-{u}"
            assert (utterance.speaker, utterance.text) == (f"s{u % 2}", "\u00e4")
            assert np.array_equal(utterance.features_TF, features(u + 2, u))
            assert utterance.labels_T[1:].tolist() == [
                (u + 1 + t) % C for t in range(u + 1)
            ]
        counts = np.bincount(np.concatenate([u.labels_T[1:] for u in train]))
        assert corpus.counts.tolist() == counts.tolist()
        assert corpus.split("test").utterance(0).labels_T.tolist() == [-1] * 7
        with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
            corpus.split("valid")


@pytest.mark.long
def test_more_utterances_than_are_written_at_once(tmp_path: Path) -> None:
    with FrameCorpus.open(write(tmp_path / "c.h5", 600)) as corpus:
        train = corpus.split("train")
        assert train.names == [f"utt-{u}" for u in range(600)]
        assert np.array_equal(train.features(599), features(601, 599))


def test_the_layout_is_that_of_the_documentation(tmp_path: Path) -> None:
    with h5py.File(write(tmp_path / "c.h5", classes=list("abcde"))) as file:
        assert file.attrs["format"] == "mpilm corpus"
        assert file.attrs["kind"] == "frames"
        assert file["classes/names"].asstr()[:].tolist() == list("abcde")
        assert file["splits/train/offsets"][:].tolist() == [0, 2, 5, 9, 14]
        assert file["splits/train/features"].fletcher32
        assert file["splits/train/labels"].dtype == np.int32
        assert json.loads(file["hmm"].asstr()[()]) == {"words": ["one"]}


def test_the_fingerprint_tells_what_inputs_and_outputs_mean(tmp_path: Path) -> None:
    def fingerprint(**settings) -> str:
        with FrameCorpus.open(write(tmp_path / "c.h5", **settings)) as corpus:
            return corpus.fingerprint

    assert fingerprint() == fingerprint(num_utterances=7)
    assert fingerprint() != fingerprint(classes=list("abcde"))
    assert fingerprint(classes=list("abcde")) != fingerprint(classes=list("abced"))


@pytest.mark.parametrize(
    ("frames", "labels", "words"),
    [
        (features(4), np.zeros(5, int), "alignment of 5 frames is longer than"),
        (features(4), np.zeros(3, int), "alignment of 3 frames is shorter than"),
        (features(4), np.full(4, C), f"label {C}, there are {C} classes"),
        (features(4), np.full(4, -2), f"label -2, there are {C} classes"),
        (features(4), np.zeros(4), "labels are no vector of integers"),
        (features(4)[:, :2], None, "2 features in a frame, expected 3"),
        (features(0), None, "has no frames"),
        (features(4)[0], None, "no matrix of numbers"),
        (np.array([["a", "b", "c"]]), None, "no matrix of numbers"),
        (np.where(np.eye(4, 3) > 0, np.nan, 1.0)[1:], None, "not finite in frame 0"),
        (np.full((2, 3), 1e300), None, "not finite in frame 0"),
    ],
)
def test_a_bad_utterance_is_refused_by_its_name(tmp_path, frames, labels, words):
    path = tmp_path / "c.h5"
    with new_hdf5(path) as file:
        writer = FrameWriter(file, num_features=F, num_classes=C)
        with pytest.raises(DataError) as error:
            writer.append("train", "bad-one", frames, labels)
        assert words in str(error.value)
        assert "utterance bad-one: " in str(error.value)
        writer.append("train", "good", features(2), np.zeros(2, int))
        summary = writer.finish(path, {})
    assert summary.utterances == {"train": 1}


def test_a_corpus_without_utterances_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    with pytest.raises(DataError, match="no utterance is left"), new_hdf5(path) as file:
        FrameWriter(file, num_features=F, num_classes=C).finish(path, {})
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_corpus_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "c.h5")
    with pytest.raises(DataError) as error:
        Corpus.open(path)
    assert str(error.value) == f"{path} is a corpus of frames, not of text"


@pytest.mark.parametrize("key", ["offsets", "labelled", "features", "names"])
def test_what_is_missing_or_damaged_is_one_line(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "c.h5")
    with h5py.File(path, "r+") as file:
        del file[f"splits/train/{key}"]
        if key == "features":
            file["splits/train/features"] = np.zeros((3, F), np.float32)
    with pytest.raises(DataError) as error, FrameCorpus.open(path) as corpus:
        corpus.split("train").utterance(0)
    assert "damaged" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "c.h5")
    data = bytearray(path.read_bytes())
    where = data.find(features(5, 3).tobytes())
    data[where] ^= 1
    path.write_bytes(data)
    with FrameCorpus.open(path) as corpus, pytest.raises(DataError, match="damaged"):
        corpus.split("train").features(3)
