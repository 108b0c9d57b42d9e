"""Acoustic models through the real training program: train, resume, measure, export."""

from __future__ import annotations

import json
from pathlib import Path

import kaldiio
import numpy as np
import pytest

from mpilm.commands.kaldi import export_scores
from mpilm.config import resolve
from mpilm.data.frames import FrameCorpus
from mpilm.data.kaldi_prepare import prepare_kaldi
from mpilm.errors import DataError, MpilmError
from mpilm.speech.scores import Scorer
from mpilm.train.evaluate import evaluate
from mpilm.train.loop import Trainer
from mpilm.train.run import TrainedModel
from mpilm.train.task import open_task
from mpilm.world.virtual import run_virtual
from tests.reference import acoustic as reference
from tests.unit.kaldi_files import NUM_FEATURES, make_folder

DNN = {"name": "dnn", "hidden": 24, "layers": 2, "activation": "relu"}
LSTM = {"name": "lstm_am", "hidden": 16, "layers": 1, "bottleneck": 8, "context": 0}
BLSTM = {"name": "blstm_am", "hidden": 16, "layers": 2, "bottleneck": 8}
SIZES = {"dnn": {"batch": 16}, "lstm_am": {"batch": 4}, "blstm_am": {"batch": 4}}
AVERAGING = {"name": "model_averaging", "period": 5}


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """A corpus from three Kaldi folders; a class is easily told from the others."""
    folder = tmp_path_factory.mktemp("frames")
    splits = ("train", "valid", "test")
    folders = {s: make_folder(folder / s, seed) for seed, s in enumerate(splits)}
    for split, path in folders.items():  # names unique over all splits
        for name in ("feats.scp", "utt2spk", "text", "pdf.txt"):
            lines = (path / name).read_text().splitlines()
            text = "".join(f"{split}-{line}\n" for line in lines)
            (path / name).write_text(text)
    alignments = [path / "pdf.txt" for path in folders.values()]
    prepare_kaldi(folders, folder / "frames.h5", alignments=alignments, context=2)
    return folder / "frames.h5"


def train(frames, out, model=DNN, strategy=AVERAGING, *, size=2, steps=80, **sections):
    sizes = SIZES[model["name"]]
    in_step = sizes["batch"] * (1 if model is DNN else 7)
    document = {
        "data": {"corpus": str(frames), "chunk_windows": 2},
        "model": model,
        "strategy": strategy,
        "optim": {"name": "adamw", "lr": 0.02, "clip": 1.0},
        "train": {"unroll": 7, "samples": steps * size * in_step, **sizes},
    }
    for section, settings in sections.items():
        kept = {} if "name" in settings else document.get(section, {})
        document[section] = {**kept, **settings}
    config = resolve(document)

    def main(world):
        trainer = Trainer(config, world, out, resume=True)
        trainer.train()
        return trainer

    return run_virtual(main, size, machine=config.machine)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "strategy", "source"),
    [
        (DNN, AVERAGING, "shards"),
        (DNN, {"name": "adpsgd"}, "shards"),
        (DNN, {"name": "adpsgd"}, "pool"),
        (LSTM, {"name": "allreduce"}, "pool"),
        (BLSTM, {"name": "model_averaging", "period_samples": 56}, "shards"),
    ],
)
def test_frame_error_falls_on_two_ranks(frames, tmp_path, model, strategy, source):
    trainers = train(frames, tmp_path, model, strategy, data={"source": source})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["valid_frame_error"] < 0.35  # by chance: 5 of 6
    assert summary["test_frame_error"] < 0.35
    left_out = {trainer.batches.num_dropped for trainer in trainers}
    assert left_out == {summary["frames_left_out"]}


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "optim"),
    [
        (DNN, {"lr": 0.1, "summed": True, "max_change": "su_chen"}),
        (LSTM, {"lr": 1.0, "max_change": "none"}),
        (BLSTM, {"lr": 1.0}),
    ],
    ids=["dnn", "lstm_am", "blstm_am"],
)
def test_natural_gradient_trains_it(frames, tmp_path, model, optim):
    train(frames, tmp_path, model, steps=60, optim={"name": "ng_sgd", **optim})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["valid_frame_error"] < 0.35  # by chance: 5 of 6


@pytest.mark.long
@pytest.mark.parametrize("model", [DNN, BLSTM], ids=["dnn", "blstm_am"])
def test_a_resumed_run_ends_in_the_same_bits(frames, tmp_path, model):
    straight = train(frames, tmp_path / "a", model, steps=40)
    train(frames, tmp_path / "b", model, steps=15)
    resumed = train(frames, tmp_path / "b", model, steps=40)
    for a, b in zip(straight, resumed, strict=True):
        assert a.totals.step == b.totals.step == 40
        assert a.learner.theta.numpy().tobytes() == b.learner.theta.numpy().tobytes()
        assert a.batches.state() == b.batches.state()


