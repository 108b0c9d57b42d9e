"""Damaged tokens are noticed when they are read, and the file is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpilm.data.hdf5 import Corpus
from mpilm.data.pool import PoolBatches
from mpilm.data.streams import EvaluationStreams, Streams
from mpilm.data.synthetic import prepare_synthetic
from mpilm.errors import DataError
from mpilm.train.evaluate import unigram_perplexity


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in whose train and valid splits one bit has changed."""
    path = tmp_path_factory.mktemp("damaged") / "corpus.h5"
    prepare_synthetic(path, vocab=40, tokens=20_000, seed=3, branching=4)
    with Corpus.open(path) as corpus:
        places = [
            corpus.split(name).id.get_chunk_info(0).byte_offset + 1000
            for name in ("train", "valid")
        ]
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0x10]))
    return path


@pytest.mark.parametrize(
    ("split", "read"),
    [
        ("train", lambda tokens: Streams(tokens, 2, 10).next()),
        ("train", lambda tokens: PoolBatches(tokens, 2, 10, 4, seed=1).next()),
        ("valid", lambda tokens: list(EvaluationStreams(tokens, 4, 10))),
    ],
    ids=["streams", "pool", "evaluation"],
)
def test_a_changed_bit_is_an_error_that_names_file_and_split(damaged, split, read):
    with Corpus.open(damaged) as corpus, pytest.raises(DataError) as caught:
        read(corpus.split(split))
    assert f"the {split} split of {damaged} is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_unigram_baseline_reads_no_damaged_tokens(damaged):
    with Corpus.open(damaged) as corpus, pytest.raises(DataError, match="damaged"):
        unigram_perplexity(corpus, "valid")
