"""The strategies that stand for themselves, by name, and those of others.

`INNER` are all that can also work between the nodes of `hierarchical`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module

from mpilm.convert import unknown
from mpilm.errors import ConfigError
from mpilm.strategies.adpsgd import Adpsgd
from mpilm.strategies.allreduce import Allreduce
from mpilm.strategies.async_sgd import AsyncSgd
from mpilm.strategies.base import Strategy
from mpilm.strategies.bmuf import Bmuf
from mpilm.strategies.delay_by_one import DelayByOne
from mpilm.strategies.des_loc import DesLoc
from mpilm.strategies.divshare import Divshare
from mpilm.strategies.dpsgd import Dpsgd
from mpilm.strategies.eager_diloco import EagerDiloco
from mpilm.strategies.gossip_bmuf import GossipBmuf
from mpilm.strategies.gossip_pga import GossipPga
from mpilm.strategies.model_averaging import ModelAveraging
from mpilm.strategies.noloco import Noloco
from mpilm.strategies.sgp import Sgp
from mpilm.strategies.sparse_loco import SparseLoco
from mpilm.strategies.sparta import Sparta

Kind = type[Strategy]

INNER: dict[str, Kind] = {
    strategy.name: strategy
    for strategy in (
        Allreduce,
        ModelAveraging,
        Bmuf,
        GossipBmuf,
        Dpsgd,
        DelayByOne,
        Adpsgd,
        AsyncSgd,
        GossipPga,
        Sgp,
        Noloco,
        Sparta,
        DesLoc,
        SparseLoco,
        EagerDiloco,
        Divshare,
    )
}


def find(name: str, known: Mapping[str, Kind], key: str = "strategy") -> Kind:
    """Return the strategy `name` of `known`, or "module:Class" of somebody's own.

    `key` is the setting that errors name.

    A module is looked for where Python looks, and in the current folder. Importing it
    runs its code.

    Raises:
        ConfigError: no such strategy; one line.
    """
    if ":" not in name:
        if name not in known:
            raise ConfigError(f"{key}: {unknown('name', name, known)}")
        return known[name]
    module_name, _, class_name = name.partition(":")
    if "" not in sys.path:
        sys.path.append("")
    try:
        kind = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key} {name}: cannot be loaded: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise ConfigError(f"{key} {name}: is no subclass of mpilm.strategies.Strategy")
    for attribute in ("name", "Config"):
        if not hasattr(kind, attribute):
            raise ConfigError(f"{key} {name}: the class has no {attribute}")
    return kind
