"""Declared faults: which rank is how slow, and when. Both worlds ask this page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from mpilm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Section [faults]: what is wrong with the ranks.

    >>> faults = Faults(slow={"3": 10.0})
    >>> faults.slowdown(3, time_s=0.0, step=0), faults.slowdown(0, time_s=0.0, step=0)
    (10.0, 1.0)
    """

    slow: dict[str, float] = field(default_factory=dict)
    """rank = factor of at least 1 by which its computing takes longer"""

    def __post_init__(self) -> None:
        for rank, factor in self.slow.items():
            if not str(rank).isdecimal():
                raise ValueError(f"slow: {rank!r} is not a rank")
            if not (math.isfinite(factor) and factor >= 1.0):
                raise ValueError(f"slow.{rank}: {factor} is not a factor of at least 1")

    @cached_property
    def _slow(self) -> dict[int, float]:
        return {int(rank): float(factor) for rank, factor in self.slow.items()}

    def slowdown(self, rank: int, time_s: float, step: int) -> float:
        """Return the factor by which a step takes longer than it should, 1 or more.

        Args:
            rank: whose step.
            time_s: when it begins, seconds on the world's clock.
            step: its number on this rank, from 0.
        """
        return self._slow.get(rank, 1.0)

    def check(self, num_ranks: int) -> None:
        """Raise unless the faults speak of ranks that exist.

        Raises:
            ConfigError: one line naming the key.
        """
        for rank in self._slow:
            if rank >= num_ranks:
                raise ConfigError(
                    f"faults.slow.{rank}: there are only {num_ranks} ranks (from 0)"
                )
