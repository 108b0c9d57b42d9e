"""From real wav files to a frames corpus: what is in it, and what bad files do."""

from __future__ import annotations

import os
import time
from pathlib import Path

import jiwer
import numpy as np
import pytest

from mpilm.cli import main
from mpilm.config import resolve
from mpilm.data.frames import FrameCorpus
from mpilm.data.wav import WavReader, list_recordings
from mpilm.errors import DataError, MpilmError
from mpilm.speech import require
from mpilm.speech.features import FeatureConfig, Moments
from mpilm.speech.gaussians import Gaussians
from mpilm.speech.hmm import WordHmms
from mpilm.speech.plan import SplitConfig, StringConfig, make_strings, plan_splits
from mpilm.speech.prepare import prepare_wav
from mpilm.speech.viterbi import viterbi

from .tones import RATE, WORDS, tone, write_wav, write_words

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MPILM_DATA", REPOSITORY.parent / "shared" / "data"))
FSDD = DATA / "fsdd" / "wav"


def prepare(folder: Path, out: Path, **options):
    splits = SplitConfig((folder,), test_names=r"_[01]$", valid_share=0.2)
    options = {"num_states": 3, "rounds": 3, **options}
    return prepare_wav(out, splits, **options)


def refused(*arguments, **options) -> str:
    with pytest.raises(DataError) as error:
        prepare(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_corpus_of_tones(tmp_path):
    folder = write_words(tmp_path / "wav", 8, ("ann", "bob"))
    out = tmp_path / "c.h5"
    steps: list[tuple[int, int]] = []
    summary = prepare(
        folder,
        out,
        silence_states=1,
        strings=StringConfig.of("2-3", num_train=5, num=4, seed=1),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert summary.words == tuple(sorted(WORDS))
    assert (summary.rate, summary.problems) == (RATE, ())
    assert steps[-1][0] == steps[-1][1] == len(steps)
    assert {path.name for path in tmp_path.iterdir()} == {"wav", "c.h5"}
    with FrameCorpus.open(out) as corpus:
        hmms = WordHmms.from_json(corpus.hmm)
        assert corpus.classes == hmms.class_names()
        sizes = {name: len(corpus.split(name)) for name in corpus.splits}
        assert sizes["test"] == 2 * 2 * 3
        assert sizes["train"] + sizes["valid"] == 6 * 2 * 3 + 5
        assert sizes["strings"] == sizes["valid-strings"] == 4
        for name in corpus.splits:
            for utterance in corpus.split(name):
                words = hmms.ids(utterance.text.split())
                labels_T = utterance.labels_T
                spoken = labels_T[labels_T < len(hmms.words) * hmms.num_states]
                runs = spoken[np.flatnonzero(np.diff(spoken, prepend=-1))]
                assert runs.tolist() == hmms.chain(words).tolist()
                assert utterance.speaker in ("ann", "bob")
        for speaker in ("ann", "bob"):
            frames_NF = np.concatenate(
                [u.features_TF for u in corpus.split("test") if u.speaker == speaker]
            )
            assert np.abs(frames_NF.mean(axis=0)).max() < 1e-4
            assert frames_NF.std(axis=0) == pytest.approx(1.0, abs=1e-3)
        assert recognise(corpus, hmms, "strings") == 0.0


def recognise(corpus, hmms, split):
    """Return the word error rate of Gaussians fitted to the labels of train."""
    gaussians = Gaussians(hmms.num_classes, corpus.num_features)
    for utterance in corpus.split("train"):
        gaussians.add(utterance.features_TF, utterance.labels_T)
    scores, graph = gaussians.fit(), hmms.loop_graph(20.0)
    texts = [
        " ".join(hmms.words_of(graph, viterbi(graph, scores(u.features_TF))))
        for u in corpus.split(split)
    ]
    return jiwer.wer(corpus.split(split).texts, texts)


@pytest.mark.long
def test_the_same_input_gives_the_same_corpus(tmp_path):
    folder = write_words(tmp_path / "wav", 4)
    prepare(folder, tmp_path / "a.h5")
    time.sleep(1.1)  # times in HDF5 are in seconds
    prepare(folder, tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_kaldi_style_lists(tmp_path):
    folder = tmp_path / "data"
    write_wav(folder / "one.wav", np.concatenate([tone("low", 1), tone("high", 2)]))
    other = write_wav(tmp_path / "two.wav", tone("low", 3))
    (folder / "wav.scp").write_text(f"utt1 one.wav\nutt2 {other}\n")
    (folder / "text").write_text("utt1 low high\nutt2 low\n")
    (folder / "utt2spk").write_text("utt1 ann\nutt2 bob\n")
    found = list_recordings(folder)
    assert [(r.name, r.words, r.speaker) for r in found] == [
        ("utt1", ("low", "high"), "ann"),
        ("utt2", ("low",), "bob"),
    ]
    assert [len(WavReader().read(r)) > RATE * 0.2 for r in found] == [True, True]
    splits = SplitConfig((folder,), valid_share=0.0)
    prepare_wav(tmp_path / "c.h5", splits, num_states=3, rounds=1)
    with FrameCorpus.open(tmp_path / "c.h5") as corpus:
        assert corpus.split("train").texts == ["low high", "low"]
        assert corpus.splits == ("train",)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width_are_on_the_scale_of_16_bits(tmp_path, width):
    levels = np.array([-32768, -256, 0, 256, 32512])
    if width == 1:
        raw = (levels // 256 + 128).astype(np.uint8).tobytes()
    else:
        wide = (levels.astype(np.int64) << 8 * (width - 2)).astype("<i4")
        raw = b"".join(int(x).to_bytes(4, "little", signed=True)[:width] for x in wide)
    path = write_wav(tmp_path / "a_b_0.wav", raw, width=width)
    (recording,) = list_recordings(path.parent)
    assert WavReader().read(recording).tolist() == levels.tolist()


def spoil(folder: Path, kind: str) -> str:
    """Make a recording of train bad; return its name."""
    path = folder / "low_ann_3.wav"
    samples = tone("low", 1)
    if kind == "empty file":
        path.write_bytes(b"")
    elif kind == "no samples":
        write_wav(path, b"")
    elif kind == "stereo":
        write_wav(path, np.repeat(samples, 2), channels=2)
    elif kind == "rate":
        write_wav(path, samples, rate=16000)
    elif kind == "not wav":
        path.write_bytes(b"OggS" + bytes(1000))
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "cut header":
        path.write_bytes(path.read_bytes()[:20])
    elif kind == "short":
        write_wav(path, samples[:500])
    elif kind == "shorter than a frame":
        write_wav(path, samples[:100])
    elif kind == "unknown word":
        path.rename(folder / "huh_ann_3.wav")
        return "huh_ann_3"
    elif kind == "name":
        path.rename(folder / "low.wav")
        return "low.wav"
    elif kind == "float":
        raw = bytearray(path.read_bytes())
        raw[20] = 3  # WAVE_FORMAT_IEEE_FLOAT
        path.write_bytes(raw)
    elif kind == "missing":
        path.unlink()
        path.symlink_to("nowhere.wav")
    return "low_ann_3"


BAD = {
    "empty file": "an empty file",
    "no samples": "has no samples",
    "stereo": "stereo; one channel is needed",
    "rate": "16000 samples/s, the others have 8000",
    "not wav": "not a wav file of linear PCM",
    "truncated": "is truncated: ",
    "cut header": "is truncated",
    "short": "frames are shorter than the HMM of 'low' (3 states)",
    "shorter than a frame": "less than one frame",
    "unknown word": "unknown word 'huh'",
    "name": "its name is not TEXT_SPEAKER_NUMBER.wav",
    "float": "not a wav file of linear PCM",
    "missing": "no such file",
}


@pytest.mark.long
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_recording_is_named_and_can_be_skipped(tmp_path, kind):
    folder, out = write_words(tmp_path / "wav", 4), tmp_path / "c.h5"
    name = spoil(folder, kind)
    options = {"words": tuple(WORDS), "num_states": 5 if kind == "short" else 3}
    line = refused(folder, out, **options)
    assert name in line
    assert BAD[kind].replace("(3", "(5") in line
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["wav"]
    summary = prepare(folder, out, skip_bad=True, **options)
    assert summary.problems == (line,)
    with FrameCorpus.open(out) as corpus:
        assert corpus.provenance["skipped"] == 1
        assert corpus.provenance["problems"] == [line]
        assert name not in {n for s in corpus.splits for n in corpus.split(s).names}


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("wav.scp", "utt1 sox x.sph |\n", "utt1: a command in wav.scp"),
        ("wav.scp", "utt1 one.wav\nutt2 no.wav\n", "utt2: no such file"),
        ("wav.scp", "utt1 one.wav\nutt3 one.wav\n", "utt2: is in text but not in"),
        ("wav.scp", "utt1 one.wav\nutt1 one.wav\n", "line 2: utt1 is there twice"),
        ("text", "utt1 low\n", "utt2: is in wav.scp but not in text"),
        ("text", "utt1 low\nutt2\n", "utt2: has no words in text"),
        ("text", None, "text: No such file"),
        ("text", b"utt1 \xff\n", "text: not UTF-8 text: byte 5"),
        ("utt2spk", "utt1 ann\n", "utt2: is not in utt2spk"),
    ],
)
def test_bad_lists_are_one_line(tmp_path, file, text, words):
    folder = tmp_path / "data"
    write_wav(folder / "one.wav", tone("low", 1))
    (folder / "wav.scp").write_text("utt1 one.wav\nutt2 one.wav\n")
    (folder / "text").write_text("utt1 low\nutt2 low\n")
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        splits = SplitConfig((folder,), valid_share=0.0)
        prepare_wav(tmp_path / "c.h5", splits, num_states=3)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_folders_and_options_are_one_line(tmp_path):
    folder, out = write_words(tmp_path / "wav", 4), tmp_path / "c.h5"
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused(tmp_path / "no", out)
    assert "neither wav files nor a wav.scp" in refused(tmp_path / "empty", out)
    assert "is not a folder" in refused(folder / "low_ann_0.wav", out)
    assert "one state or more" in refused(folder, out, num_states=0)
    with pytest.raises(DataError, match="--num-bins 2: must be 4 to 128"):
        FeatureConfig(num_bins=2)
    with pytest.raises(DataError, match="--num-ceps 50"):
        FeatureConfig(kind="mfcc", num_ceps=50)
    with pytest.raises(DataError, match=r"--test-names \(: no regular expression"):
        SplitConfig((folder,), test_names="(")
    with pytest.raises(DataError, match="no recording is left for train"):
        plan_splits(SplitConfig((folder,), test_names="_"))
    for lengths in ("x", "0-3", "5-3", "-1"):
        with pytest.raises(DataError, match="write two lengths such as 3-7"):
            StringConfig.of(lengths, num_train=0, num=1, seed=1)
    bad = tmp_path / "file" / "c.h5"
    bad.parent.write_text("")
    assert "cannot be written" in refused(folder, bad)


def test_nothing_but_bad_recordings(tmp_path):
    folder = tmp_path / "wav"
    write_wav(folder / "low_ann_5.wav", b"")
    line = refused(folder, tmp_path / "c.h5", skip_bad=True)
    assert line == "no utterance of train is left"


def test_strings_are_of_one_speaker_and_of_their_own_split(tmp_path):
    folder = write_words(tmp_path / "wav", 6, ("ann", "bob"))
    splits = plan_splits(SplitConfig((folder,), test_names="_[01]$"))
    strings = StringConfig.of("3-5", num_train=20, num=10, seed=4)
    joined = [t for name in splits for t in make_strings(splits[name], name, strings)]
    assert {len(take.words) for take in joined} == {3, 4, 5}
    own = {name: set(recordings) for name, recordings in splits.items()}
    source = {"train": "train", "valid-strings": "valid", "strings": "test"}
    for take in joined:
        assert set(take.recordings) <= own[source[take.split]]
        assert {r.speaker for r in take.recordings} == {take.speaker}
    assert sum(take.split == "train" for take in joined) == 20
    test = [take for take in joined if take.split == "strings"]
    assert make_strings(splits["test"], "test", strings) == test
    other = StringConfig.of("3-5", num_train=20, num=10, seed=5)
    assert make_strings(splits["test"], "test", other) != test


@pytest.mark.parametrize("kind", ["fbank", "mfcc"])
def test_features_of_a_tone(kind):
    config = FeatureConfig(kind=kind, num_bins=23)
    seconds = np.arange(RATE) / RATE
    low, high = (
        config.extract("u", (8000 * np.sin(6.2832 * f * seconds)).astype("f4"), RATE)
        for f in (300, 3000)
    )
    assert low.shape == (98, config.num_features)  # 1 + (1.000 - 0.025) / 0.010
    assert low.dtype == np.float32
    if kind == "fbank":
        assert low.mean(axis=0).argmax() < high.mean(axis=0).argmax()
    quiet = config.extract("u", np.zeros(RATE, "f4"), RATE)
    assert np.isfinite(quiet).all()
    assert (config.loudness(quiet) < config.loudness(low)).all()


def test_a_feature_that_never_changes_stays_finite():
    moments = Moments(2)
    moments.add(np.array([[5.0, 1.0], [5.0, 2.0]], np.float32))
    found = moments.normalise(np.array([[5.0, 1.5]], np.float32))
    assert found.tolist() == [[0.0, 0.0]]


def test_some_spoken_digits(tmp_path):
    """A few recordings of the Free Spoken Digit Dataset, where it is there."""
    if not FSDD.is_dir():
        pytest.skip(f"no {FSDD} (set MPILM_DATA)")
    folder = tmp_path / "wav"
    folder.mkdir()
    for path in FSDD.glob("*_jackson_[0-9].wav"):
        (folder / path.name).symlink_to(path)
    splits = SplitConfig((folder,), test_names="_[0-4]$", valid_share=0.0)
    out = tmp_path / "c.h5"
    strings = StringConfig.of("3-7", num_train=0, num=20, seed=1)
    summary = prepare_wav(out, splits, strings=strings, rounds=4, silence_states=1)
    assert summary.words == tuple("0123456789")
    assert summary.frames.utterances == {"train": 50, "test": 50, "strings": 20}
    with FrameCorpus.open(out) as corpus:
        hmms = WordHmms.from_json(corpus.hmm)
        assert recognise(corpus, hmms, "strings") < 0.2  # was 0.09, 2026-11


def test_valid_is_a_share_of_train_and_not_empty(tmp_path):
    folder = write_words(tmp_path / "wav", 40)  # 120 recordings
    splits = plan_splits(SplitConfig((folder,), valid_share=0.3))
    assert 20 <= len(splits["valid"]) <= 52  # 36, give or take 3 deviations
    assert len(plan_splits(SplitConfig((folder,), valid_share=1e-9))["valid"]) == 1
    assert plan_splits(SplitConfig((folder,), valid_share=0.0))["valid"] == []
    given = plan_splits(SplitConfig((folder,), valid_names="_3$"))
    assert [r.name for r in given["valid"]] == ["high_ann_3", "low_ann_3", "rise_ann_3"]


def test_what_is_not_installed_is_named():
    with pytest.raises(MpilmError, match=r"jiwer is missing .*pip install 'mpilm"):
        require("no_such_module", "jiwer")


def test_new_recordings_like_those_of_a_run(tmp_path, capsys):
    """Fewer words in other recordings: the classes are still the model's."""
    old, new, run = tmp_path / "old.h5", tmp_path / "new.h5", tmp_path / "run"
    features = FeatureConfig(num_bins=23, cmvn="utterance")
    prepare(
        write_words(tmp_path / "wav", 6, ("ann",)),
        old,
        silence_states=1,
        features=features,
    )
    run.mkdir()
    document = {"data": {"corpus": str(old)}, "model": {"name": "dnn"}}
    (run / "config.toml").write_text(resolve(document).to_toml())
    for number in range(4):
        write_wav(tmp_path / "more" / f"low_eve_{number}.wav", tone("low", number))
    options = ["--train", str(tmp_path / "more"), "--out", str(new)]
    options += ["--valid-share", "0.25", "--like", str(run)]
    assert main(["prepare", "wav", *options]) == 0
    with FrameCorpus.open(old) as before, FrameCorpus.open(new) as after:
        assert after.fingerprint == before.fingerprint
        assert after.provenance["options"]["features"] == features.to_dict()
        assert WordHmms.from_json(after.hmm).words == tuple(sorted(WORDS))
    capsys.readouterr()
    assert main(["prepare", "wav", *options, "--num-bins", "30"]) == 2
    assert "--like: words, features" in capsys.readouterr().err
    write_wav(tmp_path / "more" / "low_eve_9.wav", tone("low", 9), rate=16000)
    assert main(["prepare", "wav", *options]) == 2
    assert "16000 samples/s" in capsys.readouterr().err