@pytest.mark.long
@pytest.mark.parametrize("model", [DNN, LSTM, BLSTM], ids=lambda m: m["name"])
def test_the_measured_quality_is_the_same_on_any_number_of_ranks(
    frames, tmp_path, model
):
    train(frames, tmp_path, model, size=1, steps=5)
    trained = TrainedModel.read(tmp_path)
    choice, settings = trained.config.model, trained.config.train

    def measure(world):
        task = open_task(frames, choice)
        return evaluate(trained.learner(), task, "valid", settings, world)

    (alone,) = run_virtual(measure, 1)
    for size in (2, 3, 15):  # 15: some have nothing to do
        for quality in run_virtual(measure, size):
            assert quality.error == alone.error
            assert quality.loss == pytest.approx(alone.loss, rel=1e-14)


@pytest.mark.long
@pytest.mark.parametrize("model", [DNN, BLSTM], ids=["dnn", "blstm_am"])
def test_what_is_exported_is_what_the_model_computes(frames, tmp_path, model):
    """Round trip: Kaldi's files in, scores out as kaldiio reads them, to the bit."""
    train(frames, tmp_path / "run", model, steps=20)
    out = tmp_path / "post.ark"
    export_scores(tmp_path / "run", corpus=frames, out=out)
    trained = TrainedModel.read(tmp_path / "run")
    score, read = Scorer(trained, "cpu"), kaldiio.load_scp(str(tmp_path / "post.scp"))
    layout = trained.learner().layout
    parameters = {
        s.name: trained.theta_P[s.slice].reshape(s.shape).astype(float) for s in layout
    }
    with FrameCorpus.open(frames) as corpus:
        counts, test = corpus.counts, corpus.split("test")
        assert list(read) == test.names
        priors = kaldiio.load_mat(str(tmp_path / "post.priors"))
        np.testing.assert_allclose(priors, counts / counts.sum(), rtol=1e-6)
        for index, name in enumerate(test.names):
            x_TF = test.features(index)
            assert read[name].dtype == np.float32
            assert read[name].tobytes() == score(x_TF).tobytes()
            padded = np.pad(x_TF, ((2, 2), (0, 0)), "edge").astype(float)
            spliced = [padded[t : t + 5].ravel() for t in range(len(x_TF))]
            if model is DNN:
                expected = reference.dnn(parameters, spliced, "relu")
            else:
                expected = reference.lstm(parameters, np.array(spliced))
            expected = expected - np.log(counts / counts.sum())
            np.testing.assert_allclose(read[name], expected, atol=1e-4)
    # copied through kaldiio the archive stays the same, byte for byte
    kaldiio.save_ark(str(tmp_path / "copy.ark"), dict(kaldiio.load_ark(str(out))))
    assert (tmp_path / "copy.ark").read_bytes() == out.read_bytes()


def refused(work, *arguments, **settings) -> str:
    with pytest.raises(MpilmError) as error:
        work(*arguments, **settings)
    line = str(error.value)
    assert "\n" not in line
    return line


def test_bad_input_is_one_line(frames, tmp_path):
    line = refused(train, frames, tmp_path / "a", size=13, steps=1)
    assert "13 ranks need as many utterances with labels" in line
    line = refused(train, frames, tmp_path / "a", train={"batch": 400})
    assert "the smallest share of the train split" in line
    words = {"name": "lstm_lm", "hidden": 4, "embed": 4}
    SIZES["lstm_lm"] = {"batch": 4}
    line = refused(train, frames, tmp_path / "a", words)
    assert f"model.name = lstm_lm reads a corpus of text, {frames} is one of" in line
    assert not (tmp_path / "a").exists()


def test_features_of_another_dimension_do_not_fit_the_model(frames, tmp_path):
    train(frames, tmp_path / "run", size=1, steps=1)
    other = make_folder(tmp_path / "other")
    scp = (other / "feats.scp").read_text().replace("\n", "[:,0:2]\n")
    (other / "feats.scp").write_text(scp)
    prepare_kaldi({"test": other}, tmp_path / "other.h5", num_classes=6)
    folders, ali = {"train": frames.parent / "train"}, frames.parent / "train/pdf.txt"
    shares = {"valid": 0.3}
    nine = {"num_classes": 9, "shares": shares, "context": 2}
    prepare_kaldi(folders, tmp_path / "nine.h5", alignments=[ali], **nine)
    out = tmp_path / "post.ark"
    line = refused(
        export_scores, tmp_path / "run", corpus=tmp_path / "other.h5", out=out
    )
    assert f"3 features in a frame, {tmp_path / 'run'} was trained with" in line
    score = Scorer(TrainedModel.read(tmp_path / "run"))
    with pytest.raises(DataError, match=f"trained with {NUM_FEATURES}"):
        score(np.zeros((4, 3), np.float32))
    assert not out.exists()
    line = refused(train, tmp_path / "nine.h5", tmp_path / "run", size=1)
    assert "its set of features and classes is not the one that" in line
