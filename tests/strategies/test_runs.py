"""A run and its folder: who owns it, what stands in it, how it goes on."""

from __future__ import annotations

import itertools
import json
from hashlib import sha256

import numpy as np
import pytest

from mpilm.config import read_config
from mpilm.data.text import prepare_text
from mpilm.errors import MpilmError, WorldError
from mpilm.report.folders import read
from mpilm.report.page import page
from mpilm.storage.owner import NAME, Owner
from mpilm.storage.runlog import read_run
from mpilm.train import loop
from mpilm.train.changes import Change, differences, read_changes
from mpilm.train.folder import RunFolder
from mpilm.train.run import TrainedModel

STEP = 2 * 40  # samples of a step of 2 ranks


def contents(folder):
    """Return the hash of every file below."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.long
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


@pytest.mark.long
def test_what_a_run_was_made_with_stays_and_changes_are_noted(run, tmp_path):
    folder = RunFolder(tmp_path / "x")
    run(2, "allreduce", out="x", steps=10)
    made = folder.config.read_bytes(), folder.vocabulary.read_bytes()
    first = json.loads(folder.summary.read_text())
    assert first["changes"] == []
    assert not folder.changes.exists()
    faults = {"slow": {"1": 2.0}}
    more = run(2, "allreduce", out="x", steps=20, resume=True, optim={"lr": 0.25})
    assert (folder.config.read_bytes(), folder.vocabulary.read_bytes()) == made
    assert read_changes(folder.changes) == [
        Change(10 * STEP, 10, "optim.lr", 0.5, 0.25),
        Change(10 * STEP, 10, "train.samples", 10 * STEP, 20 * STEP),
    ]
    assert differences(folder.read_config(), more[0].config) == []
    log = read_run(folder.path)[0].rows
    assert np.array_equal(log["lr"], [0.5] * 10 + [0.25] * 10)
    assert json.loads((folder.path / f"summary-{10 * STEP}.json").read_text()) == first
    last = json.loads(folder.summary.read_text())
    assert [change["key"] for change in last["changes"]] == [
        "optim.lr",
        "train.samples",
    ]
    # a choice that has other settings, and a table; then as last trained
    other = {"schedule": {"name": "newbob", "factor": 0.3}, "faults": faults}
    run(2, "allreduce", out="x", steps=30, resume=True, optim={"lr": 0.25}, **other)
    config = folder.read_config()
    assert config.schedule.settings.factor == 0.3
    assert config.faults.slow == {"1": 2.0}
    assert read_config(folder.config).schedule.name == "constant"
    again = folder.read_config(["schedule.name=constant", "train.samples=4000"])
    assert (again.schedule.name, again.train.samples) == ("constant", 4000)
    html = page([read(folder.path, "x")], "x")
    assert "changed: optim.lr: 0.5 -&gt; 0.25 from sample 800 on" in html


@pytest.mark.long
def test_changes_of_a_past_that_was_left_are_forgotten(run, tmp_path):
    """A run that falls back to an older checkpoint never had what came after it."""
    folder = RunFolder(tmp_path / "x")
    sections = {"checkpoint": {"every": 5 * STEP, "keep": 9}}
    run(2, "allreduce", out="x", steps=10, **sections)
    run(2, "allreduce", out="x", steps=20, resume=True, optim={"lr": 0.2}, **sections)
    assert [c.samples for c in read_changes(folder.changes)] == [800, 800]
    for step in (20, 15, 10):
        (folder.checkpoints / f"step-{step:09d}/shared.h5").write_bytes(b"")
    with pytest.warns(match="passed over"):
        run(2, "allreduce", out="x", steps=12, resume=True, **sections)
    changes = read_changes(folder.changes)
    assert [(c.samples, c.key) for c in changes] == [(400, "train.samples")]
    assert folder.read_config().optim.settings.lr == 0.5


@pytest.mark.long
def test_a_run_that_has_ended_is_left_alone(run, tmp_path, capsys):
    run(2, "allreduce", out="x", steps=10)
    before = contents(tmp_path / "x")
    run(2, "allreduce", out="x", steps=10, resume=True)
    assert capsys.readouterr().out.endswith(
        "x: the run has ended; more train.samples go on\n"
    )
    for sections in ({"optim": {"lr": 0.25}}, {"steps": 9}, {"train": {"test": False}}):
        with pytest.raises(MpilmError, match=r"after 800 samples: .* change nothing"):
            run(2, "allreduce", out="x", resume=True, **{"steps": 10, **sections})
    assert contents(tmp_path / "x") == before
    for path in (tmp_path / "x/checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    for resume in (True, False):
        with pytest.raises(MpilmError, match="without its checkpoints: another --out"):
            run(2, "allreduce", out="x", steps=10, resume=resume)


@pytest.mark.parametrize("name", ["step-1234567890", "step-000000005.replaced"])
def test_whatever_its_name_a_checkpoint_is_no_free_folder(run, tmp_path, name):
    """After a billion steps; after a kill between two renamings."""
    run(2, "allreduce", out="x", steps=5)
    folder = tmp_path / "x/checkpoints"
    (folder / "step-000000005").rename(folder / name)
    before = contents(tmp_path / "x")
    with pytest.raises(MpilmError, match="x: holds a run"):
        run(2, "allreduce", out="x", steps=9)
    assert contents(tmp_path / "x") == before


@pytest.mark.long
@pytest.mark.parametrize("sections", [{"train": {"seed": 2}}, {"model": {"embed": 9}}])
def test_what_the_first_model_and_the_data_depend_on_is_refused(run, sections):
    run(2, "allreduce", out="x", steps=5)
    with pytest.raises(MpilmError, match="was made with"):
        run(2, "allreduce", out="x", steps=9, resume=True, **sections)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_that_cannot_be_evaluated_is_refused_at_once(run, tmp_path, split):
    texts = {"train": "a b c d\n" * 500, "valid": "a b\n", "test": "a b\n"}
    texts[split] = "\n"  # one token, and nothing before it that would predict it
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    prepare_text(*(tmp_path / name for name in (*texts, "c.h5")))
    data = {"data": {"corpus": str(tmp_path / "c.h5")}}
    with pytest.raises(MpilmError, match=f"{split}.* has no token to predict"):
        run(2, "allreduce", out="x", steps=5, **data)
    assert not (tmp_path / "x").exists()
    if split == "test":
        run(2, "allreduce", out="x", steps=5, train={"test": False}, **data)


class CutOffError(Exception):
    """What ends a job in the middle of something."""


NEWBOB = {"name": "newbob", "start_halving": 0.2, "stop_halving": 0.0}
EVERY = 4 * STEP


@pytest.fixture
def cut_off(run, monkeypatch):
    """Return `run`, cut off by an error on rank 0 in the evaluation of a number."""
    plain = loop.evaluate

    def cut_off(number, *arguments, **sections):
        seen = []

        def evaluate(*args, **options):
            seen.append(args[-1].rank)
            if seen.count(0) == number and args[-1].rank == 0:
                raise CutOffError
            return plain(*args, **options)

        with monkeypatch.context() as patch, pytest.raises(WorldError, match="CutOff"):
            patch.setattr(loop, "evaluate", evaluate)
            run(*arguments, **sections)

    return cut_off


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("model_averaging", {"schedule": NEWBOB | {"reject": True}}),
        (
            "bmuf",
            {"schedule": NEWBOB, "ema": {"syncs": 5}, "data": {"source": "pool"}},
        ),
        ("allreduce", {"checkpoint": {"every": 0}}),
    ],
)
def test_a_run_cut_off_in_any_validation_ends_as_the_uninterrupted_one(
    run, cut_off, tmp_path, name, more
):
    """The last step is saved before it is validated; a resumed run begins with that."""
    sections = {
        "optim": {"lr": 12.0, "momentum": 0.5},
        "model": {"dropout": 0.2},
        "data": {"source": "shards", "chunk_windows": 3},
        # of this seed two validations are worse than the one before, the last too
        "train": {"valid_every": EVERY, "samples": 24 * STEP, "seed": 8},
        "checkpoint": {"every": EVERY},
    } | more
    whole = run(2, name, out="whole", **sections)
    validations = read_run(tmp_path / "whole")[0].events["name"].tolist()
    cuts = range(1, 1 + validations.count("evaluate"))
    if "ema" in more:
        cuts = range(1, 1 + len(cuts), 3)
    if not sections["checkpoint"]["every"]:
        cuts = cuts[-1:]  # there is no other checkpoint
    assert len(cuts) >= 1
    for cut in cuts:
        out = f"cut-{cut}"
        cut_off(cut, 2, name, out=out, **sections)
        assert not (tmp_path / out / "summary.json").exists()
        resumed = run(2, name, out=out, resume=True, **sections)
        for rank in range(2):
            assert_same_state(resumed[rank], whole[rank])
    if name == "model_averaging":
        assert whole[0].schedule.newbob.factor < 1.0
        assert whole[0].schedule.finished  # the last one was worse
        assert whole[0].totals.step == 16
        final = TrainedModel.read(tmp_path / "whole").theta_P
        best = np.mean([t.best.theta_P.numpy() for t in whole], axis=0)
        assert np.allclose(final, best, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("source", ["shards", "pool"])
def test_ranks_out_of_lockstep_cut_off_in_a_validation(run, cut_off, tmp_path, source):
    sections = {
        "optim": {"clip": 0.0},
        "data": {"source": source, "chunk_windows": 3},
        "faults": {"slow": {"1": 5.0}},
        "train": {"valid_every": 15 * STEP, "samples": 60 * STEP},
        "checkpoint": {"every": 15 * STEP, "keep": 9},
    }
    cut_off(2, 2, "adpsgd", out="x", **sections)
    resumed = run(2, "adpsgd", out="x", resume=True, **sections)
    assert sum(trainer.learner.samples for trainer in resumed) >= 60 * STEP
    for trainer in resumed:
        log = read_run(tmp_path / "x")[trainer.world.rank]
        names = log.events["name"].tolist()
        after = [b for a, b in itertools.pairwise(names) if a == "checkpoint"]
        assert len(after) >= 3
        assert {*after} == {"evaluate"}  # also of the one that was cut off


def assert_same_state(trainer, reference):
    """Assert that two trainers are the same to the bit but for clocks and traffic."""
    for name, part in reference.parts.items():
        state = trainer.parts[name].state()
        for key, value in part.state().items():
            if key != "optimizer/settings":  # the rate is set before a step
                assert np.array_equal(state[key], value), (name, key)
    for key in ("step", "valid_perplexity", "consensus_distance", "loss_sum"):
        assert getattr(trainer.totals, key) == getattr(reference.totals, key), key
    rows, expected = (
        read_run(t.folder.path)[t.world.rank].rows for t in (trainer, reference)
    )
    for key in ("step", "loss", "lr", "valid_perplexity"):
        assert np.array_equal(rows[key], expected[key], equal_nan=True), key


@pytest.mark.long
def test_runs_of_neighbouring_seeds_share_no_stream(run):
    """Rank 1 of seed 1 drew what rank 0 of seed 2 drew."""
    streams = []
    for seed in (1, 2):
        trainers = run(2, "local", steps=1, train={"seed": seed})
        streams += [t.learner.state()["random/cpu"].tobytes() for t in trainers]
    assert len({*streams}) == 4
