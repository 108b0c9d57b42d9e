"""The configuration: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import re

import pytest

from mpilm.config import SECTIONS, read_config, resolve, settings, tomllib
from mpilm.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_toml_round_trip_gives_an_equal_configuration(tmp_path):
    first = resolve(
        {
            "train": {"samples": 5000, "batch": 4},
            "strategy": {"name": "model_averaging", "period": 3},
            "optim": {"name": "adamw", "lr": 0.25},
            "faults": {"slow": {"1": 2.5}},
        }
    )
    again = read_config(write(tmp_path, first.to_toml()))
    assert again == first
    assert again.strategy.settings.period == 3
    assert again.optim.settings.lr == 0.25


def test_every_setting_is_written_whoever_chose_its_value(tmp_path):
    """A program with other defaults must not read another configuration from it."""
    profile = {"kind": "spikes", "factor": 2.0, "probability": 0.5}
    config = resolve({"train": {"batch": 4}, "faults": {"profile": [profile]}})
    written = tomllib.loads(config.to_toml())
    assert written == config.to_document()
    for s in settings():
        if not s.choice or s.choice == written[s.section]["name"]:
            assert s.key in written[s.section], s
    assert written["faults"]["profile"] == [{**profile, "ranks": []}]


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.samples=123", "train", "samples", 123),
        ("data.corpus=some/where.h5", "data", "corpus", "some/where.h5"),
        ("train.test=false", "train", "test", False),
        ("optim.lr=2", "optim", "lr", 2.0),
    ],
)
def test_set_reaches_every_kind_of_value(tmp_path, override, section, key, value):
    config = read_config(write(tmp_path, ""), [override])
    part = getattr(config, section)
    assert getattr(getattr(part, "settings", part), key) == value


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("[trian]\n", [], ["trian", "did you mean 'train'"]),
        ("[train]\nsampels = 3\n", [], ["sampels", "did you mean 'samples'"]),
        ("[train]\nbatch = 'x'\n", [], ["train.batch", "int"]),
        ("[train]\nbatch = 0\n", [], ["train.batch", ">= 1"]),
        ("[strategy]\nname = 'nope'\n", [], ["strategy.name", "nope", "allreduce"]),
        ("train = 3\n", [], ["[train]"]),
        ("[train\n", [], ["not TOML"]),
        ("", ["train.batch"], ["section.key=value"]),
        ("", ["nosuch.key=1"], ["nosuch"]),
        ("", ["train.batch=-1"], ["train.batch", ">= 1"]),
        ("", ["optim.lr=fast"], ["optim.lr", "float"]),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(tmp_path, text, overrides, words):
    with pytest.raises(ConfigError) as caught:
        read_config(write(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", ["10000", "10_000", "1e4", "1E+4", "10_000.0"])
def test_a_whole_number_may_be_written_as_a_float(tmp_path, text):
    settings = ["strategy.name=hierarchical", "strategy.inner=model_averaging"]
    settings += [f"train.samples={text}", f"strategy.settings.period={text}"]
    config = resolve({}, [*settings, f"optim.clip={text}"])
    assert config.train.samples == 10_000
    assert isinstance(config.train.samples, int)
    assert config.strategy.settings.settings["period"] == 10_000
    assert config.optim.settings.clip == 10_000.0
    assert isinstance(config.optim.settings.clip, float)
    path = tmp_path / "c.toml"
    path.write_text(f"[train]\nsamples = {text}\n")
    assert read_config(path).train.samples == 10_000


@pytest.mark.parametrize("text", ["1.5", "1e-3", "inf", "nan", "1e30"])
def test_other_floats_are_no_whole_numbers(text):
    line = f"train.samples: {float(text)} is no whole number below 2^63"
    with pytest.raises(ConfigError, match=re.escape(line)):
        resolve({}, [f"train.samples={text}"])


def test_missing_and_non_text_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        read_config(tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.toml: not UTF-8"):
        read_config(binary)


def test_a_new_name_keeps_what_it_knows_and_says_what_it_drops(tmp_path):
    path = write(tmp_path, "[strategy]\nname = 'model_averaging'\nperiod = 7\n")
    config = read_config(path, ["strategy.name=allreduce"])
    assert config.strategy.name == "allreduce"
    assert config.notes == ("strategy.name=allreduce has no setting period: left out",)


def test_every_setting_has_a_line_of_help():
    rows = list(settings())
    assert {row.section for row in rows} == set(SECTIONS)
    undocumented = [f"{r.section}.{r.key}" for r in rows if not r.text]
    assert undocumented == []
