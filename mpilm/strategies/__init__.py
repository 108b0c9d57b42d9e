"""All strategies by name."""

from __future__ import annotations

from typing import Any

from mpilm.errors import ConfigError
from mpilm.strategies.base import Strategy
from mpilm.strategies.hierarchical import INNER, Hierarchical
from mpilm.strategies.local import Local
from mpilm.world.base import World

STRATEGIES: dict[str, type[Strategy]] = {
    Local.name: Local,
    **INNER,
    Hierarchical.name: Hierarchical,
}


def strategy(name: str, world: World, **settings: Any) -> Strategy:
    """Return the strategy `name` in `world`, with settings of its Config.

    Communicates: collective (it duplicates the world's communicator), blocking.

    Raises:
        ConfigError: no such strategy.
    """
    if name not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise ConfigError(f"strategy.name: {name!r} is not one of {known}")
    found = STRATEGIES[name]
    return found(world, found.Config(**settings))
