"""Learning rate schedules, with numbers worked out by hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec
import pytest

from mpilm.optim.configs import (
    SCHEDULES,
    ConstantConfig,
    ExponentialConfig,
    NewbobAccuracyConfig,
    NewbobConfig,
)
from mpilm.optim.schedules import Newbob, build_schedule


class Choice(NamedTuple):
    name: str
    settings: object


def make_schedule(config, *, lr=2.0, samples=1000):
    return build_schedule(Choice("", config), lr=lr, samples=samples)


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (ConstantConfig(), {0: 2.0, 500: 2.0, 5000: 2.0}),
        (ConstantConfig(warmup_samples=100), {0: 0.02, 49: 1.0, 99: 2.0, 5000: 2.0}),
        (
            ExponentialConfig(final_ratio=0.01),
            {0: 2.0, 500: 0.2, 1000: 0.02, 2000: 0.02},
        ),
        (
            ExponentialConfig(final_ratio=0.01, warmup_samples=200),
            {99: 1.0, 199: 2.0, 200: 2.0, 600: 0.2, 1000: 0.02},
        ),
        (
            # Su and Chen: lr_e = lr_1 exp((e-1) ln(f / lr_1) / (E-1)), f = 0.01 lr_1
            ExponentialConfig(final_ratio=0.01, stages=5),
            {0: 2.0, 199: 2.0, 200: 2.0 * 0.01**0.25, 400: 0.2, 999: 0.02, 1000: 0.02},
        ),
        (ExponentialConfig(final_ratio=0.01, stages=1), {0: 2.0, 999: 2.0}),
        (ExponentialConfig(final_ratio=0.5, warmup_samples=1000), {499: 1.0}),
    ],
)
def test_rate_after_samples(config, rates):
    schedule = make_schedule(config)
    for samples, rate in rates.items():
        assert schedule.lr(samples) == pytest.approx(rate, rel=1e-12), samples
    assert schedule.observe(3.0)
    assert not schedule.finished
    assert schedule.state() == {}


def test_newbob_begins_anew_after_another_schedule():
    """An accuracy is no loss to compare with, and a constant rate has seen nothing."""
    schedules = {name: make_schedule(config()) for name, config in SCHEDULES.items()}
    for schedule in schedules.values():
        for _ in range(3):
            schedule.observe(3.0, 0.75)
    for before in schedules.values():
        for name, config in SCHEDULES.items():
            after = make_schedule(config())
            after.load_state(before.state())
            same = schedules[name] is before
            expected = before if same else make_schedule(config())
            assert after.state() == expected.state(), name
            if not same and name == "newbob_accuracy":
                assert after.observe(3.0, 0.1)
                assert after.newbob.best == 0.1


def test_the_rate_does_not_depend_on_what_was_asked_before():
    schedule = make_schedule(ExponentialConfig())
    first = schedule.lr(700)
    schedule.lr(100)
    assert schedule.lr(700) == first


def test_newbob_halves_from_the_first_small_gain_on_and_then_stops():
    newbob = Newbob(NewbobConfig())
    seen = []
    # gains: -, 0.2, 0.0075, 0.2, 0.00013, 0.00006
    for loss in (5.0, 4.0, 3.97, 3.176, 3.1756, 3.1754):
        newbob.observe(loss)
        seen.append((newbob.factor, newbob.finished))
    assert seen == [
        (1.0, False),
        (1.0, False),
        (0.5, False),
        (0.25, False),
        (0.125, False),
        (0.125, True),
    ]


def test_newbob_measures_gain_from_the_best_loss():
    newbob = Newbob(NewbobConfig())
    for loss in (4.0, 4.4, 4.0):
        newbob.observe(loss)
    assert newbob.best == 4.0
    assert newbob.finished


def test_newbob_goes_on_from_its_state():
    config = NewbobConfig(factor=0.3, warmup_samples=10)
    losses = [5.0, 4.99, 4.0, 3.99, 3.9899]
    whole = make_schedule(config)
    for loss in losses:
        whole.observe(loss)
    for cut in range(len(losses)):
        first, second = make_schedule(config), make_schedule(config)
        for loss in losses[:cut]:
            first.observe(loss)
        second.load_state(first.state())
        for loss in losses[cut:]:
            second.observe(loss)
        assert second.lr(4) == whole.lr(4)
        assert second.finished == whole.finished
    assert whole.lr(4) == pytest.approx(2.0 * 0.5 * 0.3**3)
    assert whole.finished


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("constant", {"warmup_samples": -1}),
        ("exponential", {"final_ratio": 0.0}),
        ("newbob", {"factor": 1.0}),
    ],
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(settings, SCHEDULES[name])


@pytest.mark.parametrize("config", [ConstantConfig, ExponentialConfig, NewbobConfig])
def test_rate_times_the_number_of_ranks(config):
    """Su and Chen: 0.32 on one GPU, 2.56 on eight."""
    choice = Choice("", config(times_ranks=True))
    schedule = build_schedule(choice, lr=0.32, samples=100, ranks=8)
    assert schedule.lr(0) == pytest.approx(2.56)
    one = build_schedule(Choice("", config()), lr=0.32, samples=100, ranks=8)
    assert one.lr(0) == pytest.approx(0.32)


def test_su_and_chens_15_epochs():
    """lr_e = lr_1 exp((e - 1) ln(f / lr_1) / (E - 1)), f = 0.01 lr_1, E = 15."""
    schedule = make_schedule(ExponentialConfig(stages=15), lr=2.56, samples=1500)
    for epoch in range(1, 16):
        rate = 2.56 * math.exp((epoch - 1) * math.log(0.01) / 14)
        for samples in (100 * epoch - 100, 100 * epoch - 1):
            assert schedule.lr(samples) == pytest.approx(rate, rel=1e-12)


def test_newbob_by_accuracy_goes_by_differences():
    """Halving begins below half a point of gain, training ends below a tenth."""
    newbob = Newbob(NewbobAccuracyConfig())
    seen = []
    # gains: -, 6, 0.4, 0.6, 0.05 points; the loss does not matter
    for accuracy in (0.50, 0.56, 0.564, 0.570, 0.5705):
        assert newbob.observe(9.0, accuracy)
        seen.append((newbob.factor, newbob.finished))
    assert seen[:3] == [(1.0, False), (1.0, False), (0.5, False)]
    assert seen[3:] == [(0.25, False), (0.25, True)]
    assert not newbob.observe(1.0, 0.5)
    assert newbob.best == 0.5705


def test_only_newbob_with_reject_rejects():
    losses = (5.0, 4.0, 4.5, 4.0, 3.9)
    for config, verdicts in (
        (NewbobConfig(reject=True), [True, True, False, False, True]),  # as Kaldi does
        (NewbobConfig(), [True] * 5),
        (ExponentialConfig(), [True] * 5),
    ):
        schedule = make_schedule(config)
        assert [schedule.observe(loss) for loss in losses] == verdicts
