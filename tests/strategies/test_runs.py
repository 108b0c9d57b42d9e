"""A run and its folder: who owns it, what stands in it, how it goes on."""

from __future__ import annotations

from hashlib import sha256

import pytest

from mpilm.errors import MpilmError
from mpilm.storage.owner import NAME, Owner


def contents(folder):
    """Return the hash of every file below."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_use_is_refused_and_left_alone(run, tmp_path, resume):
    run(2, "allreduce", out="x", steps=5)
    owner = Owner(tmp_path / "x").take()
    before = contents(tmp_path / "x")
    with pytest.raises(MpilmError, match="x: is in use by pid"):
        run(2, "allreduce", out="x", steps=9, resume=resume)
    assert contents(tmp_path / "x") == before
    owner.release()


def test_whatever_ends_a_run_frees_its_folder(run, tmp_path):
    with pytest.raises(MpilmError, match="the loss is"):
        run(2, "allreduce", out="x", optim={"lr": 1e30})
    assert not (tmp_path / "x" / NAME).exists()
    run(2, "allreduce", out="x", steps=5)
    assert not (tmp_path / "x" / NAME).exists()
    with pytest.raises(MpilmError, match=r"model\.hidden = 16"):
        run(2, "allreduce", out="x", resume=True, model={"hidden": 8})
    assert not (tmp_path / "x" / NAME).exists()


def test_a_run_whose_folder_was_taken_over_writes_no_more(run, tmp_path, monkeypatch):
    """It was only taken for dead: another run has the folder since."""
    taken = []

    def require(self):
        if self.record.token not in taken:  # at the first checkpoint
            taken.append(self.record.token)
            self.path.unlink()
        return plain(self)

    plain = Owner.require
    monkeypatch.setattr(Owner, "require", require)
    with pytest.raises(MpilmError, match="this run writes no more"):
        run(2, "allreduce", out="x", steps=20, checkpoint={"every": 5 * 2 * 40})
    assert list((tmp_path / "x" / "checkpoints").iterdir()) == []
