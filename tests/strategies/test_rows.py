"""Row tables in whole runs: which strategies take them; that nothing else changes."""

from __future__ import annotations

import pytest
import torch

from mpilm.errors import MpilmError
from mpilm.strategies import STRATEGIES
from mpilm.train.notes import introduction

SAMPLED = {"softmax": "sampled", "sampled_frequent": 4, "sampled_random": 36}
MOMENTUM = {"optim": {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-3}}
REFUSING = [name for name, kind in STRATEGIES.items() if not kind.takes_rows]


def named(trainer):
    learner = trainer.learner
    theta = learner.theta.clone()
    return {segment.name: theta[segment.slice] for segment in learner.layout}


def assert_close(trainers, others, bound):
    for trainer, other in zip(trainers, others, strict=True):
        expected = named(other)
        for name, value in named(trainer).items():
            assert (value - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize("sections", [{}, MOMENTUM], ids=["plain", "momentum"])
def test_local_trains_alike_with_rows_and_without(run, sections):
    sparse, dense = (
        run(2, "local", model={**SAMPLED, "sparse": rows}, **sections)
        for rows in (True, False)
    )
    assert sparse[0].learner.layout.tables
    assert_close(sparse, dense, 2e-6)
    first, second = (t[0].totals.valid_perplexity for t in (sparse, dense))
    assert first == pytest.approx(second, rel=1e-6)
    assert first < 35  # of 40 words


@pytest.mark.parametrize("sections", [{}, MOMENTUM], ids=["plain", "momentum"])
def test_a_run_with_rows_goes_on_where_it_stopped(run, tmp_path, sections):
    """A checkpoint brings all rows up to date: both runs write one in the middle."""
    saves = {"checkpoint": {"every": 20 * 40}}
    model = {**SAMPLED, "sparse": True}
    (whole,) = run(1, "local", steps=40, model=model, **sections, **saves)
    run(1, "local", steps=20, out="x", model=model, **sections, **saves)
    (resumed,) = run(
        1, "local", steps=40, out="x", resume=True, model=model, **sections, **saves
    )
    assert torch.equal(whole.learner.theta, resumed.learner.theta)


@pytest.mark.parametrize("name", REFUSING)
def test_other_strategies_refuse_rows_in_one_line(run, name):
    with pytest.raises(MpilmError) as caught:
        run(2, name, steps=1, model={"sparse": True}, data={"source": "pool"})
    assert "model.sparse" in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sample_without_rows_is_noted(run):
    for rows in (True, False):
        (trainer,) = run(1, "local", steps=1, model={**SAMPLED, "sparse": rows})
        parts = trainer.task, trainer.strategy, trainer.learner
        lines = introduction(trainer.config, *parts)
        noted = any("still go over the whole vocabulary" in line for line in lines)
        assert noted != rows
