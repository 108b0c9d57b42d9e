"""prepare text: tokens as published, bad input named, constant memory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data import sources
from mpilm.data.hdf5 import SPLITS, Corpus, PrepareSummary
from mpilm.data.text import encode_prompt, prepare_text, text_from_ids
from mpilm.data.vocabulary import Characters, Words
from mpilm.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("MPILM_DATA", REPOSITORY.parent / "shared" / "data"))
WIKITEXT = DATA / "wikitext2-sample"


def spaced(tokens: list[str]) -> str:
    return " ".join(tokens)


def reference_words(text: str) -> list[str]:
    """Return the tokens as the usual loop over lines makes them."""
    words = []
    for line in text.splitlines():
        words += [*line.split(), "<eos>"]
    return words


def read(path: Path, split: str) -> list[str]:
    with Corpus.open(path) as corpus:
        return [corpus.vocabulary[i] for i in corpus.split(split)[:]]


def prepare(
    folder: Path, train: str, valid: str = "a\n", test: str = "a\n", **options: object
) -> PrepareSummary:
    for name, text in zip(SPLITS, (train, valid, test), strict=True):
        (folder / f"{name}.txt").write_text(text, newline="")
    paths = [folder / f"{name}.txt" for name in SPLITS]
    return prepare_text(*paths, folder / "c.h5", **options)  # type: ignore[arg-type]


# what the tokens are


def test_every_line_ends_in_eos_and_rare_words_are_unk(tmp_path: Path) -> None:
    train = " \n = Title = \n \n a b b <unk> \n"
    summary = prepare(tmp_path, train, "b z a", "\n", vocab=4)
    # <eos> 4 times; dropped words and <unk> 3 (a, Title, <unk>); then "=" and b, 2 each
    assert spaced(read(tmp_path / "c.h5", "train")) == (
        "<eos> = <unk> = <eos> <eos> <unk> b b <unk> <eos>"
    )
    assert spaced(read(tmp_path / "c.h5", "valid")) == "b <unk> <unk> <eos>"
    assert read(tmp_path / "c.h5", "test") == ["<eos>"]
    assert summary.vocabulary == 4
    assert summary.unknown == {"train": 3 / 11, "valid": 2 / 4, "test": 0.0}
    with Corpus.open(tmp_path / "c.h5") as corpus:
        assert corpus.vocabulary == ["<eos>", "<unk>", "=", "b"]
        assert corpus.counts.tolist() == [4, 3, 2, 2]
        assert corpus.provenance["train"] == {"words": 7, "lines": 4}


def test_line_ends_of_windows_and_a_byte_order_mark_are_no_words(
    tmp_path: Path,
) -> None:
    prepare(tmp_path, "\ufeffa b\r\nb\r\n")
    assert spaced(read(tmp_path / "c.h5", "train")) == "a b <eos> b <eos>"
    prepare(tmp_path, "\ufeffab\r\nb\r\n", level="char")
    assert read(tmp_path / "c.h5", "train") == ["a", "b", "<eos>", "b", "<eos>"]


@pytest.mark.parametrize("encoder", [Words, Characters])
def test_words_that_are_too_rare_are_unk(encoder: type[Words]) -> None:
    chosen = encoder()
    chosen.count("a b a c a b\n")
    chosen.choose(None, least=2)
    assert {"c", "z"}.isdisjoint(chosen.vocabulary)
    assert {"a", "b", "<unk>", "<eos>"} <= set(chosen.vocabulary)
    unk = chosen.vocabulary.index("<unk>")
    assert chosen.counts[unk] == 1
    assert np.count_nonzero(chosen.encode("a c b z\n") == unk) == 2


def test_a_line_has_one_eos_though_the_text_has_its_own(tmp_path: Path) -> None:
    plain = "a b\n\n c d \nlast"
    expected = "a b <eos> <eos> c d <eos> last <eos>"
    for text in (
        plain,
        "a b <eos>\n<eos>\n c d <eos> \t\r\nlast <eos>",
        "a b<eos>\n<eos>\nc d <eos>\nlast<eos>\n",
        "a b <eos> <eos> c d <eos> last <eos>",
        "a b <eos>\n<eos> c d <eos> last",
    ):
        prepare(tmp_path, text, text, text)
        for split in SPLITS:
            assert spaced(read(tmp_path / "c.h5", split)) == expected
    with Corpus.open(tmp_path / "c.h5") as corpus:
        assert corpus.counts[corpus.ids["<eos>"]] == 4
    prepare(tmp_path, "a <EOS>\n", lower=True)
    assert spaced(read(tmp_path / "c.h5", "train")) == "a <eos>"


def test_at_level_char_a_literal_eos_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="2 line ends are spelled <eos>"):
        prepare(tmp_path, "a <eos>\nb<eos>\na <eos> b\n", level="char")
    assert spaced(read(tmp_path / "c.h5", "train")).startswith("a   < e o s > <eos> b")


def test_lower_case(tmp_path: Path) -> None:
    prepare(tmp_path, "The the \u00c9t\u00e9\n", lower=True)
    assert read(tmp_path / "c.h5", "train") == ["the", "the", "\u00e9t\u00e9", "<eos>"]


def test_characters(tmp_path: Path) -> None:
    summary = prepare(tmp_path, "ab \U0001f600\n\nba", "az\n", level="char")
    train = ["a", "b", " ", "\U0001f600", "<eos>", "<eos>", "b", "a", "<eos>"]
    assert read(tmp_path / "c.h5", "train") == train
    assert read(tmp_path / "c.h5", "valid") == ["a", "<unk>", "<eos>"]
    assert (summary.level, summary.vocabulary) == ("char", 6)


@pytest.mark.long
def test_the_same_text_gives_the_same_file_at_another_time(tmp_path: Path) -> None:
    prepare(tmp_path, "a b\n", vocab=4)
    first = (tmp_path / "c.h5").read_bytes()
    time.sleep(1.1)  # times in HDF5 are in seconds
    prepare(tmp_path, "a b\n", vocab=4)
    assert (tmp_path / "c.h5").read_bytes() == first


def test_all_words_are_kept_without_a_limit(tmp_path: Path) -> None:
    summary = prepare(tmp_path, "b a c a\n")
    with Corpus.open(tmp_path / "c.h5") as corpus:
        assert corpus.vocabulary == ["a", "<eos>", "b", "c", "<unk>"]
    assert summary.unknown["train"] == 0.0


@pytest.mark.long
@pytest.mark.parametrize("encoder", [Words, Characters])
@settings(max_examples=50, deadline=None)
@given(
    text=st.lists(st.sampled_from([*"ab \n\t\u00e9\U0001f600", "<eos>"])).map("".join)
)
def test_no_block_size_changes_the_tokens(encoder: type[Words], text: str) -> None:
    """Blocks of any size hold what one block of everything holds."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"mpilm-blocks-{os.getpid()}.txt"
    raw = text.encode()
    path.write_bytes(raw)
    one = encoder()
    whole = text if text.endswith("\n") else text + "\n"
    one.count(whole)
    one.choose(None)
    expected = one.encode(whole).tolist() if raw else []
    try:
        for size in (1, 2, 3, 5, 1000):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sources, "BLOCK_BYTES", size)
                part = sources.Part(sources.Source(path, len(raw)), 0, len(raw))
                texts = [block for block, _ in part.blocks(hashing=True)]
            ids = [i for block in texts for i in one.encode(block).tolist()]
            assert ids == expected
            digest = part.source.digest.hexdigest()
            assert digest == hashlib.sha256(raw).hexdigest()
    finally:
        path.unlink()


