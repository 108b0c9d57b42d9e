"""Checkpoints of several ranks: agreement, order, fallback."""

from __future__ import annotations

import errno
import itertools
import os
import shutil

import h5py
import numpy as np
import pytest

import mpilm.storage.checkpoint as checkpoint_module
from mpilm.errors import CheckpointError
from mpilm.storage.checkpoint import Checkpoints, CheckpointWarning, load_shared
from mpilm.storage.state_file import write_state
from mpilm.world.virtual import run_virtual


def state(step, rank=None):
    """Return a state that tells step and rank from its content."""
    number = step if rank is None else 100 * step + rank
    return {"theta": np.full(1000, number, np.float32), "about/number": number}


def save(folder, step, *, size=2, **settings):
    """Save a checkpoint on `size` ranks; return it."""

    def main(world):
        checkpoints = Checkpoints(folder, world, **settings)
        return checkpoints.save(step, state(step), state(step, world.rank))

    first, *others = run_virtual(main, size)
    assert all(other == first for other in others)
    return first


def latest(folder, size=2):
    """Return the newest checkpoint, as all ranks see it."""
    first, *others = run_virtual(lambda w: Checkpoints(folder, w).latest(), size)
    assert all(other == first for other in others)
    return first


def load(folder, size=2):
    """Load the newest checkpoint, check every rank's content; return its step."""

    def main(world):
        checkpoints = Checkpoints(folder, world)
        newest = checkpoints.latest()
        shared, own = checkpoints.load(newest)
        for found, expected in (
            (shared, state(newest.step)),
            (own, state(newest.step, world.rank)),
        ):
            assert found.keys() == expected.keys()
            assert found["about/number"] == expected["about/number"]
            assert (found["theta"] == expected["theta"]).all()
        return newest.step

    return run_virtual(main, size)[0]


def errors(main, size=2):
    """Return the line of the CheckpointError that every rank must raise."""

    def caught(world):
        with pytest.raises(CheckpointError) as error:
            main(world)
        assert error.value.everywhere
        return str(error.value)

    lines = run_virtual(caught, size)
    assert len(set(lines)) == 1
    assert "\n" not in lines[0]
    return lines[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_rank_gets_its_own_back(tmp_path, size):
    folder = tmp_path / "run" / "checkpoints"
    saved = save(folder, 12, size=size)
    assert saved.path == folder / "step-000000012"
    assert names(saved.path) == [f"rank-{r:04d}.h5" for r in range(size)] + [
        "shared.h5"
    ]
    assert latest(folder, size) == saved
    assert load(folder, size) == 12
    assert load_shared(folder)["about/number"] == 12


def test_none_yet(tmp_path):
    assert latest(tmp_path) is None
    assert latest(tmp_path / "missing") is None
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no checkpoint"):
        load_shared(tmp_path)


def test_the_newest_are_kept(tmp_path):
    for step in 5, 10, 20, 1_234_567_890:
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000000020", "step-1234567890"]
    assert load(tmp_path) == 1_234_567_890
    save(tmp_path, 1_234_567_891, keep=1)
    assert names(tmp_path) == ["step-1234567891"]


def test_the_folder_is_named_after_the_step_of_rank_0(tmp_path):
    def main(world):
        return Checkpoints(tmp_path, world).save(7 + world.rank, {}, {})

    assert [c.step for c in run_virtual(main, 3)] == [7, 7, 7]
    assert names(tmp_path) == ["step-000000007"]


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / "step-000000010" / "rank-0000.h5").write_bytes(b"broken")
    save(tmp_path, 10)
    assert names(tmp_path) == ["step-000000005", "step-000000010"]
    assert load(tmp_path) == 10


def test_a_run_that_went_back_leaves_the_later_checkpoints(tmp_path):
    for step in 10, 20:
        save(tmp_path, step)
    save(tmp_path, 15)
    assert names(tmp_path) == ["step-000000010", "step-000000015"]


def test_leftovers_are_ignored_and_then_removed(tmp_path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-000000010", tmp_path / "step-000000020.partial")
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "step-000000030.txt").write_text("")
    assert load(tmp_path) == 10
    assert load_shared(tmp_path)["about/number"] == 10
    save(tmp_path, 11)
    assert "step-000000020.partial" not in names(tmp_path)


def test_killed_between_the_two_renames(tmp_path):
    """The old checkpoint of the step has made way, the new one is not there yet."""
    save(tmp_path, 10)
    (tmp_path / "step-000000010").rename(tmp_path / "step-000000010.replaced")
    assert load(tmp_path) == 10
    save(tmp_path, 11)
    assert names(tmp_path) == ["step-000000010", "step-000000011"]


def test_killed_before_the_replaced_one_was_removed(tmp_path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "step-000000010", tmp_path / "step-000000010.replaced")
    (tmp_path / "step-000000010.replaced" / "shared.h5").write_bytes(b"older")
    assert load(tmp_path) == 10
    save(tmp_path, 11)
    assert names(tmp_path) == ["step-000000010", "step-000000011"]


