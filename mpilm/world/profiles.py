"""Profiles of faults: what goes wrong, on which ranks, and when.

    [[faults.profile]]
    kind = "spikes"
    ranks = [0, 1]
    probability = 0.02
    factor = 20.0

Steps are counted on each rank from 0, anew in every launch; seconds are those of the
world's clock. docs/faults.md has an example of each kind.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from mpilm.convert import convert, unknown
from mpilm.errors import ConfigError
from mpilm.world.machine import Link

Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Ranks = tuple[Natural, ...]
Seconds = Annotated[float, Meta(ge=0)]

NO_FAULT = Link(0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One entry of [[faults.profile]]."""

    @property
    def named(self) -> set[int]:
        """The ranks that it names."""
        return set()

    def slowdown(self, rank: int, time_s: float, step: int, seed: str) -> float:
        """Return the factor by which this step of `rank` takes longer, 1 or more."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Slowing(Profile):
    """A profile that slows computing.

    ranks   whom it concerns; empty: all ranks
    factor  by which a step takes longer, at least 1
    """

    ranks: Ranks = ()
    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1.0):
            raise ValueError(f"factor: {self.factor} is not a factor of at least 1")

    @property
    def named(self) -> set[int]:
        return set(self.ranks)

    def slowdown(self, rank: int, time_s: float, step: int, seed: str) -> float:
        if self.ranks and rank not in self.ranks:
            return 1.0
        return self.factor if self.is_slow(time_s, step, f"{seed} {rank}") else 1.0

    def is_slow(self, time_s: float, step: int, seed: str) -> bool:
        """Return whether a step that begins at `time_s` is slow on a rank it concerns.

        Args:
            seed: another one for each rank.
        """
        return True


@dataclass(frozen=True, kw_only=True)
class Constant(Slowing):
    """Always slow."""

    kind: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class Spikes(Slowing):
    """Slow steps at random; the same ones in each run with the same seed."""

    kind: Literal["spikes"] = "spikes"
    probability: Annotated[float, Meta(ge=0, le=1)]
    """of a step to be slow"""

    def is_slow(self, time_s: float, step: int, seed: str) -> bool:
        return random.Random(f"{seed} {step}").random() < self.probability


@dataclass(frozen=True, kw_only=True)
class Periodic(Slowing):
    """Slow at the end of every period, in steps or in seconds."""

    kind: Literal["periodic"] = "periodic"
    every_steps: Natural = 0
    """steps of a period"""
    for_steps: Natural = 0
    """its last steps, which are slow"""
    every_s: Seconds = 0.0
    """seconds of a period"""
    for_s: Seconds = 0.0
    """its last seconds: a step that begins in them is slow"""

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = 0 < self.for_steps <= self.every_steps
        seconds = 0.0 < self.for_s <= self.every_s
        both = (self.every_steps or self.for_steps) and (self.every_s or self.for_s)
        if both or not (steps or seconds):
            raise ValueError(
                "a period is every_steps and for_steps, or every_s and for_s; the"
                " second not more than the first"
            )

    def is_slow(self, time_s: float, step: int, seed: str) -> bool:
        if self.every_steps:
            return step % self.every_steps >= self.every_steps - self.for_steps
        return time_s % self.every_s >= self.every_s - self.for_s


@dataclass(frozen=True, kw_only=True)
class SlowStart(Slowing):
    """Slow at first."""

    kind: Literal["slow_start"] = "slow_start"
    steps: Positive
    """how many steps are slow"""

    def is_slow(self, time_s: float, step: int, seed: str) -> bool:
        return step < self.steps


@dataclass(frozen=True, kw_only=True)
class SlowLink(Profile):
    """Messages between two sets of ranks, either way, take longer."""

    kind: Literal["slow_link"] = "slow_link"
    ranks: Ranks = ()
    """one end; empty: all ranks"""
    peers: Ranks = ()
    """the other end; empty: all ranks"""
    latency_s: Seconds = 0.0
    """seconds that each message takes longer"""
    bandwidth_Bps: Annotated[float, Meta(gt=0)] = math.inf
    """bytes per second, at most"""

    @property
    def named(self) -> set[int]:
        return {*self.ranks, *self.peers}

    def joins(self, one: int, other: int) -> bool:
        """Return whether it lies between these two ranks."""
        ends = (one, other), (other, one)
        return one != other and any(
            (not self.ranks or a in self.ranks) and (not self.peers or b in self.peers)
            for a, b in ends
        )

    def ends_in(self, group: Collection[int]) -> set[int]:
        """Return the ranks of a group that are an end of it, with the other in it."""
        return {a for a in group if any(self.joins(a, b) for b in group)}


@dataclass(frozen=True, kw_only=True)
class FailAt(Profile):
    """A rank that dies before one of its steps."""

    kind: Literal["fail_at"] = "fail_at"
    rank: Natural
    """which rank"""
    step: Natural
    """which step, from 0"""

    @property
    def named(self) -> set[int]:
        return {self.rank}


@dataclass(frozen=True, kw_only=True)
class JoinAt(Profile):
    """A rank more is asked for once rank 0 has taken so many steps."""

    kind: Literal["join_at"] = "join_at"
    step: Natural
    """how many steps"""


PROFILES: dict[str, type[Profile]] = {
    "constant": Constant,
    "spikes": Spikes,
    "periodic": Periodic,
    "slow_start": SlowStart,
    "slow_link": SlowLink,
    "fail_at": FailAt,
    "join_at": JoinAt,
}


def read_profile(given: Any, number: int) -> Profile:
    """Return the profile that a table of the configuration declares.

    Args:
        given: the table; or a profile, which is returned as it is.
        number: of the table, from 1, for messages.

    Raises:
        ConfigError: one line that names the profile and the key.
    """
    if isinstance(given, Profile):
        return given
    place = f"faults.profile {number}"
    if not isinstance(given, dict) or "kind" not in given:
        known = ", ".join(PROFILES)
        raise ConfigError(f"{place}: a table with a kind, one of {known}")
    kind = str(given["kind"])
    if kind not in PROFILES:
        raise ConfigError(f"{place}: {unknown('kind', kind, PROFILES)}")
    found: Profile = convert(PROFILES[kind], given, f"{place} ({kind})")
    return found