# files and splits


def test_a_folder_of_a_corpus_as_distributed_gives_all_splits(tmp_path: Path) -> None:
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for name, text in (("train", "a a b\n"), ("valid", "b\n"), ("test", "a\n")):
        (folder / f"wiki.{name}.tokens").write_text(text)
    prepare_text(folder, None, None, tmp_path / "c.h5")
    assert read(tmp_path / "c.h5", "train") == ["a", "a", "b", "<eos>"]
    assert read(tmp_path / "c.h5", "valid") == ["b", "<eos>"]
    assert read(tmp_path / "c.h5", "test") == ["a", "<eos>"]


def test_several_files_and_folders_for_one_split(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "2.txt").write_text("c")
    (folder / "1.txt").write_text("b\n")
    (folder / ".hidden").write_text("x")
    (tmp_path / "0.txt").write_text("a\n")
    (tmp_path / "v.txt").write_text("a\n")
    files = [tmp_path / "0.txt", folder]
    valid = tmp_path / "v.txt"
    prepare_text(files, valid, valid, tmp_path / "c.h5")
    assert spaced(read(tmp_path / "c.h5", "train")) == "a <eos> b <eos> c <eos>"


@pytest.mark.parametrize("num_files", [1, 3])
def test_missing_splits_are_the_end_of_the_train_text(
    tmp_path: Path, num_files: int
) -> None:
    lines = [f"w{number:05}\n" for number in range(3000)]
    files = []
    for number in range(num_files):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text("".join(lines[number::num_files]))
    text = "".join("".join(lines[number::num_files]) for number in range(num_files))
    summary = prepare_text(files, None, None, tmp_path / "c.h5", share=0.1)
    # cut at line ends: whole words, nothing lost or repeated, in order
    pieces = [read_words(tmp_path / "c.h5", name, text) for name in SPLITS]
    assert [word for piece in pieces for word in piece] == reference_words(text)
    assert summary.tokens["valid"] == pytest.approx(600, abs=4)
    assert summary.tokens["test"] == pytest.approx(600, abs=4)
    with Corpus.open(tmp_path / "c.h5") as corpus:
        # words of valid and test are unknown: the vocabulary is that of train alone
        assert summary.unknown["valid"] == pytest.approx(0.5, abs=0.01)
        hashes = {s["path"]: s["sha256"] for s in corpus.provenance["sources"]}
    for file in files:
        assert hashes[str(file)] == hashlib.sha256(file.read_bytes()).hexdigest()