def flip(path):
    with h5py.File(path) as file:
        place = file["state/theta"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[place + 1234] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


def replace_by_another_step(path):
    shutil.copy(path.parent.with_name("step-000000010") / path.name, path)


def replace_by_another_size(path):
    header = {"step": 20, "size": 3, "rank": int(path.stem[-1])}
    write_state(path, {}, **header)


def replace_by_text(path):
    path.write_text("not HDF5")


DAMAGES = [flip, truncate, empty, remove, replace_by_another_step, replace_by_text]
BROKEN = [
    *itertools.product(["shared.h5", "rank-0000.h5", "rank-0001.h5"], DAMAGES),
    ("rank-0001.h5", replace_by_another_size),
]


@pytest.mark.parametrize(("name", "damage"), BROKEN)
def test_a_broken_one_is_passed_over_with_a_warning(tmp_path, name, damage):
    save(tmp_path, 10)
    damage(save(tmp_path, 20).path / name)
    with pytest.warns(CheckpointWarning, match=f"passed over .*step-000000020/{name}"):
        assert load(tmp_path) == 10


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_shared_part_alone_falls_back_too(tmp_path, damage):
    save(tmp_path, 10)
    damage(save(tmp_path, 20).path / "shared.h5")
    with pytest.warns(CheckpointWarning, match="passed over"):
        assert load_shared(tmp_path)["about/number"] == 10


def test_the_shared_part_needs_no_other(tmp_path):
    flip(save(tmp_path, 20).path / "rank-0001.h5")
    assert load_shared(tmp_path)["about/number"] == 20


def test_all_broken_is_an_error_on_every_rank(tmp_path):
    for step in 10, 20:
        truncate(save(tmp_path, step).path / "rank-0001.h5")
    with pytest.warns(CheckpointWarning):
        line = errors(lambda world: Checkpoints(tmp_path, world).latest())
    assert line.startswith(
        f"{tmp_path}: no checkpoint can be read; the newest: rank 1: "
    )
    assert "step-000000020/rank-0001.h5: " in line


def test_broken_after_it_was_chosen_is_an_error_on_every_rank(tmp_path):
    newest = save(tmp_path, 10)
    flip(newest.path / "rank-0001.h5")
    line = errors(lambda world: Checkpoints(tmp_path, world).load(newest))
    path = newest.path / "rank-0001.h5"
    assert line == f"rank 1: {path}: corrupt: theta does not match its checksum"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_on_another_number_of_ranks_every_file_is_read_once(tmp_path, size):
    def write(world):
        theta = np.full(3, 2.0**world.rank, np.float32)
        own = {"learner/theta": theta, "strategy/steps": 7 + world.rank}
        own["strategy/delta"] = 2 * theta
        own["learner/optimizer/exp_avg"] = theta
        if world.rank == 2:  # the leader of a node
            own["strategy/inner/delta"] = theta
        shared = {"theta": np.zeros(3, np.float32), "samples": 100}
        return Checkpoints(tmp_path, world).save(10, shared, own)

    newest = run_virtual(write, 3)[0]
    found = run_virtual(
        lambda world: Checkpoints(tmp_path, world).merge(newest)[1], size
    )
    for rank, merged in enumerate(found):
        assert (merged.size, merged.samples) == (3, 100)
        assert sorted(merged.means) == [
            *("learner/theta", "strategy/delta", "strategy/inner/delta"),
        ]
        assert merged.means["learner/theta"] == pytest.approx([7 / 3] * 3)
        assert merged.means["strategy/delta"] == pytest.approx([14 / 3] * 3)
        assert merged.means["strategy/inner/delta"].tolist() == [4.0] * 3
        assert merged.nearest["strategy/steps"] == 7 + rank % 3
        moment = merged.nearest["learner/optimizer/exp_avg"]
        assert moment.tolist() == [2.0 ** (rank % 3)] * 3
    held = [list(merged.held) for merged in found]
    assert sorted(rank for own in held for rank in own) == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 3])
def test_on_another_number_of_ranks_a_broken_one_is_passed_over(tmp_path, size):
    save(tmp_path, 10, size=2)
    truncate(save(tmp_path, 20, size=2).path / "rank-0001.h5")
    with pytest.warns(CheckpointWarning, match=r"20/rank-0001.h5"):
        newest = latest(tmp_path, size)
    assert (newest.step, newest.size) == (10, 2)


@pytest.mark.parametrize("who", [0, 1])
def test_a_value_that_cannot_be_stored_stops_all_ranks(tmp_path, who):
    save(tmp_path, 10)

    def main(world):
        own = {"peers": [1, 2]} if world.rank == who else {}
        Checkpoints(tmp_path, world).save(20, {}, own)

    line = errors(main)
    assert line == f"rank {who}: state entry 'peers': list cannot be stored"
    assert names(tmp_path) == ["step-000000010"]
    assert load(tmp_path) == 10


def test_a_defect_on_one_rank_stops_all_ranks(tmp_path):
    def main(world):
        Checkpoints(tmp_path, world).save(20, {}, own={} if world.rank else None)

    assert errors(main).startswith("rank 0: TypeError: ")
    assert names(tmp_path) == []


def test_the_file_is_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    line = errors(lambda w: Checkpoints(tmp_path / "checkpoints", w).save(1, {}, {}))
    assert line.startswith(f"rank 0: {tmp_path}/checkpoints")
    assert line.endswith("Not a directory")


def test_renaming_fails_at_the_last_moment(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def no_disk(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    monkeypatch.setattr(checkpoint_module, "sync_folder", no_disk)
    line = errors(lambda world: Checkpoints(tmp_path, world).save(20, {}, {}))
    assert line.endswith("step-000000020.partial: Input/output error")
    assert load(tmp_path) == 10
    assert names(tmp_path) == ["step-000000010"]


def test_an_old_one_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", refuse)
    with pytest.warns(CheckpointWarning, match="could not be removed: Permission"):
        save(tmp_path, 20, keep=1)
    assert load(tmp_path) == 20
