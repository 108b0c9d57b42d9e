"""Settings changed together where a run is resumed: all hold, or one line says why not.

Every pair of settings that can be changed is changed in some row of a covering array,
drawn by seed; and each that cannot be changed beside one of them. `make soak` walks
through all rows of every strategy, `make test` through some of two.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mpilm.config import Config, resolve, settings
from mpilm.data.synthetic import prepare_synthetic
from mpilm.errors import ConfigError
from mpilm.strategies import STRATEGIES
from mpilm.train.changes import differences, read_changes
from mpilm.train.folder import RunFolder
from tests.strategies.changing import RANKS, refused_in_docs, train, values

pytestmark = pytest.mark.long

IS_WHOLE = "MPILM_MINUTES" in os.environ
SAMPLES = 3 * RANKS * 10
Key = tuple[str, str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of text."""
    path = tmp_path_factory.mktemp("corpus") / "c.h5"
    prepare_synthetic(path, vocab=12, tokens=2_000, seed=3, branching=3)
    return path


def first_of(name: str, corpus: Path, draw: random.Random) -> dict[str, Any]:
    """Return what a run begins with: the choices that have settings are drawn."""
    train = {"batch": 2, "unroll": 5, "samples": SAMPLES, "log_every": 1}
    train |= {"test": False, "worst_rank": False}
    schedule = draw.choice(["constant", "exponential", "newbob"])
    return {
        "data": {"corpus": str(corpus), "source": draw.choice(["shards", "pool"])},
        "model": {"embed": 4, "hidden": 4},
        "optim": {"name": draw.choice(["sgd", "adamw"])},
        "schedule": {"name": schedule},
        "strategy": {"name": name},
        "train": train,
    }


def others(document: dict[str, Any], draw: random.Random) -> dict[Key, Any]:
    """Return another value for every setting that has a meaning in a run."""
    before = resolve(document)
    plain = before.to_dict()
    found: dict[Key, Any] = {}
    for setting in settings():
        section, key = setting.section, setting.key
        choice = plain[section].get("name", "")
        if (setting.choice or choice) != choice or (section, key) in LEFT_OUT:
            continue
        given = list(values(section, setting.choice, key))
        draw.shuffle(given)
        for value in given:
            if value == plain[section][key]:
                continue
            try:
                after = resolve(with_values(document, {(section, key): value}))
            except ConfigError:
                continue
            if differences(before, after):
                found[section, key] = value
                break
    return found


# more samples are what every row asks for; files, devices and words of no meaning here
LEFT_OUT = {("train", "samples"), ("train", "device"), ("data", "corpus")}
LEFT_OUT |= {("model", "init"), ("model", "name"), ("strategy", "name")}
LEFT_OUT |= {("optim", "name")}


def with_values(document: dict[str, Any], changed: dict[Key, Any]) -> dict[str, Any]:
    """Return a configuration with some settings changed, in plain sections."""
    found = {section: dict(given) for section, given in document.items()}
    for (section, key), value in changed.items():
        if key == "name":
            found[section] = {}
        found.setdefault(section, {})[key] = value
    return found


