"""`train --profile`: the same training, and a timeline in which every step is whole."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mpilm.config import resolve
from mpilm.data.synthetic import prepare_synthetic
from mpilm.train import profile
from mpilm.world.mpi import MpiWorld

pytest.importorskip("torch")
STEPS = 4


@pytest.fixture
def folder(world: MpiWorld, tmp_path: Path) -> Path:
    """One folder for all ranks, with a corpus."""
    if world.size != 2:
        pytest.skip("at 2 ranks")
    path = Path(world.comm.allgather(str(tmp_path))[0])
    if world.rank == 0:
        prepare_synthetic(path / "c.h5", vocab=40, tokens=5000, seed=3, branching=4)
    world.comm.Barrier()
    return path


def trained(world: MpiWorld, folder: Path, name: str, **options: Any) -> Any:
    """Return the trainer of a short run."""
    from mpilm.train.loop import Trainer

    document = {
        "data": {"corpus": str(folder / "c.h5")},
        "model": {"embed": 8, "hidden": 8},
        "train": {"batch": 4, "unroll": 10, "samples": 1000, "test": False},
        "strategy": {"name": "model_averaging", "period": 2},
    }
    trainer = Trainer(resolve(document), world, folder / name, **options)
    trainer.train()
    return trainer


@pytest.mark.long
def test_a_profile_changes_nothing_and_shows_every_step(
    world: MpiWorld,
    folder: Path,
    agree: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profile, "FIRST", 2)
    monkeypatch.setattr(profile, "STEPS", STEPS)
    plain = trained(world, folder, "plain")
    watched = trained(world, folder, "watched", profile=True)
    agree.append(watched.learner.theta.equal(plain.learner.theta))
    for part in ("learner", "strategy", "batches"):
        now, before = (vars(getattr(t, part)) for t in (watched, plain))
        agree.append(now.keys() == before.keys())
    agree.append(world.progress.watch is None)
    agree.append("finish" not in vars(world.resources.staging))
    agree.append(not (folder / "plain" / "profile.json").exists())
    timeline = json.loads((folder / "watched" / "profile.json").read_bytes())
    for process in (0, 1000):
        events = [e for e in timeline["traceEvents"] if e["pid"] == process]
        spans = [e for e in events if e.get("cat") == "user_annotation"]
        counts = Counter(e["name"] for e in spans)
        agree += [counts[name] == STEPS for name in ("input", "compute", "update")]
        messages = Counter(e["name"] for e in events if e["ph"] == "b")
        agree.append(messages["Allreduce"] == STEPS // 2)
        # the ranges follow each other: no time is counted twice
        ours = {"input", "compute", "update", "mix"}
        order = sorted((e["ts"], e["dur"]) for e in spans if e["name"] in ours)
        for (start_us, lasts_us), (next_us, _) in pairwise(order):
            agree.append(start_us + lasts_us <= next_us + 1.0)
