"""Learning rate schedules, with numbers worked out by hand."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import pytest

from mpilm.optim.configs import (
    SCHEDULES,
    ConstantConfig,
    ExponentialConfig,
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
    schedule.observe(3.0)
    assert not schedule.finished
    assert schedule.state() == {}


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
