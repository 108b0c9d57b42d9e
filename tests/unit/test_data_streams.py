"""Streams: the same order of data at any number of ranks; every target once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data import streams as streams_module
from mpilm.data.batch import Batch
from mpilm.data.hdf5 import SPLITS, Announcer, Corpus, CorpusWriter, new_hdf5
from mpilm.data.streams import EvaluationStreams, Streams
from mpilm.data.synthetic import prepare_synthetic
from mpilm.errors import DataError


def positions(num_tokens: int) -> np.ndarray:
    """Return tokens that are their own positions."""
    return np.arange(num_tokens, dtype=np.uint32)


def corpus_of(path: Path, num_tokens: int) -> Corpus:
    """Return a corpus whose tokens are their own positions."""
    with new_hdf5(path) as file:
        words = [str(i) for i in range(num_tokens)]
        writer = CorpusWriter(file, level="word", vocabulary=words)
        for name in SPLITS:
            writer.append(name, positions(num_tokens))
        writer.finish(path, {})
    return Corpus.open(path)


def equal(a: Batch, b: Batch) -> bool:
    return (
        np.array_equal(a.inputs, b.inputs)
        and np.array_equal(a.targets, b.targets)
        and (a.num_samples, a.start) == (b.num_samples, b.start)
    )


@pytest.fixture(params=[1, 50, 1 << 20])
def read_ahead(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Any size of the read-ahead must give the same minibatches."""
    monkeypatch.setattr(streams_module, "READ_AHEAD_TOKENS", request.param)
    return int(request.param)


# training


def test_windows_of_small_streams_by_hand() -> None:
    """12 tokens, 2 rows, 2 steps: 11 targets, 2 windows of 4, 3 targets dropped."""
    source = Streams(positions(12), batch=2, steps=2)
    assert (source.num_windows, source.num_dropped, source.epoch) == (2, 3, 0.0)
    first, second, third = source.next(), source.next(), source.next()
    assert first.inputs.tolist() == [[0, 4], [1, 5]]
    assert first.targets.tolist() == [[1, 5], [2, 6]]
    assert second.inputs.tolist() == [[2, 6], [3, 7]]
    assert second.targets.tolist() == [[3, 7], [4, 8]]
    assert equal(first, third)
    assert [b.start for b in (first, second, third)] == [True, False, True]
    assert first.num_samples == 4
    assert source.epoch == 1.5
    assert first.inputs.dtype == first.targets.dtype == np.int64
    assert first.inputs.flags.c_contiguous
    assert first.targets.flags.c_contiguous


@pytest.mark.parametrize(("size", "batch"), [(2, 3), (3, 2), (6, 1), (1, 6)])
@pytest.mark.usefixtures("read_ahead")
def test_n_ranks_see_what_one_rank_sees(tmp_path: Path, size: int, batch: int) -> None:
    with corpus_of(tmp_path / "c.h5", 1000) as corpus:
        tokens = corpus.split("train")
        alone = Streams(tokens, batch=6, steps=7)
        ranks = [Streams(tokens, batch, 7, rank, size) for rank in range(size)]
        assert alone.num_windows == 23
        for _ in range(2 * alone.num_windows + 3):
            whole = alone.next()
            parts = [source.next() for source in ranks]
            together = Batch(
                np.concatenate([part.inputs for part in parts], axis=1),
                np.concatenate([part.targets for part in parts], axis=1),
                sum(part.num_samples for part in parts),
                parts[0].start,
            )
            assert equal(whole, together)
            assert {source.epoch for source in ranks} == {alone.epoch}
            assert {source.num_dropped for source in ranks} == {alone.num_dropped}


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(30, 400),
    batch=st.integers(1, 4),
    steps=st.integers(1, 6),
    size=st.integers(1, 3),
)
def test_an_epoch_visits_every_target_once_but_for_the_tail(
    num_tokens: int, batch: int, steps: int, size: int
) -> None:
    tokens = positions(num_tokens)
    if num_tokens - 1 < size * batch * steps:
        with pytest.raises(DataError, match="need at least"):
            Streams(tokens, batch, steps, 0, size)
        return
    seen: list[int] = []
    for rank in range(size):
        source = Streams(tokens, batch, steps, rank, size)
        rows: list[list[int]] = [[] for _ in range(batch)]
        while source.epoch < 1.0:
            minibatch = source.next()
            assert np.array_equal(minibatch.targets, minibatch.inputs + 1)
            for row in range(batch):
                rows[row] += minibatch.targets[:, row].tolist()
        for row in rows:  # each row goes on where it stopped
            assert row == list(range(row[0], row[0] + len(row)))
            seen += row
    assert sorted(seen) == list(range(1, num_tokens - source.num_dropped))
    assert source.num_dropped < size * batch * steps