def read_words(path: Path, split: str, text: str) -> list[str]:
    """Return the words of a split from the byte ranges in its provenance."""
    words = []
    with Corpus.open(path) as corpus:
        for source in corpus.provenance["sources"]:
            if source["split"] == split:
                raw = Path(source["path"]).read_bytes()
                piece = raw[source["start"] : source["stop"]].decode()
                words += reference_words(piece)
        assert len(corpus.split(split)) == len(words)
    return words


def test_one_missing_split_is_taken_and_the_other_read(tmp_path: Path) -> None:
    train, test = tmp_path / "train.txt", tmp_path / "test.txt"
    train.write_text("a b\n" * 1000)
    test.write_text("b\n")
    summary = prepare_text(train, None, test, tmp_path / "c.h5", share=0.2)
    assert summary.tokens == {"train": 2400, "valid": 600, "test": 2}


def test_a_text_of_one_long_line_is_cut_at_a_space(tmp_path: Path) -> None:
    (tmp_path / "text8").write_text("ab " * 10_000)
    summary = prepare_text(tmp_path / "text8", None, None, tmp_path / "c.h5")
    assert sum(summary.tokens.values()) == 10_000 + 3  # and an <eos> for each part


def test_progress_goes_from_nothing_to_everything(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(tmp_path, "a b\n" * 100, progress=lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1] == 2 * (400 + 2 + 2)
    assert seen == sorted(seen)


# prompts


def test_prompt_and_text_are_each_others_inverse() -> None:
    words = ["<eos>", "<unk>", "the", "cat"]
    ids = encode_prompt("The cat barks", words, "word")
    assert ids == [0, 2, 3, 1]
    assert text_from_ids([*ids, 0, 3, 0], words, "word") == "the cat <unk>\ncat"
    assert encode_prompt("", words, "word") == [0]
    characters = ["a", "<eos>", "b", " "]
    ids = encode_prompt("b a", characters, "char")
    assert ids == [1, 2, 3, 0]
    assert text_from_ids([*ids, 1, 0], characters, "char") == "b a\na"
    with pytest.raises(DataError, match="'z' is not in the vocabulary"):
        encode_prompt("z", characters, "char")


# size


@pytest.mark.long
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak memory of some 40 MB of text is that of 5 MB, to a few MB of noise."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, as Linux has it")
    code = (
        "import sys\n"
        "from mpilm.data.text import prepare_text\n"
        "prepare_text(sys.argv[1], None, None, sys.argv[1] + '.h5')\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print(*(line.split()[1] for line in lines if line.startswith('VmHWM')))\n"
    )
    words = np.random.default_rng(1).integers(0, 5000, 500_000)
    text = " ".join(f"word{word}" for word in words).replace("word1 ", "word1\n")

    def peak_kb(copies: int) -> int:
        path = tmp_path / f"{copies}.txt"
        path.write_text((text + "\n") * copies)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            check=True,
            timeout=100,
            capture_output=True,
            text=True,
        )
        return int(done.stdout)

    small, large = peak_kb(1), peak_kb(8)
    assert (tmp_path / "8.txt").stat().st_size > 30e6
    assert large - small < 12_000, f"{small} kB for 1 copy, {large} kB for 8"


# real text


def test_wikitext_has_its_published_number_of_tokens(tmp_path: Path) -> None:
    if not WIKITEXT.is_dir():
        pytest.skip(f"no {WIKITEXT} (set MPILM_DATA)")
    valid = WIKITEXT / "wiki.valid.tokens"
    test = WIKITEXT / "wiki.test-a.tokens"
    out = tmp_path / "c.h5"
    summary = prepare_text(valid, test, test, out, vocab=8000)
    text = valid.read_text(encoding="utf-8")
    words = reference_words(text)
    # WikiText-2 valid: 213,886 words; 217,646 tokens with <eos>, as in the literature
    assert len(words) == 217_646
    assert summary.tokens["train"] == 217_646
    counts = Counter(words)
    with Corpus.open(out) as corpus:
        assert corpus.provenance["train"] == {"words": 213_886, "lines": 3_760}
        assert len(corpus.vocabulary) == 8000
        known = corpus.ids
        expected = [w if w in known else "<unk>" for w in words]
        ids = corpus.split("train")[:]
        assert [corpus.vocabulary[i] for i in ids] == expected
        assert np.all(np.diff(corpus.counts) <= 0)
        assert np.bincount(ids).tolist() == corpus.counts.tolist()
        least = min(counts[w] for w in known if w not in ("<unk>", "<eos>"))
        dropped = [n for w, n in counts.items() if w not in known]
        assert max(dropped) <= least
