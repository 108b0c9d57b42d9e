"""Kaldi's files in: features, alignments, CMVN; every bad one is a line with a name."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import kaldiio
import numpy as np
import pytest

from mpilm.data.frames import FrameCorpus
from mpilm.data.kaldi_archives import Bad
from mpilm.data.kaldi_prepare import prepare_kaldi
from mpilm.errors import DataError
from tests.unit.kaldi_files import NUM_FEATURES, NUM_PDFS, make_folder, utterances


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "train")


def prepare(folder: Path, *alignments: str, **settings):
    settings = {"cmvn": "none", **settings}
    paths = [folder / name for name in alignments or ["pdf.ark"]]
    out = folder.parent / "c.h5"
    prepare_kaldi({"train": folder}, out, alignments=paths, **settings)
    return FrameCorpus.open(out)


def test_what_kaldi_wrote_is_what_the_corpus_holds(folder: Path) -> None:
    with prepare(folder, context=3) as corpus:
        assert (corpus.num_features, corpus.num_classes) == (NUM_FEATURES, NUM_PDFS)
        assert corpus.context == 3
        train = corpus.split("train")
        for found, expected in zip(train, utterances(), strict=True):
            name, features, pdfs = expected
            assert found.name == name
            assert found.features_TF.tobytes() == features.tobytes()
            assert found.labels_T.tobytes() == pdfs.tobytes()
            assert found.speaker == name.split("-")[0]
            assert found.text == f"THE WORDS {name[-1]}"
        counts = np.bincount(np.concatenate([p for *_, p in utterances()]))
        assert corpus.counts.tolist() == counts.tolist()


@pytest.mark.parametrize("form", ["pdf.txt", "pdf.scp", "post.ark", "column.ark"])
def test_alignments_come_in_many_forms(folder: Path, form: str) -> None:
    if form == "post.ark":
        targets = {n: np.eye(NUM_PDFS, dtype=np.float32)[p] for n, _, p in utterances()}
        kaldiio.save_ark(str(folder / form), targets)
    if form == "column.ark":
        targets = {n: p[:, None].astype(np.float32) for n, _, p in utterances()}
        kaldiio.save_ark(str(folder / form), targets)
    with prepare(folder, form) as corpus:
        for found, (_, _, pdfs) in zip(
            corpus.split("train"), utterances(), strict=True
        ):
            assert found.labels_T.tolist() == pdfs.tolist()


def test_alignments_may_be_spread_over_archives(folder: Path) -> None:
    lines = (folder / "pdf.txt").read_text().splitlines(keepends=True)
    (folder / "ali.1").write_text("".join(lines[:5]))
    (folder / "ali.2").write_text("".join(lines[5:]))
    with prepare(folder, "ali.1", "ali.2") as corpus:
        assert corpus.split("train").num_labelled == corpus.split("train").num_frames


@pytest.mark.parametrize("method", [1, 2, 3, 5])
def test_compressed_features_are_read_as_kaldiio_reads_them(tmp_path, method) -> None:
    folder = make_folder(tmp_path / "train", compression=method)
    expected = kaldiio.load_scp(str(folder / "feats.scp"))
    with prepare(folder) as corpus:
        for found in corpus.split("train"):
            assert np.array_equal(found.features_TF, expected[found.name])
            original = next(f for n, f, _ in utterances() if n == found.name)
            assert np.abs(found.features_TF - original).max() < 0.2


def test_text_archives_ranges_and_paths_beside_the_list(folder: Path) -> None:
    everything = {name: features for name, features, _ in utterances()}
    kaldiio.save_ark(str(folder / "text.ark"), everything, text=True)
    offsets = {}
    data = (folder / "text.ark").read_bytes()
    for name in everything:
        offsets[name] = data.index(f"{name} ".encode()) + len(name) + 1
    (folder / "feats.scp").write_text(
        "".join(f"{n} text.ark:{at}[2:7,1:2]\n" for n, at in offsets.items())
    )
    pdfs = "".join(f"{n} {' '.join(map(str, p[2:8]))}\n" for n, _, p in utterances())
    (folder / "pdf.txt").write_text(pdfs)
    with prepare(folder, "pdf.txt") as corpus:
        for found in corpus.split("train"):
            expected = everything[found.name][2:8, 1:3]
            np.testing.assert_allclose(found.features_TF, expected, rtol=1e-6)


# normalisation


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_cmvn_per_speaker(folder: Path, variance: bool, given: bool) -> None:
    frames: dict[str, list[np.ndarray]] = {}
    for name, features, _ in utterances():
        frames.setdefault(name.split("-")[0], []).append(features.astype(float))
    together = {s: np.concatenate(f) for s, f in frames.items()}
    if given:
        stats = {
            s: np.stack([np.append(f.sum(0), len(f)), np.append((f**2).sum(0), 0.0)])
            for s, f in together.items()
        }
        ark, scp = str(folder / "cmvn.ark"), str(folder / "cmvn.scp")
        kaldiio.save_ark(ark, stats, scp=scp)
    with prepare(folder, cmvn="speaker", variance=variance) as corpus:
        for found, (_, features, _) in zip(
            corpus.split("train"), utterances(), strict=True
        ):
            of_speaker = together[found.speaker]
            expected = features - of_speaker.mean(0)
            if variance:
                expected /= of_speaker.std(0)
            np.testing.assert_allclose(found.features_TF, expected, atol=1e-5)


def test_cmvn_per_utterance(folder: Path) -> None:
    with prepare(folder, cmvn="utterance", variance=True) as corpus:
        for found in corpus.split("train"):
            np.testing.assert_allclose(found.features_TF.mean(0), 0, atol=1e-6)
            np.testing.assert_allclose(found.features_TF.std(0), 1, atol=1e-5)


# splits


def test_splits_from_folders_and_from_shares(folder: Path) -> None:
    test = make_folder(folder.parent / "test", seed=2)
    out = folder.parent / "c.h5"
    seen = []
    summary = prepare_kaldi(
        {"train": folder, "test": test},
        out,
        alignments=[folder / "pdf.ark"],
        shares={"valid": 0.4},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(i, 48) for i in range(1, 49)]  # two passes for CMVN
    with FrameCorpus.open(out) as corpus:
        assert corpus.splits == ("train", "valid", "test")
        names = corpus.split("train").names + corpus.split("valid").names
        assert sorted(names) == sorted(name for name, *_ in utterances())
        assert 0 < summary.utterances["valid"] < 12
        counts = sum(
            np.bincount(u.labels_T, minlength=NUM_PDFS) for u in corpus.split("train")
        )
        assert corpus.counts.tolist() == counts.tolist()


def test_a_test_folder_without_alignments_has_no_labels(folder: Path) -> None:
    test = folder.parent / "test"
    test.mkdir()
    (test / "feats.scp").write_text(
        (folder / "feats.scp")
        .read_text()
        .replace("s0-", "t0-")
        .replace("s1-", "t1-")
        .replace("s2-", "t2-")
    )
    out = folder.parent / "c.h5"
    folders = {"train": folder, "test": test}
    prepare_kaldi(folders, out, alignments=[folder / "pdf.ark"], cmvn="none")
    with FrameCorpus.open(out) as corpus:
        assert corpus.split("test").num_labelled == 0
        assert corpus.split("test").num_frames == corpus.split("train").num_frames
    prepare_kaldi({"test": test}, out, num_classes=9, cmvn="none")
    with FrameCorpus.open(out) as corpus:
        assert (corpus.splits, corpus.num_classes) == (("test",), 9)


# bad input


def scp_lines(folder: Path) -> list[list[str]]:
    return [s.split() for s in (folder / "feats.scp").read_text().splitlines()]


def rewrite(folder: Path, lines: list[list[str]]) -> None:
    text = "".join(" ".join(line) + "\n" for line in lines)
    (folder / "feats.scp").write_text(text)


def replace_features(folder: Path, name: str, features: np.ndarray) -> None:
    ark = folder / "other.ark"
    kaldiio.save_ark(str(ark), {name: features})
    lines = scp_lines(folder)
    for line in lines:
        if line[0] == name:
            line[1] = f"{ark}:{len(name) + 1}"
    rewrite(folder, lines)


def nan_features(folder: Path) -> None:
    features = np.zeros((12, NUM_FEATURES), np.float32)
    features[5, 2] = np.nan
    replace_features(folder, "s1-u01", features)


def ragged_features(folder: Path) -> None:
    replace_features(folder, "s1-u01", np.zeros((12, 3), np.float32))


def long_alignment(folder: Path) -> None:
    pdfs = {n: p for n, _, p in utterances()}
    pdfs["s1-u01"] = np.append(pdfs["s1-u01"], [1, 2]).astype(np.int32)
    kaldiio.save_ark(str(folder / "pdf.ark"), pdfs)


def missing_alignment(folder: Path) -> None:
    pdfs = {n: p for n, _, p in utterances() if n != "s1-u01"}
    kaldiio.save_ark(str(folder / "pdf.ark"), pdfs)


def fractional_alignment(folder: Path) -> None:
    pdfs = {n: p.astype(np.float32) for n, _, p in utterances()}
    pdfs["s1-u01"][3] = 1.5
    kaldiio.save_ark(str(folder / "pdf.ark"), pdfs)


def infinite_targets(folder: Path) -> None:
    targets = {n: np.eye(NUM_PDFS, dtype=np.float32)[p] for n, _, p in utterances()}
    targets["s1-u01"][3] = np.nan
    kaldiio.save_ark(str(folder / "pdf.ark"), targets)


def missing_speaker(folder: Path) -> None:
    lines = (folder / "utt2spk").read_text().splitlines(keepends=True)
    (folder / "utt2spk").write_text("".join(s for s in lines if "s1-u01" not in s))


def outside(folder: Path) -> None:
    lines = scp_lines(folder)
    lines[1][1] = f"{folder / 'feats.ark'}:9999999"
    rewrite(folder, lines)


def nonsense(folder: Path) -> None:
    lines = scp_lines(folder)
    lines[1][1] = f"{folder / 'feats.ark'}:3"
    rewrite(folder, lines)


def missing_archive(folder: Path) -> None:
    lines = scp_lines(folder)
    lines[1][1] = "nowhere.ark:5"
    rewrite(folder, lines)


def pipe(folder: Path) -> None:
    lines = scp_lines(folder)
    lines[1][1:] = ["touch", f"{folder}/executed", "|"]
    rewrite(folder, lines)


def pickle(folder: Path) -> None:
    ark = folder / "pickle.ark"
    ark.write_bytes(b"s1-u01 PKL\x80\x04]\x94.")
    lines = scp_lines(folder)
    lines[1][1] = f"{ark}:7"
    rewrite(folder, lines)


def truncated(folder: Path) -> None:
    lines = scp_lines(folder)
    ark = folder / "short.ark"
    offset = int(lines[2][1].rsplit(":", 1)[1])
    data = (folder / "feats.ark").read_bytes()
    ark.write_bytes(data[: offset - 40])
    lines[1][1] = lines[1][1].replace("feats.ark", "short.ark")
    rewrite(folder, lines)


def huge(folder: Path) -> None:
    ark = folder / "huge.ark"
    header = b"\0BFM " + struct.pack("<bibi", 4, 2**31 - 1, 4, 2**31 - 1)
    ark.write_bytes(b"s1-u01 " + header)
    lines = scp_lines(folder)
    lines[1][1] = f"{ark}:7"
    rewrite(folder, lines)


def empty_matrix(folder: Path) -> None:
    replace_features(folder, "s1-u01", np.zeros((0, NUM_FEATURES), np.float32))


def bad_range(folder: Path) -> None:
    lines = scp_lines(folder)
    lines[1][1] += "[0:99]"
    rewrite(folder, lines)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (nan_features, "not finite in frame 5"),
        (ragged_features, "3 features in a frame, expected 4"),
        (long_alignment, "alignment of 14 frames is longer than the features (12)"),
        (missing_alignment, "has no alignment"),
        (fractional_alignment, "no whole numbers"),
        (infinite_targets, "labels are not finite"),
        (missing_speaker, "is not in"),
        (outside, "ends before byte 9999999"),
        (nonsense, "byte 3 begins no matrix"),
        (missing_archive, "nowhere.ark: No such file"),
        (pipe, "is a pipe"),
        (pickle, "begins no matrix"),
        (truncated, "truncated?"),
        (huge, "truncated?"),
        (empty_matrix, "has no frames"),
        (bad_range, "0:99 lies outside of (12, 4)"),
    ],
)
def test_a_bad_utterance_is_one_line_and_can_be_skipped(folder, damage, words) -> None:
    damage(folder)
    with pytest.raises(DataError) as error:
        prepare(folder, cmvn="speaker")
    line = str(error.value)
    assert line.startswith("utterance s1-u01: ")
    assert words in line
    assert line.count("utterance s1-u01") == 1
    assert "\n" not in line
    assert not (folder.parent / "c.h5").exists()
    assert not (folder / "executed").exists()
    bad = Bad(skip=True)
    with prepare(folder, cmvn="speaker", bad=bad) as corpus:
        assert bad.lines == {"s1-u01": line}
        names = corpus.split("train").names
        assert names == [n for n, *_ in utterances() if n != "s1-u01"]
        assert corpus.provenance["skipped"] == 1


def test_an_archive_of_alignments_that_breaks_off(folder: Path) -> None:
    """What follows the break is out of reach: skipped too, and counted."""
    data = (folder / "pdf.ark").read_bytes()
    (folder / "pdf.ark").write_bytes(data[: data.index(b"s0-u09") - 10])
    with pytest.raises(DataError, match=r"utterance s2-u08: .*truncated\?"):
        prepare(folder)
    bad = Bad(skip=True)
    with prepare(folder, bad=bad) as corpus:
        assert len(corpus.split("train")) == 8
        assert sorted(bad.lines) == ["s0-u09", "s1-u10", "s2-u08", "s2-u11"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("feats.scp", None, "feats.scp: No such file"),
        ("feats.scp", "", "feats.scp: is empty"),
        ("feats.scp", "a b\n\nc d\n", "line 2 is blank"),
        ("utt2spk", None, "has no utt2spk; --cmvn utterance or none needs none"),
        ("pdf.ark", "", "pdf.ark: holds no alignment"),
        ("pdf.ark", None, "pdf.ark: No such file"),
    ],
)
def test_bad_lists_are_one_line(folder: Path, name, content, words) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(DataError) as error:
        prepare(folder, cmvn="speaker")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_compressed_alignments_of_kaldi_are_explained(folder: Path) -> None:
    shutil.copy(folder / "pdf.ark", folder / "ali.1.gz")
    with pytest.raises(DataError, match="transition ids: ali-to-pdf"):
        prepare(folder, "ali.1.gz")


def test_when_every_utterance_is_bad_nothing_is_written(folder: Path) -> None:
    rewrite(folder, [[line[0], "nowhere.ark:5"] for line in scp_lines(folder)])
    with pytest.raises(DataError, match="no utterance has features"):
        prepare(folder, bad=Bad(skip=True))
    assert not (folder.parent / "c.h5").exists()


def test_text_matrices_as_kaldi_prints_them(folder: Path) -> None:
    """A number that happens to be whole has no point, and a line may end in CR LF."""
    everything = {name: features for name, features, _ in utterances()}
    for features in everything.values():
        features[0, 0] = 0.0
    lines, ends = [], "\n"
    for name, features in everything.items():
        rows = ["  " + " ".join(f"{x:.9g}" for x in row) for row in features]
        lines.append(f"{name}  [{ends}" + ends.join(rows) + f" ]{ends}")
        ends = "\r\n" if ends == "\n" else "\n"
    (folder / "text.ark").write_text("".join(lines), newline="")
    data = (folder / "text.ark").read_bytes()
    (folder / "feats.scp").write_text(
        "".join(
            f"{n} text.ark:{data.index(n.encode()) + len(n) + 1}\n" for n in everything
        )
    )
    with prepare(folder) as corpus:
        for found in corpus.split("train"):
            assert np.array_equal(found.features_TF, everything[found.name])


@pytest.mark.parametrize("beyond", range(1, 5))
def test_a_range_may_reach_three_frames_beyond_the_end(folder: Path, beyond) -> None:
    """As in Kaldi's holders: the tolerance is of rows and vectors, not of columns."""
    lengths = {name: len(pdfs) for name, _, pdfs in utterances()}
    for name in ("feats.scp", "pdf.scp"):
        lines = [line.split() for line in (folder / name).read_text().splitlines()]
        rows = {n: f"[1:{length - 1 + beyond}]" for n, length in lengths.items()}
        text = "".join(f"{n} {place}{rows[n]}\n" for n, place in lines)
        (folder / name).write_text(text)
    if beyond == 4:
        with pytest.raises(DataError, match=r"s0-u00: .*1:34 lies outside of \(31,\)"):
            prepare(folder, "pdf.scp")
        return
    with prepare(folder, "pdf.scp") as corpus:
        for found, (_, features, pdfs) in zip(
            corpus.split("train"), utterances(), strict=True
        ):
            assert found.features_TF.tobytes() == features[1:].tobytes()
            assert found.labels_T.tobytes() == pdfs[1:].tobytes()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("[0:31,0:4]", r"0:4 lies outside of \(31, 4\)"),
        ("[31:33]", r"31:33 lies outside of"),
        ("[5:4]", "5:4 is no range"),
        ("[:4]", ":4 is no range"),
    ],
)
def test_ranges_that_are_none(folder: Path, part: str, words: str) -> None:
    lines = scp_lines(folder)
    lines[0][1] += part
    rewrite(folder, lines)
    with pytest.raises(DataError, match=f"utterance s0-u00: .*{words}"):
        prepare(folder)