def rows(keys: list[Key], draw: random.Random) -> list[set[Key]]:
    """Return sets of keys: every two keys are together in one of them.

    >>> all_ = rows([("a", "b"), ("a", "c"), ("d", "e")], random.Random(1))
    >>> all(any({*pair} <= row for row in all_) for pair in combinations(all_[0], 2))
    True
    """
    missing, found = {frozenset(p) for p in combinations(keys, 2)}, []
    while missing:
        drawn = [{*draw.sample(keys, max(2, len(keys) // 2))} for _ in range(8)]
        best = max(drawn, key=lambda row: sum(pair <= row for pair in missing))
        missing = {pair for pair in missing if not pair <= best}
        found.append(best)
    return found


def is_named(key: Key, text: str) -> bool:
    """Return whether a line names a setting."""
    section, name = key
    if name == "ranks_per_node":  # hierarchical names what it is about, and the remedy
        name = "nodes of"
        section = "strategy.node_size"
    return f"{section}.{name}" in text or (
        bool(re.search(rf"\b{name}\b", text)) and section in text
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def go_on(
    document: dict[str, Any], first: Path, out: Path, changed: dict[Key, Any]
) -> set[Key]:
    """Resume a run with settings changed; return those that were refused, if any.

    Whatever is refused is named in one line, and leaves the run as it was. Everything
    that is not is noted.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(first, out)
    before = resolve(document)
    try:
        after = resolve(with_values(document, changed))
    except ConfigError as error:
        refused: Any = error
    else:
        refused = train(after, out, samples=SAMPLES)
    has_diverged = "a smaller optim.lr" in str(refused)  # it was taken: a rate of 1e9
    if refused is None or has_diverged:
        assert_noted(before, after, out)
        return set()
    named = {key for key in changed if is_named(key, str(refused))}
    assert named, f"{refused}: names none of {sorted(changed)}"
    assert contents(out) == contents(first), refused
    return named


def assert_noted(before: Config, after: Config, out: Path) -> None:
    """Assert that a run tells all that was changed, and can be resumed as it was."""
    noted = {change.key for change in read_changes(out / "changes.toml")}
    want = {change.key for change in differences(before, after)}
    assert noted == want | {"train.samples"}
    again = RunFolder(out).read_config()
    assert {c.key for c in differences(after, again)} == {"train.samples"}


@pytest.mark.parametrize("name", STRATEGIES if IS_WHOLE else ["bmuf", "adpsgd"])
def test_settings_changed_together(corpus: Path, tmp_path: Path, name: str) -> None:
    draw = random.Random(f"pairs {name}")
    document = first_of(name, corpus, draw)
    first, out = tmp_path / "first", tmp_path / "out"
    assert train(resolve(document), first) is None
    other = others(document, draw)
    lasting = [key for key in other if ".".join(key) in refused_in_docs()]
    free = [key for key in other if key not in lasting]
    assert len(lasting) > 5
    assert len(free) > 30
    for row in rows(free, draw)[: None if IS_WHOLE else 2]:
        left = {key: other[key] for key in sorted(row)}
        while left and (refused := go_on(document, first, out, left)):
            left = {key: v for key, v in left.items() if key not in refused}
    for key in draw.sample(lasting, len(lasting) if IS_WHOLE else 2):
        beside = draw.choice(free)
        pair = {key: other[key], beside: other[beside]}
        draw.shuffle(order := list(pair))
        refused = go_on(document, first, out, {each: pair[each] for each in order})
        if key not in refused:  # the other one does not stand here by itself
            refused |= go_on(document, first, out, {key: other[key]})
        assert key in refused, (pair, refused)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.chunk_windows", 3, "data.chunk_windows was 20, is 3: resume: the place"),
        ("data.corpus", "other", "data.corpus was .* the place in the data was saved"),
        ("strategy.leave_out", 0.5, "strategy.leave_out was 0.0, is 0.5: strategy"),
        ("train.seed", 7, "with train.seed = 1, this run has 7: resume with 1"),
    ],
)
def test_what_a_part_refuses_names_the_setting(
    corpus: Path, tmp_path: Path, key: str, value: Any, words: str
) -> None:
    """It named what the part keeps of it, which nobody has set."""
    document = first_of("model_averaging", corpus, random.Random(1))
    document["data"]["source"] = "pool"
    assert train(resolve(document), tmp_path / "x") is None
    if value == "other":
        value = str(tmp_path / "other.h5")
        prepare_synthetic(Path(value), vocab=12, tokens=1_500, seed=3, branching=3)
    section, _, name = key.partition(".")
    changed = with_values(document, {(section, name): value})
    refused = train(resolve(changed), tmp_path / "x", samples=SAMPLES)
    assert re.search(words, str(refused))
