"""Random schedules in the virtual world, by seed: a deterministic simulation.

    python -m tests.strategies.schedules bmuf 17        # replay a seed
    python -m tests.strategies.schedules all 0 100000   # soak: seeds 0..99999 of each

A seed decides everything: ranks, their numbers of steps, the machine, who is how slow,
the strategy's settings, sync points in the middle; every other seed takes rare branches
of the world (mpilm/world/virtual/rare.py), and in half of these some gradients are not
finite. Whatever it is, all ranks finish, nothing
stays in flight, mass is conserved (laws.py), nobody is further ahead than the strategy
allows, and the same seed gives the same bits, observed or not. The models follow
FoundationDB's and TigerBeetle's simulations.

A strategy may also be named module:Class; settings and checks are those of its `name`.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from mpilm.strategies import STRATEGIES
from mpilm.strategies.ema import Ema, EmaConfig
from mpilm.strategies.registry import INNER
from mpilm.strategies.topology import TOPOLOGIES
from mpilm.testing.fleet import ROWS
from mpilm.testing.schedules import draw_plan, draw_size
from mpilm.world.virtual.rare import drawn_rare
from tests.strategies.fleets import fleet, thetas
from tests.strategies.laws import LAWS, SCATTERED, check_mass

MODULE = "tests.strategies.schedules"
TWICE = 10  # every so many seeds are run twice

# what a strategy is set to: (random numbers, ranks) -> settings of its Config
SETTINGS = {
    "local": lambda draw, size: {},
    "allreduce": lambda draw, size: {
        "bucket_bytes": draw.choice([4, 48, 2_000_000]),
        "rows": ["auto", "union", "gather", "dense"][size % 4],
    },
    "model_averaging": lambda draw, size: {
        "period": draw.randint(1, 4),
        "warmup": draw.choice([0, 0, 2]),
        "momentum": draw.choice(["keep", "reset", "average"]),
    },
    "bmuf": lambda draw, size: {
        "period": (period := draw.randint(1, 4)),
        "eta": draw.choice([-1.0, 0.0, 0.5]),
        "zeta": draw.choice([1.0, 0.7]),
        "momentum": draw.choice(["classical", "nesterov"]),
        "warmup": draw.choice([0, 0, 1]),
        "stagger": draw.random() < 0.5,
        "delay": draw.choice([0, draw.randrange(period)]),
    },
    "gossip_bmuf": lambda draw, size: {
        "period": (period := draw.randint(1, 4)),
        "delay": draw.randrange(period),
        "group_size": draw.randint(2, max(2, min(4, size))),
        "components": draw.choice(["layers", "whole", 1, 3]),
        "filter": draw.random() < 0.7,
        "eta": draw.choice([-1.0, 0.0, 0.5]),
        "zeta": draw.choice([1.0, 0.7]),
        "momentum": draw.choice(["classical", "nesterov"]),
        "mix": draw.choice(["models", "starts", "momenta"]),
        "seed": draw.randrange(1000),
    },
    "dpsgd": lambda draw, size: {
        "topology": draw.choice(list(TOPOLOGIES)),
        "overlap": draw.random() < 0.5,
        "seed": draw.randrange(1000),
    },
    "delay_by_one": lambda draw, size: {},
    "adpsgd": lambda draw, size: {
        "mixing": draw.choice(["fixed_ring", "random_ring", "random_pairs"]),
        "mixes_per_step": draw.choice([0.5, 1.0, 3.0]),
        "weight": draw.choice([1 / 3, 0.5]),
        "pieces": draw.randint(1, 3),
        "ring_rounds": draw.randint(1, 3),
        "seed": draw.randrange(1000),
    },
    "async_sgd": lambda draw, size: drawn_server(draw),
    "gossip_pga": lambda draw, size: {
        "period": draw.randint(1, 5),
        "topology": draw.choice([name for name in TOPOLOGIES if name != "complete"]),
        "seed": draw.randrange(1000),
    },
    "sgp": lambda draw, size: {
        "graph": draw.choice(["exponential", "random"]),
        "seed": draw.randrange(1000),
    },
    "noloco": lambda draw, size: {
        "period": draw.randint(1, 4),
        "alpha": draw.choice([0.0, 0.5]),
        "beta": draw.choice([0.7, 1.0]),
        "gamma": draw.choice([0.6, 1.0]),
        "seed": draw.randrange(1000),
    },
    "sparta": lambda draw, size: {
        "share": draw.choice([0.01, 0.3, 1.0]),
        "seed": draw.randrange(1000),
    },
    "des_loc": lambda draw, size: {
        "period": draw.randint(1, 4),
        "period_first": draw.randint(0, 5),
        "period_second": draw.randint(0, 5),
    },
    "sparse_loco": lambda draw, size: {
        "period": draw.randint(1, 4),
        "share": draw.choice([0.03, 0.5, 1.0]),
        "chunk": draw.choice([7, 16, 4096]),
        "decay": draw.choice([0.9, 1.0]),
        "outer_lr": draw.choice([0.7, 1.0]),
    },
    "eager_diloco": lambda draw, size: {
        "period": draw.randint(1, 4),
        "eta": draw.choice([0.0, 0.4]),
        "zeta": draw.choice([0.5, 0.8]),
        "momentum": draw.choice(["classical", "nesterov"]),
    },
    "divshare": lambda draw, size: {
        "period": draw.randint(1, 4),
        "fragments": draw.randint(1, 12),
        "copies": draw.randint(1, 3),
        "seed": draw.randrange(1000),
    },
    "hierarchical": lambda draw, size: {
        "node_size": (
            members := draw.choice([n for n in range(1, size + 1) if size % n == 0])
        ),
        "inner": (inner := draw.choice(list(INNER))),
        "settings": SETTINGS[inner](draw, size // members),
    },
}

# steps that a rank may be ahead of the slowest: (settings, ranks) -> number or None
LEADS = {
    "allreduce": lambda settings, size: 1,
    "model_averaging": lambda settings, size: settings["period"],
    "bmuf": lambda settings, size: settings["period"] + settings["delay"],
    "dpsgd": lambda settings, size: {
        "complete": 1,
        "fixed_ring": size // 2,
        "exponential": (size - 1).bit_length(),
    }.get(settings["topology"]),
    "delay_by_one": lambda settings, size: 1,
    "gossip_pga": lambda settings, size: settings["period"],
    "sparta": lambda settings, size: 1,
    "sparse_loco": lambda settings, size: settings["period"],
    "des_loc": lambda settings, size: settings["period"],
    "async_sgd": lambda settings, size: (
        settings["staleness_bound"] if settings["staleness_bound"] >= 0 else None
    ),
}


def drawn_server(draw: random.Random) -> dict[str, Any]:
    """Return settings of `async_sgd`; `ahead` goes with neither of the others."""
    bound, momentum = draw.choice([-1, 0, 1, 3]), draw.choice([0.0, 0.5])
    settings = {"staleness_bound": bound, "momentum": momentum}
    if bound < 0 and not momentum:
        settings["ahead"] = draw.choice([False, True])
    return settings


@dataclass(frozen=True)
class Schedule:
    """All that a seed decides."""

    kind: str
    name: str
    size: int
    settings: dict[str, Any]
    plan: dict[str, Any]  # other arguments of `fleet`

    def run(self, watch=None):
        """Train; return the ranks."""
        kinds = {self.name: find(self.kind)}
        arguments = {**self.plan, **self.settings, "watch": watch, "kinds": kinds}
        rare = arguments["rare"] = drawn_rare(self.plan["rare"])
        if rare is not None and rare.are_bad:
            options = self.plan["learner"]
            arguments["learner"] = lambda rank: {
                **options,
                "spoils": partial(rare.spoils, rank),
            }
        return fleet(self.name, self.size, **arguments)


def find(kind):
    """Return the strategy class of a name, or of module:Class."""
    if ":" not in kind:
        return STRATEGIES[kind]
    module, _, name = kind.partition(":")
    return getattr(import_module(module), name)


def schedule(kind, seed):
    """Return what a seed decides."""
    strategy = find(kind)
    name = strategy.name
    draw = random.Random(f"{name} {seed}")
    size = draw_size(draw)
    settings = SETTINGS[name](draw, size) if name in SETTINGS else {}
    lockstep = STRATEGIES[settings.get("inner", name)].lockstep
    plan = draw_plan(draw, size, lockstep=lockstep)
    if not lockstep:
        members = settings.get("node_size", 1)  # in lockstep with each other
        plan["steps"] = np.repeat(plan["steps"][::members], members).tolist()
    may_differ = name not in LAWS or name in SCATTERED
    plan["scatter"] = may_differ and draw.random() < 0.7
    if takes_rows(strategy, settings) and random.Random(f"rows {seed}").random() < 0.3:
        plan["learner"]["layout"], plan["scatter"] = ROWS, False
    plan["world_seed"], plan["rare"] = seed, seed
    return Schedule(kind, name, size, settings, plan)


def takes_rows(strategy, settings):
    """Return whether it trains row tables with these settings."""
    cut = isinstance(settings.get("components"), int)
    directed = settings.get("topology") == "exponential"
    others = settings.get("leave_out") or settings.get("units", 1.0) < 1.0
    others = others or settings.get("ahead")
    whole = settings.get("ahead", False)
    return strategy.takes_rows and not (cut or directed or others or whole)


def run(kind, seed):
    """Run the schedule of a seed and check everything that must hold."""
    chosen = schedule(kind, seed)
    ranks = chosen.run()
    check(chosen, ranks)
    if seed % TWICE == 0:
        watched = ranks[0].strategy.synchronises and chosen.name != "hierarchical"
        again = chosen.run(observer if watched else None)  # inside nodes it costs time
        for one, other in zip(ranks, again, strict=True):
            assert np.array_equal(one.learner.theta, other.learner.theta), "other bits"
            assert np.array_equal(one.final, other.final), "another final model"
            assert one.seconds == other.seconds, "another time"
        num_events = ranks[0].simulation.num_events
        assert num_events == again[0].simulation.num_events, "other events"


def observer(strategy, learner):
    """Attach a moving average: it must not change a bit."""
    return Ema(EmaConfig(syncs=3), strategy, learner)


def check(chosen, ranks):
    """Raise unless the run kept its promises."""
    name, size, plan = chosen.name, chosen.size, chosen.plan
    steps = plan["steps"]
    steps = [steps] * size if isinstance(steps, int) else steps
    taken = [rank.learner.samples for rank in ranks]
    assert taken == steps, f"{taken} steps, not {steps}"
    assert np.isfinite(thetas(ranks)).all(), "not finite"
    check_mass(name, ranks)
    for rank in ranks:
        assert np.array_equal(rank.final, ranks[0].final), "ranks end apart"
    limit = LEADS[name](chosen.settings, size) if name in LEADS else None
    lead = max((lead for rank in ranks for lead in rank.leads), default=0)
    assert limit is None or lead <= limit, f"{lead} steps ahead, more than {limit}"
    check_metrics(name, ranks, steps)
    for rank in ranks:
        assert not open_requests(rank.strategy), "a request that nobody waited for"


def open_requests(strategy):
    """Return what a strategy has started and not waited for."""
    strategy = getattr(strategy, "inner", strategy)
    if strategy is None:  # not a leader
        return []
    found = list(getattr(strategy, "under_way", []))
    if strategy.service is not None:
        found += strategy.service.open_requests
    return found


def counts_staleness(strategy):
    """Return whether a rank knows it of its steps: of `async_sgd` servers do."""
    strategy = getattr(strategy, "inner", strategy)
    return strategy.name != "async_sgd" or strategy.service.is_server


def check_metrics(name, ranks, steps):
    """Raise unless what the ranks counted agrees with each other."""
    metrics = [rank.strategy.metrics() for rank in ranks]
    if all("staleness" in own for own in metrics):
        counted = [int(own["staleness"].sum()) for own in metrics]
        known = [
            num if counts_staleness(rank.strategy) else 0
            for rank, num in zip(ranks, steps, strict=True)
        ]
        assert counted == known, f"staleness of {counted} steps, not of {known}"
    if name in ("adpsgd", "gossip_bmuf"):
        partners = np.array([own["partners"] for own in metrics])
        assert (partners == partners.T).all(), (
            "one counts an exchange that the other does not"
        )
    if name == "adpsgd":
        begun = sum(rank.strategy.service.round for rank in ranks)
        assert partners.sum() == 2 * begun, "exchanges without an end"
        most = ranks[0].strategy.config.mixes_per_step
        for rank, num in zip(ranks, steps, strict=True):
            assert rank.strategy.service.round <= num * most, "too many exchanges"


def replay(kind, seed):
    """Return the command that runs this seed again."""
    return f"python -m {MODULE} {kind} {seed}"


def sweep(kind, seeds):
    """Run the schedules of `seeds`; say how to replay the first one that fails."""
    for seed in seeds:
        try:
            run(kind, seed)
        except Exception as error:
            command = replay(kind, seed)
            reason = f"{type(error).__name__}: {error}"
            print(f"{reason}\nreplay: {command}", file=sys.stderr, flush=True)
            raise AssertionError(f"{reason}\nreplay: {command}") from error


def main(kind, first, stop=None):
    """Run one seed, or a range of seeds."""
    seeds = range(int(first), int(stop) if stop else int(first) + 1)
    for name in STRATEGIES if kind == "all" else [kind]:
        sweep(name, seeds)
        print(f"{name}: {len(seeds)} schedules kept all promises", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
