"""From recordings to words: train on tones, decode, align anew, train on that."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpilm.commands.speech import write_results
from mpilm.config import resolve
from mpilm.data.frames import FrameCorpus, FrameWriter
from mpilm.data.hdf5 import new_hdf5
from mpilm.errors import DataError, MpilmError
from mpilm.speech.decode import PENALTIES, decode, tune
from mpilm.speech.hmm import WordHmms
from mpilm.speech.plan import SplitConfig, StringConfig
from mpilm.speech.prepare import prepare_wav
from mpilm.speech.realign import realign
from mpilm.speech.scorer import ModelScores, require_fit
from mpilm.speech.viterbi import viterbi
from mpilm.speech.wer import WordErrors, count_errors
from mpilm.train.loop import Trainer
from mpilm.train.run import TrainedModel
from mpilm.world.virtual import run_virtual
from tests.unit.tones import WORDS, write_words


@pytest.fixture(scope="module")
def tones(tmp_path_factory) -> Path:
    """A corpus of three words, with strings."""
    folder = tmp_path_factory.mktemp("tones")
    prepare_wav(
        folder / "tones.h5",
        SplitConfig(
            (write_words(folder / "wav", 12, ("ann", "bob")),), test_names=r"_[01]$"
        ),
        strings=StringConfig.of("2-4", num_train=20, num=8, seed=1),
        num_states=3,
        silence_states=1,
        rounds=2,
    )
    return folder / "tones.h5"


def train(corpus: Path, out: Path, size: int = 2) -> TrainedModel:
    document = {
        "data": {"corpus": str(corpus)},
        "model": {"name": "lstm_am", "hidden": 24, "layers": 1, "context": 2},
        "strategy": {"name": "model_averaging", "period": 5},
        "optim": {"name": "adamw", "lr": 0.02, "clip": 1.0},
        "train": {"unroll": 20, "batch": 4, "samples": 100 * size * 4 * 20},
    }
    config = resolve(document)
    run_virtual(
        lambda world: Trainer(config, world, out).train(), size, machine=config.machine
    )
    return TrainedModel.read(out)


@pytest.fixture(scope="module")
def model(tones) -> TrainedModel:
    return train(tones, tones.parent / "run")


def decoded(tones, model, split="strings", size=1, **options):
    """Return what rank 0 decodes; every rank must have the same."""

    def main(world):
        with FrameCorpus.open(tones) as corpus:
            hmms = WordHmms.from_json(corpus.hmm)
            scores = ModelScores(model)
            if not options:
                return tune(corpus.split(split), scores, hmms, world)
            return decode(corpus.split(split), scores, hmms, world, **options)

    everyone = run_virtual(main, size)
    assert all(result == everyone[0] for result in everyone)
    return everyone[0]


@pytest.mark.long
def test_words_are_recognised_alike_at_any_number_of_ranks(tones, model):
    one = decoded(tones, model, penalties=(0.0, 5.0))
    assert one == decoded(tones, model, size=3, penalties=(0.0, 5.0))
    assert [result.penalty for result in one] == [0.0, 5.0]
    assert one[1].errors.rate < 0.1
    assert (one[1].errors.utterances, len(one[1].recognised)) == (8, 8)
    (single,) = decoded(tones, model, "test", size=2, penalties=(5.0,))
    assert single.errors.words == 2 * 2 * len(WORDS)
    best = decoded(tones, model, "valid-strings")
    assert best.penalty in PENALTIES
    assert best.errors.errors <= min(r.errors.errors for r in one) + 8
    figures = single.to_json()
    assert figures["wer"] == single.errors.errors / figures["words"]


@pytest.mark.long
def test_a_high_penalty_makes_fewer_words(tones, model):
    counts = [
        sum(map(len, result.recognised.values()))
        for result in decoded(tones, model, penalties=(-50.0, 0.0, 1000.0))
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2]
    assert counts[2] <= 8  # one word, or only silence, where each costs more than all


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 3])
def test_an_alignment_by_the_model_is_the_best_path_of_its_scores(
    tones, model, tmp_path, size
):
    def main(world):
        with FrameCorpus.open(tones) as corpus:
            out = tmp_path / "aligned.h5"
            return realign(corpus, ModelScores(model), out, world)

    (summary, problems), *others = run_virtual(main, size)
    assert [other for other, _ in others] == [None] * (size - 1)
    assert problems == []
    assert [path.name for path in tmp_path.iterdir()] == ["aligned.h5"]
    scores = ModelScores(model)
    with (
        FrameCorpus.open(tones) as old,
        FrameCorpus.open(tmp_path / "aligned.h5") as new,
    ):
        require_fit(model, new)
        before, after = WordHmms.from_json(old.hmm), WordHmms.from_json(new.hmm)
        assert before.stay != after.stay
        assert summary.frames == {
            name: new.split(name).num_frames for name in old.splits
        }
        changed = 0
        for name in old.splits:
            assert new.split(name).names == old.split(name).names
            for utterance in range(0, len(old.split(name)), 5):
                features_TF = old.split(name).features(utterance)
                assert np.array_equal(new.split(name).features(utterance), features_TF)
                text = old.split(name).texts[utterance].split()
                graph = before.align_graph(before.ids(text))
                path = viterbi(graph, scores(features_TF))
                labels_T = new.split(name).labels(utterance)
                assert labels_T.tolist() == graph.class_S[path.states_T].tolist()
                changed += (labels_T != old.split(name).labels(utterance)).sum()
        assert changed > 0
        assert new.counts.sum() == old.counts.sum()


@pytest.mark.long
def test_training_on_the_new_alignment(tones, model, tmp_path):
    def main(world):
        with FrameCorpus.open(tones) as corpus:
            realign(corpus, ModelScores(model), tmp_path / "aligned.h5", world)

    run_virtual(main, 1)
    again = train(tmp_path / "aligned.h5", tmp_path / "run")
    (result,) = decoded(tmp_path / "aligned.h5", again, penalties=(5.0,))
    assert result.errors.rate < 0.1


def add_bad_utterance(tones: Path, out: Path) -> None:
    """Write a copy with an utterance of more words than it has frames for."""
    with FrameCorpus.open(tones) as corpus, new_hdf5(out) as file:
        writer = FrameWriter(
            file,
            num_features=corpus.num_features,
            num_classes=corpus.num_classes,
            classes=corpus.classes,
        )
        for utterance in corpus.split("test"):
            writer.append(
                "test", utterance.name, utterance.features_TF, text=utterance.text
            )
        frames = np.zeros((5, corpus.num_features))
        writer.append("test", "too-short", frames, text="low high")
        writer.append("test", "strange", frames, text="what")
        writer.finish(out, {}, hmm=corpus.hmm)


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_utterances_that_cannot_be_aligned(tones, model, tmp_path, size):
    bad, out = tmp_path / "bad.h5", tmp_path / "out.h5"
    add_bad_utterance(tones, bad)

    def main(world, skip_bad):
        with FrameCorpus.open(bad) as corpus:
            scores = ModelScores(model)
            return realign(corpus, scores, out, world, skip_bad=skip_bad)

    with pytest.raises(MpilmError, match="too-short: 5 frames are shorter than"):
        run_virtual(partial(main, skip_bad=False), size)
    assert not out.exists()
    _, problems = run_virtual(partial(main, skip_bad=True), size)[0]
    assert [problem.split(":")[0] for problem in problems] == [
        "utterance too-short",
        "utterance strange",
    ]
    with FrameCorpus.open(out) as corpus:
        assert corpus.provenance["skipped"] == 2
        assert "too-short" not in corpus.split("test").names


@pytest.mark.long
def test_a_model_of_other_frames_or_classes_is_refused(tones, model, tmp_path):
    for features, classes, words in (
        (7, 2, "frames have 7 features, not the 40"),
        (40, 2, "classes are not the ones"),
    ):
        with new_hdf5(tmp_path / "other.h5") as file:
            writer = FrameWriter(file, num_features=features, num_classes=classes)
            writer.append("train", "u", np.zeros((3, features)), np.zeros(3, int))
            writer.finish(tmp_path / "other.h5", {})
        with FrameCorpus.open(tmp_path / "other.h5") as corpus:
            with pytest.raises(DataError, match=words):
                require_fit(model, corpus)
            with pytest.raises(DataError, match="no word HMMs"):
                WordHmms.from_json(corpus.hmm)


@pytest.mark.long
def test_a_split_without_texts_is_decoded_but_not_judged(tones, model, tmp_path):
    silent = tmp_path / "silent.h5"
    silent.write_bytes(tones.read_bytes())
    with h5py.File(silent, "r+") as file:
        file["splits/test/texts"][:] = ""
    (result,) = decoded(silent, model, "test", penalties=(5.0,))
    assert result.errors is None
    assert result.to_json() == {"split": "test", "penalty": 5.0}
    with pytest.raises(DataError, match="has no texts"):
        decoded(silent, model, "test")


def test_results_are_written(tones, model, tmp_path):
    (result,) = decoded(tones, model, "test", penalties=(5.0,))
    write_results(tmp_path, [result], [result], tmp_path / "words.txt")
    assert json.loads((tmp_path / "decode.json").read_text()) == [result.to_json()]
    lines = (tmp_path / "words.txt").read_text().splitlines()
    assert dict(line.split(" ", 1) for line in lines if " " in line) == {
        name: " ".join(words) for name, words in result.recognised.items() if words
    }


@pytest.mark.parametrize(
    ("said", "recognised", "substituted", "deleted", "inserted"),
    [
        ("one two three", "one two three", 0, 0, 0),
        ("one two three", "one four three", 1, 0, 0),
        ("one two three", "one three", 0, 1, 0),
        ("one two three", "one two two three", 0, 0, 1),
        ("one two three", "", 0, 3, 0),
        ("one", "two one two", 0, 0, 2),
        ("one two", "two one", 0, 1, 1),
        ("seven", "SEVEN", 1, 0, 0),
    ],
)
def test_word_errors_by_hand(said, recognised, substituted, deleted, inserted):
    found = count_errors([said.split()], [recognised.split()])
    expected = (substituted, deleted, inserted)
    errors = sum(expected)
    if said == "one two":  # two substitutions are as good
        assert found.errors == 2
    else:
        assert (found.substitutions, found.deletions, found.insertions) == expected
    assert found.rate == errors / len(said.split())
    assert found.wrong == (errors > 0)


def test_word_errors_of_several_texts_are_summed():
    found = count_errors([["a", "b"], ["c"], ["d"]], [["a"], ["c", "c"], ["d"]])
    assert found == WordErrors(0, 1, 1, words=4, utterances=3, wrong=2)
    assert str(found).startswith("WER 50.00% (2 of 4 words: 0 substituted, 1 deleted")


def test_words_where_nothing_was_said_are_inserted():
    """Kaldi's compute-wer counts these utterances, too."""
    said, recognised = [[], ["a"], [], []], [["x", "y"], ["a"], [], ["z"]]
    assert count_errors(said, recognised) == WordErrors(
        0, 0, 3, words=1, utterances=4, wrong=2
    )
    assert count_errors([[]], [["x"]]).insertions == 1
    blank, next_line = "half\u00a0past", "a\u2028b"  # words, not two words each
    assert count_errors([[blank, next_line]], [["half", "past"]]).errors == 2


def test_a_text_that_is_empty_counts_where_others_are_not(tones, model, tmp_path):
    some = tmp_path / "some.h5"
    some.write_bytes(tones.read_bytes())
    with h5py.File(some, "r+") as file:
        texts = file["splits/test/texts"]
        texts[0] = ""
    (whole,) = decoded(tones, model, "test", penalties=(5.0,))
    (result,) = decoded(some, model, "test", penalties=(5.0,))
    assert result.errors.utterances == whole.errors.utterances
    (first, *_) = result.recognised.values()
    assert len(first) >= 1
    assert result.errors.insertions == whole.errors.insertions + len(first)
