"""The table of all strategies: settings, and what the battery holds against them.

A new strategy needs one line in CASES and one in schedules.SETTINGS.
tests/mpi/test_strategies.py runs the same table between real ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from mpilm.strategies.blocks import cut
from mpilm.strategies.sgp import goals_of
from mpilm.strategies.topology import (
    mixing_matrix,
    num_groups,
    random_groups,
    random_pairs,
)
from tests.strategies import references
from tests.strategies.fleets import LAYOUT

MODEL_BYTES = 4 * LAYOUT.size
Bytes = Callable[..., tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """A strategy with settings.

    name       of the strategy
    settings   of its Config; a function of the number of ranks, if they depend on it
    reference  (theta, target, steps, size) -> models and final model, float64;
               None: it depends on the timing
    moved      (rank result, size, steps) -> bytes sent and received, as its page says
    minimum    (lr, steps, near): so the final model comes near the mean minimum
    exact      its bits do not depend on the timing
    mixes      models by a matrix: no filter, no server
    """

    name: str
    settings: dict[str, Any] | Callable[[int], dict[str, Any]]
    reference: Callable[..., Any] | None
    moved: Bytes
    minimum: tuple[float, int, float] = (0.125, 480, 1e-4)
    exact: bool = True
    mixes: bool = False

    def of(self, size: int) -> dict[str, Any]:
        """Return the settings for `size` ranks."""
        return self.settings(size) if callable(self.settings) else self.settings

    @property
    def follows(self) -> bool:
        """Whether there is a reference."""
        return self.reference is not None


def reduced(every: int, parts: list[int] | None = None) -> Bytes:
    """An Allreduce of each part every so many steps: docs/allreduce.md and others."""
    sizes = parts or [LAYOUT.size]

    def moved(rank: Any, size: int, steps: int) -> tuple[int, int]:
        once = sum(2 * 4 * part * (size - 1) // size for part in sizes)
        return (steps // every * once,) * 2

    return moved


def nothing(rank: Any, size: int, steps: int) -> tuple[int, int]:
    """docs/local.md."""
    return 0, 0


def neighbours(topology: str, seed: int = 0) -> Bytes:
    """A model to and from each neighbour of each round: docs/dpsgd.md."""

    def moved(rank: Any, size: int, steps: int) -> tuple[int, int]:
        received = sum(
            (mixing_matrix(topology, size, seed, round_) > 0).astype(int) - np.eye(size)
            for round_ in range(steps)
        )
        number = rank.world.rank
        return (
            int(received[:, number].sum()) * MODEL_BYTES,
            int(received[number].sum()) * MODEL_BYTES,
        )

    return moved


def groups(vectors: int, period: int, group_size: int, components: Any) -> Bytes:
    """Some vectors to each member of a component's group: docs/gossip_bmuf.md."""

    def moved(rank: Any, size: int, steps: int) -> tuple[int, int]:
        elements = 0
        for component, slices in enumerate(cut(LAYOUT, components)):
            for block in range(1, steps // period + 1):
                found = random_groups(1, block, component, size, group_size)
                group = next(group for group in found if rank.world.rank in group)
                length = sum(where.stop - where.start for where in slices)
                elements += (len(group) - 1) * length
        return (4 * vectors * elements,) * 2

    return moved


def exchanges(rank: Any, size: int, steps: int) -> tuple[int, int]:
    """A model either way in every exchange: docs/adpsgd.md."""
    return (int(rank.strategy.metrics()["partners"].sum()) * MODEL_BYTES,) * 2


def pulls_and_pushes(rank: Any, size: int, steps: int) -> tuple[int, int]:
    """Own pushes, and what is served: docs/async_sgd.md; and the end: 8 bytes, a Bcast.

    Over all ranks it is 8P (K-1)/K + 8 S (K-1)/K each way and rank in a step.
    """
    shard, asked, asking = servers_of(rank, size)
    others = MODEL_BYTES - shard
    sent = steps * (others + asking * shard + 8 * asked) + 8 * (asked + asking) + shard
    received = steps * (others + asking * shard + 8 * asking)
    received += 8 * (asked + asking) + others
    return (sent, received) if size > 1 else (0, 0)


def one_pull_more(rank: Any, size: int, steps: int) -> tuple[int, int]:
    """As `pulls_and_pushes`; the last answer is not used: docs/async_sgd.md."""
    if size == 1:
        return 0, 0
    sent, received = pulls_and_pushes(rank, size, steps)
    shard, asked, asking = servers_of(rank, size)
    sent += 8 * asked + asking * shard
    return sent, received + MODEL_BYTES - shard + 8 * asking


def servers_of(rank: Any, size: int) -> tuple[int, int, int]:
    """Return the bytes of the own shard, how many it asks and by how many it is."""
    service = rank.strategy.service
    shard = 4 * (service.own.stop - service.own.start)
    return shard, len(service.peers), size - 1 if shard else 0


def dpsgd(topology: str, **settings: Any) -> Case:
    """Return the case of a topology."""
    settings = {"topology": topology, "seed": 11, **settings}
    return Case(
        "dpsgd", settings,
        lambda *of: references.dpsgd(*of[:3], **settings),
        neighbours(topology, 11), mixes=True,
    )  # fmt: skip


def gossip_pga(rank: Any, size: int, steps: int) -> tuple[int, int]:
    """A model a neighbour, or in every third step an Allreduce: docs/gossip_pga.md."""
    sent, received = neighbours("random_ring", 11)(rank, size, steps - steps // 3)
    averaged, _ = reduced(3)(rank, size, steps)
    return sent + averaged, received + averaged


def pushes(graph: str) -> Bytes:
    """A model and its weight to one rank, and from each sender: docs/sgp.md."""

    def moved(rank: Any, size: int, steps: int) -> tuple[int, int]:
        number, goals = (
            rank.world.rank,
            (goals_of(graph, size, 11, t) for t in range(steps)),
        )
        come = sum(to == number for each in goals for to in each)
        return steps * (MODEL_BYTES + 8), come * (MODEL_BYTES + 8)

    return moved


def sgp(graph: str) -> Case:
    """Return the case of a graph.

    With weights that differ, the mean of z is another one than that of x, which is the
    final model: the end is near the minimum as the learning rate is small.
    """
    return Case(
        "sgp", {"graph": graph, "seed": 11},
        lambda *of: references.sgp(*of[:3], graph=graph, seed=11),
        pushes(graph), (0.125, 480, 1e-4 if graph == "exponential" else 0.1),
        mixes=graph == "exponential",
    )  # fmt: skip


def noloco_pairs(rank: Any, size: int, steps: int) -> tuple[int, int]:
    """Two models to the partner of each block of 3, if there is one: docs/noloco.md."""
    number = rank.world.rank
    pairs = [random_pairs(number, size, 0, 1 + block) for block in range(steps // 3)]
    return (2 * MODEL_BYTES * sum(len(pair) - 1 for pair in pairs),) * 2


def sparse_loco(**settings: Any) -> Case:
    """Return a case that sends few entries: near the minimum, no nearer."""

    def moved(rank: Any, size: int, steps: int) -> tuple[int, int]:
        chunks = -(-LAYOUT.size // settings["chunk"])
        entries = chunks * round(settings["share"] * settings["chunk"])
        packet = 8 * chunks + 2 * entries + -(-entries // 4)
        return (steps // settings["period"] * (size - 1) * packet,) * 2

    return Case(
        "sparse_loco", settings,
        lambda *of: references.sparse_loco(*of[:3], **settings),
        moved, (0.03, 480, 0.1),
    )  # fmt: skip


def fragments(rank: Any, size: int, steps: int) -> tuple[int, int]:
    """A quarter of a model each, and a byte back for it: docs/divshare.md.

    To all of up to 5 others: so the sum of models is conserved in step. All
    are sent, but for those of the last round that `finish` finds in the queue.
    """
    once, came = MODEL_BYTES // 4, int(rank.strategy.partners.sum())
    sent, left = divmod(rank.strategy.service.sent - came, once)
    assert left == 0
    round_ = 4 * min(5, size - 1)
    assert round_ * (steps // 2 - 1) <= sent <= round_ * (steps // 2)
    return sent * once + came, came * once + sent


def eager(**settings: Any) -> Case:
    """Return a case of eager_diloco."""
    return Case(
        "eager_diloco", settings,
        lambda *of: references.eager_diloco(*of[:3], **settings),
        reduced(settings["period"]),
    )  # fmt: skip


def bmuf(**settings: Any) -> Case:
    """Return a case of bmuf: one group of all ranks."""
    parts = {"components": "layers"} if settings.get("stagger") else {}

    def reference(theta: Any, target: Any, steps: int, size: int) -> Any:
        eta = 1.0 - 1.0 / size
        return references.blocks(
            theta, target, steps, group_size=size, **{"eta": eta, **settings, **parts}
        )

    sizes = [segment.size for segment in LAYOUT] if parts else None
    return Case("bmuf", settings, reference, reduced(settings["period"], sizes))


def gossip(vectors: int, **settings: Any) -> Case:
    """Return a case of gossip_bmuf that moves so many vectors."""
    settings = {"components": "layers", "group_size": 2, **settings}

    def reference(theta: Any, target: Any, steps: int, size: int) -> Any:
        eta = 1.0 - num_groups(size, 2) / size
        return references.blocks(theta, target, steps, **{"eta": eta, **settings})

    return Case(
        "gossip_bmuf", settings, reference,
        groups(vectors, settings["period"], 2, settings["components"]),
        mixes=not settings.get("filter", True),
    )  # fmt: skip


def nodes(size: int) -> dict[str, Any]:
    """Return the settings of `hierarchical`: nodes of two, if that is possible."""
    settings = {"topology": "fixed_ring", "seed": 11}
    members = 1 if size % 2 else 2
    return {"inner": "dpsgd", "node_size": members, "settings": settings}


def nodes_reference(theta: Any, target: Any, steps: int, size: int) -> Any:
    """Nodes are the ranks of the inner strategy, at the mean gradient of theirs."""
    members, settings = nodes(size)["node_size"], nodes(size)["settings"]
    means = target.reshape(-1, members, target.shape[1]).mean(axis=1)
    models, final = references.dpsgd(theta[::members], means, steps, **settings)
    return np.repeat(models, members, axis=0), final


def nodes_moved(rank: Any, size: int, steps: int) -> tuple[int, int]:
    """A gradient's Allreduce and a Bcast in the node: docs/hierarchical.md.

    Between leaders: the bytes of the inner strategy. `finish` is one Bcast more.
    """
    members, sent, received = nodes(size)["node_size"], 0, 0
    if rank.strategy.inner is not None:
        leader = SimpleNamespace(world=rank.strategy.inner.world)
        sent, received = neighbours("fixed_ring")(leader, size // members, steps)
    if members > 1:
        reduced_bytes, _ = reduced(1)(rank, members, steps)
        shared = (steps + 1) * MODEL_BYTES
        is_leader = rank.strategy.inner is not None
        sent += reduced_bytes + shared * is_leader
        received += reduced_bytes + shared * (not is_leader)
    return sent, received


CASES = {
    "local": Case("local", {}, lambda *of: references.local(*of[:3]), nothing),
    "allreduce": Case(
        "allreduce", {"bucket_bytes": 48},
        lambda *of: references.allreduce(*of[:3]), reduced(1, [19, 21]),
    ),
    "model_averaging": Case(
        "model_averaging", {"period": 4, "momentum": "average"},
        lambda *of: references.model_averaging(*of[:3], period=4),
        reduced(4), mixes=True,
    ),
    "bmuf": bmuf(period=3),
    "bmuf-classical": bmuf(period=2, momentum="classical", eta=0.5, zeta=0.8),
    "bmuf-staggered": bmuf(period=3, stagger=True),
    "bmuf-delayed": bmuf(period=3, delay=2),
    "bmuf-staggered-delayed": bmuf(period=4, stagger=True, delay=3, warmup=1),
    "gossip_bmuf": gossip(2, period=2),
    "gossip_bmuf-delayed": gossip(2, period=3, delay=2),
    "gossip_bmuf-classical": gossip(
        3, period=2, momentum="classical", mix="momenta", components=3
    ),
    "gossip_bmuf-whole": gossip(
        1, period=2, components="whole", filter=False
    ),
    "dpsgd": dpsgd("fixed_ring"),
    "dpsgd-random_ring": dpsgd("random_ring"),
    "dpsgd-exponential": dpsgd("exponential", overlap=False),
    "dpsgd-random_pairs": dpsgd("random_pairs"),
    "delay_by_one": Case(
        "delay_by_one", {}, lambda *of: references.delay_by_one(*of[:3]),
        reduced(1), mixes=True,
    ),
    "adpsgd": Case(
        "adpsgd", {"mixing": "fixed_ring"}, lambda *of: references.adpsgd(*of[:3]),
        exchanges, exact=False, mixes=True,
    ),
    "async_sgd": Case(
        "async_sgd", {}, None, pulls_and_pushes, (0.05, 150, 0.1), exact=False
    ),
    "async_sgd-ahead": Case(
        "async_sgd", {"ahead": True}, None, one_pull_more, (0.05, 150, 0.1), exact=False
    ),
    "async_sgd-bounded": Case(
        "async_sgd", {"staleness_bound": 0},
        lambda *of: references.async_sgd(*of[:3]),
        pulls_and_pushes, (0.05, 150, 1e-4), exact=False,
    ),
    "gossip_pga": Case(
        "gossip_pga", {"period": 3, "topology": "random_ring", "seed": 11},
        lambda *of: references.gossip_pga(
            *of[:3], period=3, topology="random_ring", seed=11
        ),
        gossip_pga, mixes=True,
    ),
    "sgp": sgp("exponential"),
    "sgp-random": sgp("random"),
    "noloco": Case(
        "noloco", {"period": 3},
        lambda *of: references.noloco(*of[:3], period=3),
        noloco_pairs,
    ),
    "sparta": Case(
        "sparta", {"share": 0.2},
        lambda *of: references.sparta(*of[:3], share=0.2, seed=0),
        reduced(1, [8]),
    ),
    "des_loc": Case(
        "des_loc", {"period": 4, "period_first": 6, "period_second": 10},
        lambda *of: references.model_averaging(*of[:3], period=4),
        reduced(4), mixes=True,
    ),
    "sparse_loco": sparse_loco(period=2, share=0.5, chunk=16, decay=0.9),
    "sparse_loco-whole": sparse_loco(
        period=3, share=0.25, chunk=40, decay=1.0, outer_lr=0.8
    ),
    "eager_diloco": eager(period=2, eta=0.5, zeta=0.7),
    "eager_diloco-classical": eager(period=3, eta=0.3, zeta=1.0, momentum="classical"),
    "divshare": Case(
        "divshare", {"period": 2, "fragments": 4, "copies": 5}, None, fragments,
        (0.125, 480, 1e-3), exact=False,
    ),
    "hierarchical": Case("hierarchical", nodes, nodes_reference, nodes_moved),
}  # fmt: skip
