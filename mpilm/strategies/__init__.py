"""All strategies by name."""

from __future__ import annotations

from typing import Any

from mpilm.errors import ConfigError
from mpilm.strategies.adpsgd import Adpsgd
from mpilm.strategies.allreduce import Allreduce
from mpilm.strategies.async_sgd import AsyncSgd
from mpilm.strategies.base import Strategy
from mpilm.strategies.bmuf import Bmuf
from mpilm.strategies.delay_by_one import DelayByOne
from mpilm.strategies.dpsgd import Dpsgd
from mpilm.strategies.gossip_bmuf import GossipBmuf
from mpilm.strategies.local import Local
from mpilm.strategies.model_averaging import ModelAveraging
from mpilm.world.base import World

STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (
        Local,
        Allreduce,
        ModelAveraging,
        Bmuf,
        GossipBmuf,
        Dpsgd,
        DelayByOne,
        Adpsgd,
        AsyncSgd,
    )
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
