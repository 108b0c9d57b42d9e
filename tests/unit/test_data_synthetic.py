"""The synthetic language: its floor is the entropy rate, and the text obeys it."""

from __future__ import annotations

import doctest
import tracemalloc
from math import exp
from pathlib import Path

import numpy as np
import pytest

from mpilm.data import synthetic
from mpilm.data.hdf5 import SPLITS, Corpus
from mpilm.data.synthetic import SyntheticLanguage, prepare_synthetic
from mpilm.errors import DataError


def transition_matrix(language: SyntheticLanguage) -> np.ndarray:
    """Return p(next context | context), (C, C), by plain loops."""
    vocab, order = language.vocab, language.order
    num_contexts = vocab**order
    p = np.zeros((num_contexts, num_contexts))
    for context in range(num_contexts):
        for weight, word in zip(
            language.weights, language.successors[context], strict=True
        ):
            p[context, (context * vocab + int(word)) % num_contexts] += weight
    return p


@pytest.mark.parametrize(
    ("vocab", "order", "branching"), [(4, 1, 2), (30, 1, 5), (8, 2, 3), (4, 3, 2)]
)
def test_the_floor_is_the_entropy_rate_of_the_chain(
    vocab: int, order: int, branching: int
) -> None:
    """Brute force: stationary distribution times the entropy of each row."""
    language = SyntheticLanguage(vocab, seed=3, order=order, branching=branching)
    p = transition_matrix(language)
    assert np.allclose(p.sum(axis=1), 1.0)
    values, vectors = np.linalg.eig(p.T)
    stationary = np.real(vectors[:, np.argmin(abs(values - 1.0))])
    stationary /= stationary.sum()
    assert np.allclose(stationary @ p, stationary)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    rate = -float(stationary @ (p * logs).sum(axis=1))
    assert language.entropy == pytest.approx(rate, rel=1e-9)
    assert language.floor == pytest.approx(exp(rate), rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize(("vocab", "order"), [(50, 1), (1000, 1), (20, 2)])
def test_an_ideal_predictor_reaches_the_floor_on_the_text(
    tmp_path: Path, vocab: int, order: int
) -> None:
    """-ln p of words are independent draws: the mean is H to within 5 sigma."""
    out = tmp_path / "s.h5"
    summary = prepare_synthetic(out, vocab=vocab, tokens=300_000, seed=5, order=order)
    language = SyntheticLanguage(vocab, seed=5, order=order)
    with Corpus.open(out) as corpus:
        assert corpus.floor == summary.floor == language.floor
        tokens = corpus.split("train")[:]
        joins = corpus.provenance["joins"]["train"]
        assert corpus.counts.tolist() == np.bincount(tokens, minlength=vocab).tolist()
    nll = language.nll(tokens)
    impossible = nll == np.log(vocab)
    assert impossible.sum() <= joins == 18 * order
    # joins by chance possible, and those that are not, are left out of the mean
    nll = nll[~impossible]
    log_w = -np.log(language.weights)
    sigma = np.sqrt(language.weights @ (log_w - language.entropy) ** 2 / len(nll))
    assert abs(nll.mean() - language.entropy) < 5 * sigma + joins / len(nll) * log_w[-1]
    # the bound on what joins do to the mean, as the module states it
    mean = (nll.sum() + impossible.sum() * np.log(vocab)) / len(impossible)
    excess = joins * (np.log(vocab) - language.entropy) / len(impossible)
    assert mean < language.entropy + 5 * sigma + excess


def test_an_estimate_from_the_text_alone_agrees() -> None:
    """Counts of word pairs, without knowing the language: the same entropy rate."""
    language = SyntheticLanguage(20, seed=9, branching=4)
    text = np.empty(400_000, np.int64)
    for start, words, _ in language.generate(len(text), np.random.default_rng(1)):
        text[start : start + len(words)] = words
    pairs = np.bincount(text[:-1] * 20 + text[1:], minlength=400).reshape(20, 20)
    p = pairs / pairs.sum(axis=1, keepdims=True)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    rate = -float((pairs.sum(axis=1) / pairs.sum()) @ (p * logs).sum(axis=1))
    assert rate == pytest.approx(language.entropy, abs=0.01)


@pytest.mark.parametrize("branching", [2, 5, 15])
def test_successors_are_different_and_every_word_can_be_reached(branching: int) -> None:
    language = SyntheticLanguage(30, seed=1, branching=branching)
    for row in language.successors.tolist():
        assert len(set(row)) == branching
    reached, found = {0}, {0}
    while found:
        found = {w for v in found for w in language.successors[v].tolist()} - reached
        reached |= found
    assert reached == set(range(30))


def test_same_seed_same_language_and_text(tmp_path: Path) -> None:
    def made(seed: int) -> list[list[int]]:
        path = tmp_path / "s.h5"
        prepare_synthetic(path, vocab=100, tokens=5000, seed=seed)
        with Corpus.open(path) as corpus:
            return [corpus.split(name)[:].tolist() for name in SPLITS]

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_splits_are_of_one_language_but_different(tmp_path: Path) -> None:
    out = tmp_path / "s.h5"
    prepare_synthetic(out, vocab=100, tokens=40_000, seed=1)
    language = SyntheticLanguage(100, seed=1)
    with Corpus.open(out) as corpus:
        valid, test = corpus.split("valid")[:], corpus.split("test")[:]
        assert not np.array_equal(valid, test)
        for tokens in (valid, test):
            assert np.all(language.nll(tokens) < np.log(100))


@pytest.mark.long
def test_the_size_of_a_block_does_not_change_the_text() -> None:
    language = SyntheticLanguage(50, seed=2, order=2)

    def text(block: int) -> np.ndarray:
        covered = np.zeros(100_000, np.int64)
        words_of = np.zeros(100_000, np.int64)
        rng = np.random.default_rng(7)
        for start, words, _ in language.generate(100_000, rng, block):
            words_of[start : start + len(words)] = words
            covered[start : start + len(words)] += 1
        assert np.all(covered == 1)
        return words_of

    whole = text(1 << 20)
    assert np.array_equal(text(1), whole)
    assert np.array_equal(text(997), whole)


@pytest.mark.long
def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "LEAST_CHAIN", 1 << 10)
    monkeypatch.setattr(synthetic, "MOST_CHAINS", 64)
    monkeypatch.setattr(synthetic, "BLOCK_STEPS", 256)

    def peak(tokens: int) -> int:
        tracemalloc.start()
        prepare_synthetic(tmp_path / "s.h5", vocab=1000, tokens=tokens)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(66_000)  # what is allocated once
    small, large = peak(66_000), peak(330_000)
    assert large < 1.2 * small, f"{small} bytes for 66,000 words, {large} for 330,000"


def test_a_large_vocabulary_has_wide_ids(tmp_path: Path) -> None:
    out = tmp_path / "s.h5"
    summary = prepare_synthetic(out, vocab=70_000, tokens=20_000)
    assert summary.vocabulary == 70_000
    with Corpus.open(out) as corpus:
        assert corpus.split("train").dtype == np.uint32
        assert corpus.vocabulary[69_999] == "w69999"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"vocab": 3}, "vocab 3"),
        ({"vocab": 10, "branching": 6}, "branching 6"),
        ({"vocab": 10, "branching": 1}, "branching 1"),
        ({"vocab": 10, "order": 0}, "order 0"),
        ({"vocab": 100_000, "order": 2}, "order 2"),
        ({"vocab": 10, "tokens": 10}, "tokens: 10"),
        ({"vocab": 10, "seed": -1}, "seed: -1"),
    ],
)
def test_sizes_that_do_not_fit(
    tmp_path: Path, options: dict[str, int], named: str
) -> None:
    with pytest.raises(DataError) as error:
        prepare_synthetic(tmp_path / "s.h5", **options)  # type: ignore[arg-type]
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(synthetic)
    assert result.attempted > 0
    assert result.failed == 0
