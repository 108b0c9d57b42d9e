"""Settings that are changed where a run is resumed: what they may be changed to."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mpilm.config import SECTIONS, Config, settings
from mpilm.errors import MpilmError
from mpilm.train.loop import Trainer
from mpilm.world.virtual import run_virtual

RANKS = 2
DOCS = Path(__file__).parents[2] / "docs/checkpoints.md"
SMALL = {
    "lstm_lm": {"embed": 6, "hidden": 8},
    "dnn": {"hidden": 8, "layers": 1, "context": 1},
    "lstm_am": {"hidden": 8, "layers": 1, "bottleneck": 4, "context": 1},
    "blstm_am": {"hidden": 8, "layers": 1, "bottleneck": 4, "context": 1},
}
# key -> values to try first; else they follow from the setting's type
SPECIAL: dict[str, list[Any]] = {
    "train.device": ["cpu"],
    "faults.slow": [{"1": 2.0}],
    "faults.profile": [[{"kind": "constant", "factor": 2.0}]],
    "strategy.settings": [{"weight": 0.25}],
    "strategy.inner": ["bmuf"],
    "strategy.servers": [1],
    "model.init": ["none.h5"],
    "model.adaptive_cutoffs": [[5, 20]],
    "ema.samples": [50],
    "optim.nesterov": [True],
}


def values(section: str, choice: str, key: str) -> list[Any]:
    """Return values that a setting may have, by its type."""
    kind = SECTIONS[section]
    if isinstance(kind, tuple) and not choice:
        return [name for name in kind[0] if name not in {kind[1], "own"}]
    if f"{section}.{key}" in SPECIAL:
        return SPECIAL[f"{section}.{key}"]
    hint = get_type_hints(kind[0][choice] if choice else kind)[key]
    parts = get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)
    named = [v for part in parts if get_origin(part) is Literal for v in get_args(part)]
    of_type = {bool: [True, False], int: [3, 4, 7], float: [0.5, 3.0, 0.25, 1e9]}
    return named + [v for part in parts for v in of_type.get(part, [])]


def train(config: Config, out: Path, *, samples: int = 0) -> MpilmError | None:
    """Train, going on if there is a run; return the one line that refused it."""
    if samples:
        longer = replace(config.train, samples=config.train.samples + samples)
        config = replace(config, train=longer)

    def main(world):
        trainer = Trainer(config, world, out, resume=True)
        trainer.train()
        return trainer.totals.step

    try:
        run_virtual(main, RANKS, machine=config.machine, faults=config.faults)
    except MpilmError as error:
        cause = error.__cause__
        assert cause is None or isinstance(cause, MpilmError), repr(cause)
        assert error.everywhere, error
        assert "\n" not in str(error)
        return error
    return None


@cache
def refused_in_docs() -> set[str]:
    """Return the settings that docs/checkpoints.md says cannot be changed."""
    return row_of_docs("refused in")


@cache
def without_effect_in_docs() -> set[str]:
    """Return the settings that docs/checkpoints.md says have no effect at resume."""
    return row_of_docs("noted, and without effect")


def row_of_docs(begin: str) -> set[str]:
    """Return the settings that a row of the table in docs/checkpoints.md names."""
    (line,) = (s for s in DOCS.read_text().splitlines() if s.startswith(f"| {begin}"))
    named = set(re.findall(r"`([a-z_]+\.[a-z_*]+)`", line))
    but = set(re.findall(r"`([a-z_]+\.[a-z_*]+)`", line.partition("but for")[2]))
    every = {f"{s.section}.{s.key}" for s in settings()}
    whole = {key for key in every if f"{key.partition('.')[0]}.*" in named}
    return ((named | whole) & every) - but
