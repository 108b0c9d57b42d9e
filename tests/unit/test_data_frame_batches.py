"""Minibatches of frames: what is in them, equal numbers on all ranks, resuming."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.data.frame_batches import FramePool, FrameShards
from mpilm.data.frame_evaluation import FrameEvaluation, assemble, frames_of
from mpilm.data.frame_items import View, partition
from mpilm.data.frames import FrameCorpus, FrameSplit, FrameWriter
from mpilm.data.hdf5 import new_hdf5
from mpilm.errors import DataError
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual

LENGTHS = [7, 30, 12, 1, 25, 18, 3, 40, 22, 9, 16, 5]


def write(path: Path, lengths: list[int] = LENGTHS) -> Path:
    """Write a corpus whose features are (utterance, frame), with labels of the same.

    Label = 50 utterance + frame; the second frame of every third utterance has none,
    and the fourth utterance has no label at all.
    """
    with new_hdf5(path) as file:
        writer = FrameWriter(file, num_features=2, num_classes=50 * len(lengths))
        for u, length in enumerate(lengths):
            t = np.arange(length)
            labels = 50 * u + t
            labels[1:2] = -1 if u % 3 == 0 else labels[1:2]
            labels[:] = -1 if u == 3 else labels
            features = np.stack([np.full(length, u), t], axis=1)
            for split in ("train", "valid"):
                writer.append(split, f"u{u}", features, labels)
        writer.finish(path, {})
    return path


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> FrameSplit:
    path = write(tmp_path_factory.mktemp("frames") / "c.h5")
    return FrameCorpus.open(path).split("train")


def labelled(split: FrameSplit) -> list[int]:
    return sorted(y for u in split for y in u.labels_T.tolist() if y >= 0)


def check_frames(batch: Any, context: int, lengths: list[int] = LENGTHS) -> None:
    """Assert that inputs are the frames around the label, clamped to the utterance."""
    real = batch.targets >= 0
    frames = batch.inputs.reshape(*batch.targets.shape, 2 * context + 1, 2)
    for target, window in zip(batch.targets[real], frames[real], strict=True):
        u, t = divmod(int(target), 50)
        expected = np.clip(np.arange(t - context, t + context + 1), 0, lengths[u] - 1)
        assert (window[:, 0] == u).all()
        assert window[:, 1].tolist() == expected.tolist()


def epoch_of(source: Any) -> list[Any]:
    return [source.next() for _ in range(source.num_batches)]


@pytest.mark.parametrize("cache", [1, 40, 32768])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_epoch_of_frames_visits_each_once_but_for_the_tail(
    train: FrameSplit, size: int, cache: int
) -> None:
    view = View(context=2)
    sources = [FrameShards(train, view, 8, cache, r, size, seed=3) for r in range(size)]
    assert len({source.num_batches for source in sources}) == 1
    seen: list[int] = []
    for source in sources:
        for batch in epoch_of(source):
            assert batch.inputs.shape == (1, 8, 10)
            assert batch.inputs.dtype == np.float32
            assert batch.num_samples == 8
            check_frames(batch, 2)
            seen += batch.targets.ravel().tolist()
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(labelled(train))
    assert len(seen) + sources[0].num_dropped == len(labelled(train))
    assert all(source.epoch == 1.0 for source in sources)


@pytest.mark.parametrize("size", [1, 2])
def test_an_epoch_of_sub_sequences_visits_each_once(
    train: FrameSplit, size: int
) -> None:
    view = View(context=1, steps=6)
    sources = [FrameShards(train, view, 2, 60, r, size, seed=3) for r in range(size)]
    seen: list[int] = []
    for source in sources:
        for batch in epoch_of(source):
            assert batch.inputs.shape == (6, 2, 6)
            assert batch.num_samples == 12
            check_frames(batch, 1)
            for row in range(2):
                u, t = batch.inputs[:, row, 2], batch.inputs[:, row, 3].astype(int)
                assert t[0] % 6 == 0
                assert len(set(u.tolist())) == 1
                inside = t[0] + np.arange(6) < LENGTHS[int(u[0])]
                assert (batch.targets[~inside, row] == -1).all()
                assert (t == np.minimum(t[0] + np.arange(6), t[inside][-1])).all()
            seen += batch.targets[batch.targets >= 0].tolist()
    assert len(set(seen)) == len(seen)
    items = sum(-(-n // 6) for u, n in enumerate(LENGTHS) if u != 3)
    visited = sum(source.num_batches * 2 for source in sources)
    assert sources[0].num_dropped == (items - visited) * 6
    assert size > 1 or len(seen) > len(labelled(train)) - 12


def test_epochs_and_ranks_have_orders_of_their_own(train: FrameSplit) -> None:
    def order(rank: int, seed: int = 3) -> list[list[int]]:
        source = FrameShards(train, View(), 8, 100, rank, 2, seed=seed)
        return [
            np.concatenate([b.targets.ravel() for b in epoch_of(source)]).tolist()
            for _ in range(2)
        ]

    assert order(0) == order(0)
    assert order(0) != order(0, seed=4)
    first, second = order(0)
    assert first != second
    assert not set(first + second) & {t for epoch in order(1) for t in epoch}


def test_frames_are_shuffled_inside_the_cache_only(train: FrameSplit) -> None:
    source = FrameShards(train, View(), 4, 40, seed=1)  # 10 minibatches in a cache
    batches = epoch_of(source)
    utterances = [
        {t // 50 for b in batches[i : i + 10] for t in b.targets[0].tolist()}
        for i in range(0, len(batches), 10)
    ]
    for before, after in zip(utterances, utterances[2:], strict=False):
        assert not before & after  # an utterance lies in at most two caches in a row
    first = [t for b in batches[:10] for t in b.targets[0].tolist()]
    assert first != sorted(first)


@pytest.mark.parametrize("before", [0, 1, 9, 10, 23, 24, 40])
@pytest.mark.parametrize("steps", [0, 6])
def test_a_resumed_source_goes_on_to_the_bit(
    train: FrameSplit, before: int, steps: int
) -> None:
    make = {
        "shards": lambda: FrameShards(train, View(1, steps), 2, 20, 1, 2, seed=5),
        "pool": lambda: FramePool(train, View(1, steps), 2, 3, 1, 2, seed=5),
    }
    for kind in make.values():
        straight, resumed = kind(), kind()
        for _ in range(before):
            straight.next()
        resumed.load_state(straight.state())
        assert resumed.epoch == straight.epoch
        for _ in range(30):
            a, b = straight.next(), resumed.next()
            assert np.array_equal(a.inputs, b.inputs)
            assert np.array_equal(a.targets, b.targets)


def test_a_cursor_of_another_geometry_is_refused(train: FrameSplit) -> None:
    state = FrameShards(train, View(), 4, 40, seed=1).state()
    for other in (
        FrameShards(train, View(), 8, 40, seed=1),
        FrameShards(train, View(), 4, 40, seed=2),
        FrameShards(train, View(), 4, 80, seed=1),
        FrameShards(train, View(), 4, 40, 0, 2, seed=1),
    ):
        with pytest.raises(DataError, match="the place in the data was saved with"):
            other.load_state(state)


def test_too_many_ranks_are_refused_in_one_line(train: FrameSplit) -> None:
    with pytest.raises(DataError) as error:
        FrameShards(train, View(), 4, 40, 0, 12, seed=1)
    assert str(error.value) == (
        "12 ranks need as many utterances with labels, the train split of"
        f" {train.path} has 11"
    )
    with pytest.raises(DataError, match=r"smallest share .* has 2"):
        FrameShards(train, View(), 4, 40, 0, 11, seed=1)
    with pytest.raises(DataError, match="2 ranks x minibatch of 9 sub-sequences of 6"):
        FramePool(train, View(steps=6), 9, 20, 0, 2, seed=1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_fullest_shard_is_within_4_3_of_the_best_partition(
    lengths: list[int], size: int
) -> None:
    loads = np.bincount(partition(np.array(lengths), size), lengths, size)
    assert loads.sum() == sum(lengths)
    assert loads.max() - loads.min() <= max(lengths)
    best = min(
        np.bincount(ranks, lengths, size).max()
        for ranks in product(range(size), repeat=len(lengths))
    )
    assert loads.max() <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


# the common pool


def test_the_pool_gives_every_item_of_an_epoch_once(train: FrameSplit) -> None:
    sources = [FramePool(train, View(), 4, 3, r, 3, seed=2) for r in range(3)]
    chunks = sources[0].num_chunks
    assert sources[0].num_dropped == len(labelled(train)) - chunks * 12
    seen: list[int] = []
    for lease in range(chunks):
        for _ in range(3):
            seen += sources[lease % 3].next().targets.ravel().tolist()
    assert len(seen) == len(set(seen)) == chunks * 12
    assert sources[(chunks - 1) % 3].epoch == 1.0


def test_a_slow_rank_takes_fewer_chunks_of_the_pool(train: FrameSplit) -> None:
    handed_back = []

    def program(world: Any) -> list[int]:
        source = FramePool(
            train, View(), 4, 2, world.rank, world.size, seed=2, world=world
        )
        source.start()
        taken = []
        while source.epoch < 3.0:
            world.compute(lambda notify: None)
            source.next()
            taken.append(source.lease)
        handed_back[:] = source.state()["returned"].tolist()
        source.close()
        return taken

    faults = Faults(slow={"1": 4.0})
    worlds = run_virtual(program, 3, machine=Machine(step_s=0.01), faults=faults)
    counts = [len(set(taken)) for taken in worlds]
    assert counts[1] < counts[0] / 2
    leases = [lease for taken in worlds for lease in set(taken)] + handed_back
    assert sorted(leases) == list(range(len(leases)))


# evaluation


@pytest.mark.parametrize(
    "view", [View(2), View(1, 6), View(0, 6, whole=False)], ids=["dnn", "whole", "cut"]
)
@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_every_label_is_evaluated_once_in_the_same_minibatches(
    train: FrameSplit, view: View, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpilm.data.frame_evaluation.EVALUATED_FRAMES", 30)
    shares = [list(FrameEvaluation(train, view, 3, r, size)) for r in range(size)]
    batches = [batch for share in shares for batch in share]
    seen: list[int] = []
    for batch in batches:
        check_frames(batch, view.context)
        real = batch.targets[batch.targets >= 0].tolist()
        assert batch.num_samples == len(real)
        seen += real
    assert sorted(seen) == labelled(train)
    alone = list(FrameEvaluation(train, view, 3))
    found = {batch.targets.tobytes(): batch.inputs.tobytes() for batch in batches}
    assert found == {b.targets.tobytes(): b.inputs.tobytes() for b in alone}


def test_whole_utterances_are_padded_behind_their_length(train: FrameSplit) -> None:
    batch, *_ = FrameEvaluation(train, View(steps=6), 3)
    assert batch.lengths == (40, 30, 25)
    assert batch.inputs.shape == (40, 3, 2)
    assert (batch.targets[30:, 1] == -1).all()
    assert (batch.inputs[30:, 1] == batch.inputs[29, 1]).all()


@pytest.mark.parametrize("view", [View(2), View(1, 6), View(0, 6, whole=False)])
def test_outputs_come_back_in_the_order_of_frames(
    train: FrameSplit, view: View
) -> None:
    for u in range(len(train)):
        batch = assemble(view, [train.features(u)], [train.labels(u)])
        frames = frames_of(view, LENGTHS[u], batch.inputs)
        middle = frames[:, 2 * view.context : 2 * view.context + 2]
        assert np.array_equal(middle, train.features(u))


def test_a_split_without_a_label_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    with new_hdf5(path) as file:
        writer = FrameWriter(file, num_features=2, num_classes=3)
        writer.append("valid", "a", np.zeros((4, 2)))
        writer.finish(path, {})
    with FrameCorpus.open(path) as corpus, pytest.raises(DataError) as error:
        FrameEvaluation(corpus.split("valid"), View(), 3)
    assert str(error.value) == f"the valid split of {path} has no frame with a label"
