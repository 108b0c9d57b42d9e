"""The configurations in jobs/configs: each loads; the arithmetic in comments holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mpilm.config import Config, read_config
from mpilm.models.build import build_model
from mpilm.optim.schedules import build_schedule

FOLDER = Path(__file__).parents[2] / "jobs" / "configs"


def load(name: str) -> Config:
    return read_config(FOLDER / f"{name}.toml")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda p: p.stem)
def test_it_loads_and_round_trips(path, tmp_path) -> None:
    config = read_config(path)
    (tmp_path / "resolved.toml").write_text(config.to_toml())
    assert read_config(tmp_path / "resolved.toml") == config


def num_parameters(config: Config, num_inputs: int, num_outputs: int) -> int:
    import torch

    with torch.device("meta"):
        model = build_model(config.model, num_inputs, num_outputs, seed=1)
    return sum(parameter.numel() for parameter in model.parameters())


def test_su_and_chen() -> None:
    config = load("su_chen_dnn")
    assert num_parameters(config, 440, 8806) == 39_928_422
    epoch = 0.9 * 300 * 3600 * 100
    assert config.train.valid_every == epoch
    assert config.train.samples == 15 * epoch
    assert config.strategy.settings.period_samples == 10 * config.train.batch
    assert epoch // 8 // config.strategy.settings.period_samples == 1186
    optim = config.optim.settings
    limit = optim.lr * optim.max_change_per_sample * config.train.batch
    assert limit == pytest.approx(24.6, abs=0.05)
    samples = config.train.samples
    rate = build_schedule(config.schedule, lr=optim.lr, samples=samples, ranks=8)
    for e in range(1, 16):
        expected = 2.56 * math.exp((e - 1) * math.log(0.01) / 14)
        assert rate.lr(int((e - 0.5) * epoch)) == pytest.approx(expected)


def test_the_blstm_of_the_adpsgd_papers() -> None:
    config = load("adpsgd_blstm")
    assert num_parameters(config, 260, 32_000) == 43_154_944
    epoch = 2000 * 3600 * 100
    assert config.train.samples == 16 * epoch
    frames = config.data.chunk_windows * config.train.batch * config.train.unroll
    assert frames == 67_200
    rate = build_schedule(config.schedule, lr=1.0, samples=config.train.samples)
    assert rate.lr(5 * epoch) == pytest.approx(0.5, rel=1e-6)
    for e in range(11, 17):
        expected = math.sqrt(0.5) ** (e - 11)
        assert rate.lr(int((e - 0.5) * epoch)) == pytest.approx(expected, rel=2e-3)


def test_xiaos_four_systems_differ_in_what_they_are_about() -> None:
    naive, dense, sampled, both = (
        load(f"xiao_{name}") for name in ("naive", "async", "sampled", "sampled_async")
    )
    for config in (dense, sampled, both):
        assert config.train == naive.train
        assert config.optim == naive.optim
    assert (dense.model, both.model) == (naive.model, sampled.model)
    assert (sampled.strategy, both.strategy.name) == (naive.strategy, "async_sgd")
    assert dense.data == both.data
    assert num_parameters(naive, 13_777, 13_777) == num_parameters(both, 13_777, 13_777)
    targets = naive.train.batch * naive.train.unroll
    settings = sampled.model.settings
    assert settings.sampled_frequent + settings.sampled_random >= targets


def test_wikitext_103() -> None:
    config = load("wt103_lstm")
    assert num_parameters(config, 267_735, 267_735) == 141_550_551
    train, model = config.train, config.model.settings
    assert 16 * train.batch * train.unroll == 11_200
    assert train.samples == 10 * 103_000_000
    assert config.schedule.settings.warmup_samples < 0.02 * train.samples
    sample = model.sampled_frequent + model.sampled_random + train.batch * train.unroll
    assert round(100 * sample / 267_735, 1) == 1.8
    assert config.optim.settings.momentum == config.optim.settings.weight_decay == 0.0


def test_awd_lstm_on_wikitext_2() -> None:
    config = load("wt2_awd")
    layers = 4600 * (400 + 1150 + 2) + 2 * 4600 * (2 * 1150 + 2)
    expected = 33_278 * 400 + 33_278 + layers + 1150 * 400
    assert num_parameters(config, 33_278, 33_278) == expected == 42_122_078
    assert 4 * config.train.batch == 80
    assert config.train.samples == 750 * 2_088_628
