"""A small synthetic corpus; runs of the real training program in the virtual world."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mpilm.config import resolve
from mpilm.data.synthetic import prepare_synthetic
from mpilm.train.loop import Trainer
from mpilm.world.virtual import run_virtual


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "synthetic.h5"
    prepare_synthetic(path, vocab=40, tokens=100_000, seed=3, branching=4)
    return path


@pytest.fixture
def run(corpus, tmp_path):
    """Return a function that trains in the virtual world and returns the learners.

    A setting of None takes the one of this fixture away.
    """

    number = itertools.count()

    def train(
        size, name, *, steps=50, batch=4, out=None, resume=False, can_shrink=False,
        **sections,
    ):  # fmt: skip
        document = {
            "data": {"corpus": str(corpus)},
            "model": {"embed": 12, "hidden": 16},
            "optim": {"name": "sgd", "lr": 0.5, "clip": 0.0},
            "train": {
                "batch": batch,
                "unroll": 10,
                "samples": steps * size * batch * 10,
                "log_every": 1,
            },
            "strategy": {"name": name},
        }
        for section, settings in sections.items():
            merged = {**document.get(section, {}), **settings}
            document[section] = {k: v for k, v in merged.items() if v is not None}
        config = resolve(document)
        folder = tmp_path / (out or f"run-{next(number)}")

        def main(world):
            trainer = Trainer(config, world, folder, resume=resume)
            trainer.train()
            return trainer

        world = {"machine": config.machine, "faults": config.faults}
        return run_virtual(main, size, **world, can_shrink=can_shrink)

    return train
