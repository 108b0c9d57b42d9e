"""Checkpoints written beside training: what training waits for holds for them too."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

import mpilm.storage.checkpoint as checkpoint_module
from mpilm.errors import MpilmError
from mpilm.storage.beside import Beside
from mpilm.storage.checkpoint import Checkpoints, complete_checkpoints, load_shared
from mpilm.storage.state_file import read_state
from mpilm.world.virtual import run_virtual

STEP = 2 * 4 * 10  # samples of both ranks
OTHER = ("totals/", "config")  # seconds; and the setting itself


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("allreduce", {"model": {"dropout": 0.2}}),
        ("model_averaging", {"ema": {"syncs": 5}}),
        pytest.param(
            "bmuf", {"train": {"valid_every": 6 * STEP}}, marks=pytest.mark.long
        ),
    ],
)
def test_they_are_those_that_training_waits_for(run, tmp_path, name, more):
    for way in (True, False):
        checkpoint = {"every": 3 * STEP, "keep": 9, "beside": way}
        run(2, name, steps=14, out=str(way), checkpoint=checkpoint, **more)
    beside, waiting = (
        complete_checkpoints(tmp_path / way / "checkpoints")
        for way in ("True", "False")
    )
    assert [path.name for path in beside] == [path.name for path in waiting]
    assert len(beside) == 5
    for one, other in zip(beside, waiting, strict=True):
        for path in other.iterdir():
            found, expected = read_state(one / path.name), read_state(path)
            assert found.keys() == expected.keys()
            for entry in expected:
                if not entry.startswith(OTHER):
                    np.testing.assert_array_equal(found[entry], expected[entry], entry)


def test_one_that_cannot_be_written_is_one_line_and_the_last_one_stands(
    run, tmp_path, monkeypatch
):
    write = checkpoint_module.write_state

    def no_room(path, state, **header):
        if header == {"step": 10, "size": 2, "rank": 1}:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, state, **header)

    monkeypatch.setattr(checkpoint_module, "write_state", no_room)
    path = tmp_path / "x" / "checkpoints"
    line = (
        f"rank 1: {path}/step-000000010.partial/rank-0001.h5: No space left on device"
    )
    with pytest.raises(MpilmError) as error:
        run(2, "bmuf", steps=40, out="x", checkpoint={"every": 5 * STEP})
    assert str(error.value) == line
    assert [found.name for found in path.iterdir()] == ["step-000000005"]
    assert load_shared(path)["samples"] == 5 * STEP


def test_what_is_copied_does_not_change_with_the_learner():
    """Also an array without dimensions: AdamW counts its steps in one, in place.

    In the virtual world nobody trains while it is written: `make soak` found it.
    """

    def main(world):
        beside = Beside(Checkpoints("nowhere", world))
        state = {"step": np.array(3.0), "theta": np.ones(4), "samples": 7}
        copied = beside.copied("own", state)
        state["step"] += 1.0
        state["theta"] += 1.0
        return copied

    (copied,) = run_virtual(main, 1)
    assert copied["step"] == 3.0
    assert copied["step"].shape == ()
    assert copied["theta"].tolist() == [1.0] * 4
    assert copied["samples"] == 7