def test_more_ranks_than_the_data_can_feed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    with corpus_of(path, 560) as corpus, pytest.raises(DataError) as error:
        Streams(corpus.split("train"), batch=20, steps=7, rank=0, size=4)
    assert str(error.value) == (
        "4 ranks x batch 20 x steps 7 need at least 561 tokens,"
        f" the train split of {path} has 560"
    )
    with corpus_of(path, 561) as corpus:
        source = Streams(corpus.split("train"), batch=20, steps=7, rank=3, size=4)
        assert source.num_windows == 1
        assert source.next().targets[-1, -1] == 560


@pytest.mark.usefixtures("read_ahead")
def test_windows_of_one_step() -> None:
    """The last token of a block that was read ahead is a target only."""
    source = Streams(positions(101), batch=2, steps=1)
    drawn = [source.next() for _ in range(50)]
    assert [b.inputs.tolist() for b in drawn] == [[[i, 50 + i]] for i in range(50)]
    assert all(np.array_equal(b.targets, b.inputs + 1) for b in drawn)


@pytest.mark.parametrize("before", [0, 1, 10, 23, 24, 40])
@pytest.mark.usefixtures("read_ahead")
def test_a_resumed_stream_goes_on_to_the_bit(tmp_path: Path, before: int) -> None:
    with corpus_of(tmp_path / "c.h5", 1000) as corpus:
        tokens = corpus.split("train")
        straight = Streams(tokens, 3, 7, rank=1, size=2)
        for _ in range(before):
            straight.next()
        resumed = Streams(tokens, 3, 7, rank=1, size=2)
        resumed.load_state(straight.state())
        assert resumed.epoch == straight.epoch
        for _ in range(60):
            assert equal(straight.next(), resumed.next())


def test_a_cursor_of_another_geometry_is_refused() -> None:
    state = Streams(positions(1000), 3, 7, rank=0, size=2).state()
    for other in (
        Streams(positions(1000), 3, 7, rank=0, size=1),
        Streams(positions(1000), 3, 8, rank=0, size=2),
        Streams(positions(1001), 3, 7, rank=0, size=2),
    ):
        with pytest.raises(DataError, match="the place in the data was saved with"):
            other.load_state(state)
    Streams(positions(1000), 6, 7).load_state(state)  # the same rows on one rank


def test_a_minibatch_may_be_written_to() -> None:
    source = Streams(positions(100), 2, 5)
    minibatch = source.next()
    minibatch.inputs[:] = -7
    assert minibatch.targets.min() >= 1
    assert source.next().inputs.min() >= 0


# evaluation


