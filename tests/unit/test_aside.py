"""What waits in a file comes back to the bit; memory takes what finds no room there."""

import errno
import os

import numpy as np
import pytest
import torch

from mpilm.errors import CheckpointError
from mpilm.storage import aside as aside_module
from mpilm.storage.aside import Aside


@pytest.fixture(autouse=True)
def short_goes_to_a_file_too(monkeypatch):
    monkeypatch.setattr(aside_module, "LEAST_BYTES", 4)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_it_comes_back_to_the_bit(tmp_path, kind):
    own = np.random.default_rng(1).standard_normal(100_001).astype(np.float32)
    own[:2] = np.nan, -0.0
    vector = kind(own.copy())
    with Aside(vector, tmp_path) as aside:
        assert aside.copy is None
        assert list(tmp_path.iterdir()) == []  # a file without a name
        vector[:] = 7.0
        aside.put_back_()
        vector[:] = 8.0
        aside.put_back_()
    assert np.asarray(vector).tobytes() == own.tobytes()


def test_without_a_folder_or_room_it_waits_in_memory(tmp_path, monkeypatch):
    def full(descriptor, data, offset):
        os.pwrite(descriptor, memoryview(data)[:8], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(aside_module, "write_fully", full)
    vector = np.arange(5.0)
    for folder in (None, tmp_path, tmp_path / "missing"):
        with Aside(vector, folder) as aside:
            vector[:] = 0.0
            aside.put_back_()
        assert vector.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_file_that_lost_its_end_is_one_line(tmp_path):
    vector = np.arange(5.0)
    with Aside(vector, tmp_path) as aside:
        os.ftruncate(aside._file.fileno(), 12)
        with pytest.raises(CheckpointError, match=f"{tmp_path}: the model that waited"):
            aside.put_back_()
