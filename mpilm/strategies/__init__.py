"""All strategies by name."""

from __future__ import annotations

from typing import Any

from mpilm.errors import ConfigError
from mpilm.strategies.base import Learner, Pace, Strategy
from mpilm.strategies.hierarchical import Hierarchical
from mpilm.strategies.local import Local
from mpilm.strategies.registry import INNER, find
from mpilm.world.base import World

__all__ = [
    "INNER",
    "STRATEGIES",
    "Learner",
    "Pace",
    "Strategy",
    "find_strategy",
    "strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {
    Local.name: Local,
    **INNER,
    Hierarchical.name: Hierarchical,
}


def find_strategy(name: str) -> type[Strategy]:
    """Return the strategy `name`, or one of somebody's own: "my_module:MyStrategy".

    Raises:
        ConfigError: no such strategy.
    """
    return find(name, STRATEGIES)


def strategy(name: str, world: World, **settings: Any) -> Strategy:
    """Return the strategy `name` in `world`, with settings of its Config.

    Args:
        name: one of `STRATEGIES`, or "my_module:MyStrategy".

    Communicates: collective (it duplicates the world's communicator), blocking.

    Raises:
        ConfigError: no such strategy, or no such setting of it.
    """
    found = find_strategy(name)
    try:
        config = found.Config(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy {name}: {error}") from error
    return found(world, config)