@settings(max_examples=80, deadline=None)
@given(
    num_tokens=st.integers(2, 300),
    streams=st.integers(1, 9),
    steps=st.integers(1, 8),
    size=st.integers(1, 12),
)
def test_every_target_is_predicted_once_over_all_ranks(
    num_tokens: int, streams: int, steps: int, size: int
) -> None:
    tokens = positions(num_tokens)
    seen: list[int] = []
    for rank in range(size):
        source = EvaluationStreams(tokens, streams, steps, rank, size)
        count = 0
        for minibatch in source:
            real = minibatch.targets >= 0
            assert minibatch.targets.shape[0] == steps
            assert minibatch.num_samples == real.sum()
            assert np.all(minibatch.targets[real] == minibatch.inputs[real] + 1)
            assert np.all(minibatch.targets[~real] == -1)
            assert np.all(minibatch.inputs[~real] == 0)
            seen += minibatch.targets[real].tolist()
            count += minibatch.num_samples
        assert count == source.num_targets
    assert sorted(seen) == list(range(1, num_tokens))


@pytest.mark.usefixtures("read_ahead")
def test_rows_are_the_same_at_any_number_of_ranks(tmp_path: Path) -> None:
    """What a row predicts, and from where, does not depend on the ranks."""

    def rows(size: int) -> list[list[int]]:
        found: list[list[int]] = []
        for rank in range(size):
            batches = list(EvaluationStreams(tokens, 5, 7, rank, size))
            assert [b.start for b in batches] == [i == 0 for i in range(len(batches))]
            if batches:
                targets = np.concatenate([b.targets for b in batches])
                found += [[t for t in row if t >= 0] for row in targets.T.tolist()]
        return found

    with corpus_of(tmp_path / "c.h5", 203) as corpus:
        tokens = corpus.split("valid")
        one = rows(1)
        assert len(one) == 5
        assert max(map(len, one)) - min(map(len, one)) <= 1
        for size in (2, 3, 5, 8):
            assert rows(size) == one


def test_an_evaluation_can_be_repeated() -> None:
    source = EvaluationStreams(positions(50), 4, 5)
    first, second = list(source), list(source)
    assert len(first) == len(second) == len(source) == 3
    assert all(equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_split_without_a_target_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    with corpus_of(path, 1) as corpus, pytest.raises(DataError) as error:
        EvaluationStreams(corpus.split("valid"), 4, 5)
    assert str(error.value) == f"the valid split of {path} has no token to predict"


def test_the_next_block_is_announced_before_it_is_read(tmp_path, monkeypatch):
    """What is read was announced, the first block excepted, and nothing else is."""
    monkeypatch.setattr("mpilm.data.streams.READ_AHEAD_TOKENS", 100)
    monkeypatch.setattr("mpilm.data.hdf5.CHUNK_TOKENS", 1 << 7)
    path = tmp_path / "c.h5"
    prepare_synthetic(path, vocab=20, tokens=5_000, seed=1)
    announced, read = [], []

    def advise(descriptor, offset, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        assert offset + length <= path.stat().st_size
        announced.append((offset, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    with Corpus.open(path) as corpus:
        tokens = corpus.split("train")
        chunks = {}
        for first in range(0, len(tokens), tokens.chunks[0]):
            info = tokens.id.get_chunk_info_by_coord((first,))
            chunks[first // tokens.chunks[0]] = info.byte_offset, info.size

        def noted(tokens, start, stop):
            read.append({chunks[k] for k in range(start // 128, (stop - 1) // 128 + 1)})
            return tokens[start:stop]

        monkeypatch.setattr("mpilm.data.streams.read_tokens", noted)
        streams = Streams(tokens, 2, 10)
        for _ in range(streams.num_windows + 3):  # into the second epoch
            before = set(announced)
            seen = len(read)
            streams.draw()
            for wanted in read[seen:] if seen else []:
                assert wanted <= before
    assert len(read) > 2 * 2
    assert set(announced) == set.union(*read)


def test_arrays_and_files_in_memory_are_not_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", None)
    Announcer(np.arange(10)).will_read(0, 10)
    monkeypatch.undo()
    with h5py.File(tmp_path / "x.h5", "w", driver="core", backing_store=False) as file:
        Announcer(file.create_dataset("x", data=np.arange(10), chunks=(5,))).will_read(
            0, 10
        )
        Announcer(file.create_dataset("y", data=np.arange(10))).will_read(0, 10)
