"""What a fleet conserves, whatever the delays: one law for each strategy.

Every rank's learner remembers the sum of its own steps (`Witness.moved`). What all of
them moved must be found in the models again, all of it and nothing else:

    linear    mean theta = mean first + mean moved                             (1)
    declared  what the strategy says that it conserves (`Strategy.conserved`)
    within    with no steps of learners, every number stays in the range that it had
              over the ranks: all mixing is by means, whatever it does to the sum
    served    x(T) = x(0) + (D + m v(T)) / (1 - m), D: the sum of all pushes   (2)
              The sum of (3) of `async_sgd` over all pushes, in any order.

`hierarchical` keeps the law of its inner strategy, between the leaders of the nodes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpilm.testing.check import lost_mass

CLOSE = 2e-5  # absolute, on models of size 1: float32, some tens of roundings
STILL = 1e-6  # the same where nothing but mixing happens


def mean(vectors):
    return np.mean([np.asarray(vector, np.float64) for vector in vectors], axis=0)


def linear(ranks):
    found = mean([rank.learner.theta for rank in ranks])
    moved = mean([rank.learner.moved for rank in ranks])
    expect(found, mean([rank.first for rank in ranks]) + moved, still=not moved.any())


def declared(ranks):
    assert lost_mass(ranks) == 0.0, "mass is not conserved: (9) of blocks.py"


def within(ranks):
    if any(rank.learner.moved.any() for rank in ranks):
        return
    first = np.stack([rank.first for rank in ranks])
    found = np.stack([rank.learner.theta for rank in ranks])
    over = np.maximum(found - first.max(axis=0), first.min(axis=0) - found).max()
    assert over <= STILL, f"a number leaves the range of the ranks' by {over:.2e}"


def served(ranks):
    momentum = ranks[0].strategy.config.momentum
    found = np.array(ranks[0].learner.theta, np.float64)
    moved = np.sum([rank.learner.moved for rank in ranks], axis=0)
    if momentum:
        velocities = [rank.strategy.service.velocity for rank in ranks]
        moved = (moved + momentum * np.concatenate(velocities)) / (1.0 - momentum)
    expect(found, ranks[0].first + moved)


def expect(found, wanted, *, still=False):
    """Raise unless the two are equal but for rounding."""
    scale = max(1.0, float(np.abs(wanted).max()))
    limit = (STILL if still else CLOSE) * scale
    worst = float(np.abs(found - wanted).max())
    assert worst <= limit, f"mass is not conserved: {worst:.2e} are lost or gained"


def nodes(ranks):
    """All ranks of a node are equal; the leaders keep the law of the inner strategy."""
    leaders = {}
    for rank in ranks:
        number = rank.strategy.nodes.node_of[rank.world.rank]
        leader = leaders.setdefault(number, rank)
        assert np.array_equal(rank.learner.theta, leader.learner.theta), "node apart"
    inner = [replace(rank, strategy=rank.strategy.inner) for rank in leaders.values()]
    check_mass(inner[0].strategy.name, inner)


SCATTERED = ("divshare",)  # may begin at models that differ, beside all linear ones
LAWS = {
    "bmuf": declared,
    "gossip_bmuf": declared,
    "async_sgd": served,
    "sgp": declared,
    "noloco": declared,
    "eager_diloco": declared,
    "sparse_loco": declared,
    "divshare": within,
    "hierarchical": nodes,
}


def check_mass(name, ranks):
    """Raise unless the fleet kept the law of its strategy."""
    LAWS.get(name, linear)(ranks)
