"""Every setting, changed where a run is resumed: it holds from there on, or one line.

Never a traceback, and never on some ranks only.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpilm.config import Config, resolve, settings
from mpilm.data.kaldi_prepare import prepare_kaldi
from mpilm.data.synthetic import prepare_synthetic
from mpilm.errors import ConfigError
from mpilm.train.changes import differences, read_changes
from mpilm.train.run import TrainedModel
from mpilm.train.saving import LASTING
from tests.strategies.changing import (
    RANKS,
    SMALL,
    train,
    values,
    without_effect_in_docs,
)
from tests.unit.kaldi_files import make_folder

pytestmark = pytest.mark.long

STEPS = 3
ALIKE = {"machine", "pretrain", "faults"}  # the way there is tried, not the way back
# "own" is what `mpilm.fit` trains: no configuration file can name it
KEYS = [(s.section, s.choice, s.key) for s in settings() if s.choice != "own"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Return a corpus of text and one of frames, and others with the same meaning."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, tokens in {"text": 4_000, "other-text": 5_000}.items():
        prepare_synthetic(
            folder / f"{name}.h5", vocab=40, tokens=tokens, seed=3, branching=4
        )
    for name, seed in {"frames": 0, "other-frames": 4}.items():
        of = make_folder(folder / name, seed)
        prepare_kaldi(
            {"train": of},
            folder / f"{name}.h5",
            alignments=[of / "pdf.txt"],
            num_classes=6,
            shares={"valid": 0.3},
        )
    return {path.stem: path for path in folder.glob("*.h5")}


def document(corpora, section: str, choice: str, key: str) -> dict[str, dict[str, Any]]:
    """Return a configuration in which a setting has a meaning."""
    frames = choice in {"dnn", "lstm_am", "blstm_am", "newbob_accuracy"}
    model = choice if section == "model" and choice else "lstm_am" if frames else ""
    model = model or ("dnn" if key == "cache" else "lstm_lm")
    found: dict[str, dict[str, Any]] = {
        "data": {"corpus": str(corpora["text" if model == "lstm_lm" else "frames"])},
        "model": {"name": model, **SMALL[model]},
        "train": {"batch": 2, "unroll": 5, "valid_every": 20, "log_every": 1},
        "checkpoint": {"every": 20},
    }
    in_step = 2 if model == "dnn" else 10
    steps = 2 * STEPS if key == "delay" else STEPS
    found["train"]["samples"] = steps * RANKS * in_step
    if key in {"chunk_windows", "source"}:
        found["data"] |= {"source": "pool", "chunk_windows": 2}
    if choice and section != "model":
        found[section] = {"name": choice}
    if key in {"period_samples", "warmup", "delay"}:
        found[section] |= {"period": 4 if key == "delay" else 2}
    if choice == "hierarchical":
        found["strategy"]["node_size"] = 1
    if key == "units_random":
        found["strategy"] |= {"units": 0.5}
    if key == "nesterov":
        found["optim"] |= {"momentum": 0.5}
    return found


def changed(document, corpora, section: str, choice: str, key: str) -> list[Config]:
    """Return what a setting may be changed to; one for each name or word."""
    found = []
    if key == "corpus":
        given = [str(corpora["other-text"])]
    else:
        given = values(section, choice, key)
    before = resolve(document)
    for value in given:
        new = {name: dict(settings) for name, settings in document.items()}
        if key == "name" and section != "model":
            new[section] = {}
        elif key == "name":
            new[section] = {**SMALL[value]}
        new.setdefault(section, {})[key] = value
        try:
            after = resolve(new)
        except ConfigError:
            continue  # no value for this setting
        if differences(before, after):
            found.append(after)
    if not isinstance(given[0], str):
        del found[1:]
    assert found, f"no other value for {section}.{key} among {given}"
    return found


@pytest.mark.parametrize(("section", "choice", "key"), KEYS)
def test_a_setting_that_is_changed_at_resume(corpora, tmp_path, section, choice, key):
    base = document(corpora, section, choice, key)
    first = resolve(base)
    assert train(first, tmp_path / "first") is None
    for number, other in enumerate(changed(base, corpora, section, choice, key)):
        is_length = (section, key) == ("train", "samples")
        for name, before, after in (("there", first, other), ("back", other, first)):
            out = tmp_path / f"{name}-{number}"
            if before is first:
                shutil.copytree(tmp_path / "first", out)
            elif section in ALIKE or is_length or train(before, out) is not None:
                break  # the setting cannot be so in a run of its own
            refused = train(after, out, samples=0 if is_length else first.train.samples)
            what = differences(before, after)[0]
            print(f"{what.key}: {what.old} -> {what.new}: {refused or 'goes on'}")
            if refused is None:
                noted = [change.key for change in read_changes(out / "changes.toml")]
                assert what.key in noted
                assert what.key not in LASTING
            elif "was made with" in str(refused):
                break  # the way back is no other


@pytest.mark.parametrize("key", sorted(without_effect_in_docs()))
def test_what_has_no_effect_moves_no_bit(corpora, tmp_path, key):
    base = document(corpora, "data", "", "corpus")
    section, name = key.split(".")
    (other, *_) = changed(base, corpora, section, "", name)
    first, models = resolve(base), []
    for run, after in (("as before", first), ("changed", other)):
        assert train(first, tmp_path / run) is None
        assert train(after, tmp_path / run, samples=first.train.samples) is None
        models.append(TrainedModel.read(tmp_path / run).theta_P)
    assert key in {c.key for c in read_changes(tmp_path / "changed/changes.toml")}
    assert np.array_equal(*models)
