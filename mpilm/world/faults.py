"""Declared faults: what is wrong with which rank, and when. Both worlds ask this page.

What can be wrong stands in profiles.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

from msgspec import Meta

from mpilm.errors import ConfigError
from mpilm.world.machine import Link
from mpilm.world.profiles import NO_FAULT, FailAt, JoinAt, SlowLink, read_profile


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Section [faults]: what is wrong with the ranks.

    >>> faults = Faults(slow={"3": 10.0}, profile=({"kind": "slow_start",
    ...                 "ranks": [3], "steps": 5, "factor": 2.0},))
    >>> [faults.slowdown(3, time_s=0.0, step=step) for step in (0, 5)]
    [20.0, 10.0]
    """

    slow: dict[str, float] = field(default_factory=dict)
    """rank = factor of at least 1 by which its computing takes longer"""
    profile: tuple[Any, ...] = ()
    """tables [[faults.profile]], see docs/faults.md; those of one rank multiply"""
    seed: Annotated[int, Meta(ge=0)] = 1
    """of the random profiles"""

    def __post_init__(self) -> None:
        for rank, factor in self.slow.items():
            if not str(rank).isdecimal():
                raise ValueError(f"slow: {rank!r} is not a rank")
            if not (math.isfinite(factor) and factor >= 1.0):
                raise ValueError(f"slow.{rank}: {factor} is not a factor of at least 1")
        read = tuple(read_profile(p, n) for n, p in enumerate(self.profile, start=1))
        object.__setattr__(self, "profile", read)

    @cached_property
    def _slow(self) -> dict[int, float]:
        return {int(rank): float(factor) for rank, factor in self.slow.items()}

    @cached_property
    def _links(self) -> list[SlowLink]:
        return [profile for profile in self.profile if isinstance(profile, SlowLink)]

    @cached_property
    def _deaths(self) -> set[tuple[int, int]]:
        found = (p for p in self.profile if isinstance(p, FailAt))
        return {(profile.rank, profile.step) for profile in found}

    def slowdown(self, rank: int, time_s: float, step: int) -> float:
        """Return the factor by which a step takes longer than it should, 1 or more.

        Args:
            rank: whose step.
            time_s: when it begins, seconds on the world's clock.
            step: its number on this rank, from 0.
        """
        factor = self._slow.get(rank, 1.0)
        for number, profile in enumerate(self.profile):
            seed = f"mpilm fault {self.seed} {number}"
            factor *= profile.slowdown(rank, time_s, step, seed)
        return factor

    def fails(self, rank: int, step: int) -> bool:
        """Return whether the rank dies before this step."""
        return (rank, step) in self._deaths

    def of_new_rank(self) -> Faults:
        """Return them for a rank that joins: the deaths are those of the others."""
        left = tuple(p for p in self.profile if not isinstance(p, FailAt | JoinAt))
        return replace(self, profile=left)

    def joins(self, step: int) -> int:
        """Return how many ranks more are asked for once rank 0 has come so far."""
        found = (p for p in self.profile if isinstance(p, JoinAt))
        return sum(profile.step <= step for profile in found)

    def link(self, one: int, other: int) -> Link:
        """Return what messages between two ranks take longer, and their bandwidth.

        >>> Faults(profile=({"kind": "slow_link", "ranks": [0], "peers": [1],
        ...                  "latency_s": 0.5},)).link(1, 0)
        Link(latency_s=0.5, bandwidth_Bps=inf)
        """
        found = [profile for profile in self._links if profile.joins(one, other)]
        return _all_or_none(found) if found else NO_FAULT

    def link_within(self, group: Collection[int]) -> Link:
        """Return the same of a collective of all ranks in `group`."""
        found = [profile for profile in self._links if profile.ends_in(group)]
        return _all_or_none(found) if found else NO_FAULT

    def ends_link(self, rank: int, group: Collection[int]) -> bool:
        """Return whether a slow link inside `group` ends at `rank`."""
        return any(rank in profile.ends_in(group) for profile in self._links)

    def scaled(self, scale: float) -> Faults:
        """Return the faults where every message has `scale` times fewer bytes."""
        profile = tuple(
            replace(p, bandwidth_Bps=p.bandwidth_Bps / scale)
            if isinstance(p, SlowLink)
            else p
            for p in self.profile
        )
        return replace(self, profile=profile)

    def check(self, num_ranks: int) -> None:
        """Raise unless the faults speak of ranks that exist.

        Raises:
            ConfigError: one line naming the key.
        """
        there = f"there are only {num_ranks} ranks (from 0)"
        for rank in self._slow:
            if rank >= num_ranks:
                raise ConfigError(f"faults.slow.{rank}: {there}")
        for number, profile in enumerate(self.profile, start=1):
            for rank in sorted(profile.named):
                if rank >= num_ranks:
                    place = f"faults.profile {number} ({profile.kind})"
                    raise ConfigError(f"{place}: no rank {rank}, {there}")


def _all_or_none(links: Collection[SlowLink]) -> Link:
    latency_s = sum(link.latency_s for link in links)
    return Link(latency_s, min(link.bandwidth_Bps for link in links))
