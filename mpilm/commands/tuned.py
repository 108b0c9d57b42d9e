"""The same search for every point of a sweep: `[tune]`, by Optuna.

    [tune]
    trials = 8
    [tune.range]
    "optim.lr" = {low = 0.001, high = 1.0, log = true}

Both sides of a comparison are tuned by one rule: as many trials, the same ranges, the
same sampler (TPE) with the same seed. A trial is a point of its own, NAME-tN, and its
valid perplexity decides. What is asked next depends on the trials before alone: a sweep
that goes on asks the same again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from msgspec import Meta

from mpilm.config import SECTIONS
from mpilm.convert import unknown
from mpilm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Range:
    """Where a setting may lie."""

    low: float
    """the least"""
    high: float
    """the most"""
    log: bool = False
    """draw its logarithm evenly"""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Section [tune] of a sweep."""

    range: dict[str, Range]
    """section.key to where it may lie"""
    trials: Annotated[int, Meta(ge=1)] = 8
    """runs of every point"""
    seed: Annotated[int, Meta(ge=0)] = 1
    """of the search"""

    def check(self) -> None:
        """Raise unless it can be searched.

        Raises:
            ConfigError: one line that names the key.
        """
        if not self.range:
            raise ConfigError("tune.range: names no setting")
        for key, where in self.range.items():
            section, dot, _ = key.partition(".")
            if section not in SECTIONS or not dot:
                problem = unknown("section", section, SECTIONS)
                raise ConfigError(f"tune.range.{key}: write section.key; {problem}")
            finite = math.isfinite(where.low) and math.isfinite(where.high)
            if not finite or where.low >= where.high or (where.log and where.low <= 0):
                raise ConfigError(
                    f"tune.range.{key}: low < high, and above 0 where log = true"
                )


@dataclass
class Study:
    """A search: ask for settings, tell what came of them.

    Raises:
        ConfigError: Optuna is not installed.
    """

    tuning: Tuning
    best: str = ""
    value: float = math.inf
    told: int = 0
    study: Any = field(init=False)
    trial: Any = None

    def __post_init__(self) -> None:
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "[tune] needs Optuna: pip install 'mpilm[tune]'"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.tuning.seed)
        self.study = optuna.create_study(sampler=sampler)
        self.failed = optuna.trial.TrialState.FAIL

    def ask(self, point: Any) -> Any:
        """Return the next trial of a point: a point of its own."""
        self.trial = self.study.ask()
        settings = [
            f"{key}={self.trial.suggest_float(key, r.low, r.high, log=r.log)!r}"
            for key, r in self.tuning.range.items()
        ]
        name = f"{point.name}-t{self.trial.number}"
        return replace(point, name=name, settings=(*point.settings, *settings))

    def tell(self, point: Any, value: float | None) -> None:
        """Take in what a trial came to; None: it failed."""
        if value is None or not math.isfinite(value):
            self.study.tell(self.trial, state=self.failed)
            return
        self.study.tell(self.trial, value)
        self.told += 1
        if value < self.value:
            self.best, self.value = point.name, value

    def __str__(self) -> str:
        if not self.best:
            return "no trial ended"
        return f"best of {self.told}: {self.best}, valid perplexity {self.value:.4g}"
