"""prepare text --level subword: pieces, their words, and back to text."""

from __future__ import annotations

import builtins
import math
from pathlib import Path

import numpy as np
import pytest

from mpilm.commands.evaluate import eval_, generate
from mpilm.config import resolve
from mpilm.data.hdf5 import SPLITS, Corpus
from mpilm.data.subwords import prompt_pieces, text_of_pieces, tokenizer_of
from mpilm.data.text import prepare_text
from mpilm.errors import DataError
from mpilm.train.loop import Trainer
from mpilm.train.task import LanguageTask
from mpilm.world.virtual import run_virtual

tokenizers = pytest.importorskip("tokenizers")

LINES = ["the cat sat on the mat", "", "a dog and the cats <unk> ran", " = Title = "]
TEXT = "\n".join(LINES * 40) + "\n"
VALID = "the cats ran on\na z\u00e9bra sat <eos>\n"


def prepare(folder: Path, train: str = TEXT, valid: str = VALID, **options) -> Path:
    for name, text in (("train", train), ("valid", valid), ("test", valid)):
        (folder / f"{name}.txt").write_text(text)
    out = folder / "c.h5"
    paths = [folder / f"{name}.txt" for name in SPLITS]
    given = {"vocab": 40, **options}
    prepare_text(*paths, out, level="subword", **given)
    return out


def pieces(corpus: Corpus, split: str) -> list[str]:
    return [corpus.vocabulary[i] for i in corpus.split(split)[:].tolist()]


def test_pieces_give_the_words_back_and_line_ends_are_eos(tmp_path: Path) -> None:
    with Corpus.open(prepare(tmp_path)) as corpus:
        assert corpus.level == "subword"
        made = tokenizer_of(corpus.tokenizer, "x")
        assert len(corpus.vocabulary) == made.get_vocab_size() + 1
        assert 20 < len(corpus.vocabulary) <= 40
        found = pieces(corpus, "train")
        lines = "".join(found).split("<eos>")
        assert lines.pop() == ""
        # a literal <unk> has no mark of its own
        marked = [line.replace("<unk>", "\u2581<unk>") for line in lines]
        words = [line.replace("\u2581", " ").split() for line in marked]
        assert words == [line.split() for line in LINES * 40]
        assert found.count("<unk>") == 40  # no character of train is unknown
        assert pieces(corpus, "valid").count("<eos>") == 2
        assert "<unk>" in pieces(corpus, "valid")  # z, and e with an accent
        counts = np.bincount(corpus.split("train")[:], minlength=len(corpus.counts))
        assert counts.tolist() == corpus.counts.tolist()
        assert (np.diff(corpus.counts) <= 0).all()  # most frequent first


def test_words_are_those_of_level_word(tmp_path: Path) -> None:
    with Corpus.open(prepare(tmp_path)) as corpus:
        numbers = {name: corpus.num_words(name) for name in SPLITS}
        task = LanguageTask(corpus)
        num_targets = len(corpus.split("valid")) - 1
        found = task.word_perplexity("valid", 0.7)
        expected = math.exp(0.7 * num_targets / (numbers["valid"] - 1))
        assert found == pytest.approx(expected)
    paths = [tmp_path / f"{name}.txt" for name in SPLITS]
    summary = prepare_text(*paths, tmp_path / "words.h5")
    assert numbers == summary.tokens
    with Corpus.open(tmp_path / "words.h5") as corpus:
        assert LanguageTask(corpus).word_perplexity("valid", 0.7) is None


def test_blocks_do_not_change_the_pieces(tmp_path: Path, monkeypatch) -> None:
    with Corpus.open(prepare(tmp_path)) as corpus:
        whole = [pieces(corpus, name) for name in SPLITS]
        words = [corpus.num_words(name) for name in SPLITS]
    monkeypatch.setattr("mpilm.data.sources.BLOCK_BYTES", 13)
    with Corpus.open(prepare(tmp_path)) as corpus:
        assert [pieces(corpus, name) for name in SPLITS] == whole
        assert [corpus.num_words(name) for name in SPLITS] == words


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, show_progress=False
    )
    own.train_from_iterator(LINES, trainer)
    own.save(str(tmp_path / "tokenizer.json"))
    out = prepare(tmp_path, vocab=None, tokenizer=tmp_path / "tokenizer.json")
    with Corpus.open(out) as corpus:
        ids = own.encode(LINES[0], add_special_tokens=False).tokens
        assert pieces(corpus, "train")[: len(ids) + 1] == [*ids, "<eos>"]
        again = tokenizer_of(corpus.tokenizer, "x")
        line = corpus.split("train")[: len(ids) + 1].tolist()
        assert text_of_pieces(line, corpus.vocabulary, again) == LINES[0]


@pytest.mark.long
def test_trained_evaluated_and_generated_from(tmp_path: Path, capsys) -> None:
    corpus = prepare(tmp_path)
    document = {
        "data": {"corpus": str(corpus)},
        "model": {"embed": 8, "hidden": 8},
        "train": {"batch": 2, "unroll": 5, "samples": 300, "eval_streams": 2},
        "optim": {"lr": 1.0},
    }
    config = resolve(document)
    run_virtual(lambda world: Trainer(config, world, tmp_path / "run").train(), 1)
    capsys.readouterr()
    eval_(tmp_path / "run", split="valid")
    first, second, *_ = capsys.readouterr().out.splitlines()
    with Corpus.open(corpus) as opened:
        ratio = (len(opened.split("valid")) - 1) / (opened.num_words("valid") - 1)
        vocabulary = opened.vocabulary
        tokenizer = tokenizer_of(opened.tokenizer, "x")
    per_piece, per_word = (float(line.split()[-1]) for line in (first, second))
    assert second.startswith("valid perplexity per word ")
    assert math.log(per_word) == pytest.approx(ratio * math.log(per_piece), rel=1e-3)
    generate(tmp_path / "run", prompt="the cat", tokens=3, temperature=0.0)
    assert capsys.readouterr().out.startswith("the cat")
    ids = prompt_pieces("the cat", vocabulary, tokenizer)
    assert vocabulary[ids[0]] == "<eos>"
    assert text_of_pieces(ids, vocabulary, tokenizer) == "the cat"


def test_lower_case(tmp_path: Path) -> None:
    with Corpus.open(prepare(tmp_path, TEXT.replace("cat", "CAT"), lower=True)) as c:
        assert not any(p != p.lower() for p in c.vocabulary)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": None}, "level subword: either vocab"),
        ({"tokenizer": Path("x.json")}, "level subword: either vocab"),
        ({"vocab": 5}, "vocab: 5 pieces are too few; 17 is the least"),
        ({"vocab": None, "tokenizer": Path("none.json")}, "none.json cannot be read"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message) -> None:
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c.h5").exists()


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=r"tokenizer\.json is no tokenizer\.json: "):
        prepare(tmp_path, vocab=None, tokenizer=path)
    with pytest.raises(DataError, match="goes with level subword, not word"):
        prepare_text(path, path, path, tmp_path / "c.h5", tokenizer=path)


def test_without_the_library_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "tokenizers":
            raise ImportError("No module named 'tokenizers'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'mpilm\[subwords\]'"):
        prepare(tmp_path)
