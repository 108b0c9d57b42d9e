"""Fleets by a strategy's name and settings; see mpilm.testing.fleet."""

from __future__ import annotations

from mpilm.strategies import STRATEGIES, find_strategy
from mpilm.testing import fleet as by_factory
from mpilm.testing.fleet import LAYOUT, Witness, require_quiet, targets, thetas

__all__ = ["LAYOUT", "P", "Witness", "assert_quiet", "fleet", "targets", "thetas"]

P = LAYOUT.size
assert_quiet = require_quiet
PLAN = (
    *("steps", "parts", "retire", "save_at", "until_s", "resume", "scatter"),
    *("machine", "faults", "world_seed", "rare", "learner", "watch"),
)


def fleet(name, size, *, kinds=STRATEGIES, **options):
    """Train by the strategy `name` with settings; other options as `fleet` has them.

    Args:
        kinds: strategies by name that go before those of mpilm.
    """
    plan = {key: options.pop(key) for key in PLAN if key in options}
    kind = kinds[name] if name in kinds else find_strategy(name)

    def make(world):
        return kind(world, kind.Config(**options))

    return by_factory(make, size, **plan)
