"""What cannot work is refused before training, in one line that says what would.

Each case goes through the trainer in the virtual world, as `mpilm train` would.
"""

from __future__ import annotations

import pytest

from mpilm import run_virtual, strategy
from mpilm.errors import ConfigError, MpilmError
from mpilm.strategies.topology import TOPOLOGIES
from mpilm.world.virtual import VirtualWorld
from tests.strategies.fleets import fleet

NODES = {"node_size": 2, "inner": "adpsgd"}

# name of the strategy, ranks, sections -> words of the line, in order
REFUSED = {
    "k > ranks": (
        "gossip_bmuf", 2, {"strategy": {"group_size": 3}},
        ["strategy.group_size", "groups of 3", "2 ranks", "at most 2"],
    ),
    "components that do not exist": (
        "gossip_bmuf", 2, {"strategy": {"components": 1_000_000}},
        ["strategy.components", "1000000 slices", "at most", '"layers" or "whole"'],
    ),
    "components by a wrong name": (
        "gossip_bmuf", 2, {"strategy": {"components": "layer"}},
        ["strategy.components", "layer"],
    ),
    "a delay as long as the block": (
        "gossip_bmuf", 2, {"strategy": {"period": 3, "delay": 3}},
        ["delay: 3 steps are not less than period = 3"],
    ),
    "the same of bmuf": (
        "bmuf", 2, {"strategy": {"period": 4, "delay": 5}},
        ["delay: 5 steps are not less than period = 4"],
    ),
    "an unknown mixing": (
        "adpsgd", 2, {"strategy": {"mixing": "ring"}},
        ["strategy.mixing", "ring"],
    ),
    "ema of local": (
        "local", 2, {"ema": {"syncs": 10}},
        ["ema: local has no synchronised model", "take a strategy that synchronises"],
    ),
    "ema of adpsgd": (
        "adpsgd", 2, {"ema": {"samples": 10}},
        ["ema: adpsgd has no synchronised model", "(model_averaging, bmuf)"],
    ),
    "ema of nodes with adpsgd": (
        "hierarchical", 2, {"ema": {"samples": 10}, "strategy": NODES},
        ["ema: hierarchical has no synchronised model"],
    ),
    "uneven nodes": (
        "hierarchical", 3, {"strategy": NODES},
        ["strategy.node_size: 3 ranks make no whole nodes of 2", "nodes of 1 or 3"],
    ),
    "a node larger than the world": (
        "hierarchical", 2, {"strategy": {**NODES, "node_size": 4}},
        ["strategy.node_size: 2 ranks make no whole nodes of 4", "nodes of 1 or 2"],
    ),
    "machines with different numbers of ranks": (
        "hierarchical", 3, {"machine": {"ranks_per_node": 2}},
        ["strategy.node_size: the machines have different numbers", "(2, 1)",
         "as many ranks on each machine"],
    ),
    "more in a group than there are nodes": (
        "hierarchical", 4,
        {"strategy": {"node_size": 2, "inner": "gossip_bmuf",
                      "settings": {"group_size": 3}}},
        ["gossip_bmuf between 2 nodes: strategy.group_size", "at most 2"],
    ),
    "an unknown strategy between nodes": (
        "hierarchical", 2, {"strategy": {"inner": "adspgd"}},
        ["strategy.inner: unknown name 'adspgd'; did you mean 'adpsgd'?"],
    ),
    "nodes of nodes": (
        "hierarchical", 2, {"strategy": {"inner": "hierarchical"}},
        ["strategy.inner: unknown name 'hierarchical' (known: allreduce"],
    ),
    "an unknown key between nodes": (
        "hierarchical", 2, {"strategy": {"settings": {"mixng": "fixed_ring"}}},
        ["[strategy.settings] unknown key 'mixng'; did you mean 'mixing'?"],
    ),
    "a wrong value between nodes": (
        "hierarchical", 2, {"strategy": {"settings": {"weight": 0.9}}},
        ["strategy.settings.weight: Expected"],
    ),
    "a fault of a rank that does not exist": (
        "allreduce", 2,
        {"faults": {"profile": [{"kind": "constant", "ranks": [2], "factor": 2.0}]}},
        ["faults.profile 1 (constant): no rank 2, there are only 2 ranks"],
    ),
}  # fmt: skip


def line_of(refused):
    """Return the message of an error, which must be one line."""
    line = str(refused.value)
    assert "\n" not in line
    return line


def assert_words(line, words):
    """Assert that the words stand in the line, in this order."""
    rest = line
    for word in words:
        assert word in rest, line
        rest = rest.partition(word)[2]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(run, case):
    name, size, sections, words = REFUSED[case]
    with pytest.raises(MpilmError) as refused:
        run(size, name, **sections)
    assert_words(line_of(refused), words)


@pytest.mark.parametrize("settings", [{"perid": 3}, {"period": 2, "delay": 2}])
def test_in_a_loop_of_ones_own_too(settings):
    with pytest.raises(ConfigError, match=r"strategy bmuf: .*(perid|period)") as found:
        run_virtual(lambda world: strategy("bmuf", world, **settings), 1)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["adpsgd", "async_sgd", "hierarchical"])
def test_without_thread_multiple(run, monkeypatch, name):
    monkeypatch.setattr(VirtualWorld, "background", False)
    with pytest.raises(MpilmError) as refused:
        run(2, name)
    words = ["MPI_THREAD_MULTIPLE", "a synchronous strategy (allreduce", "MPI build"]
    assert_words(line_of(refused), words)


@pytest.mark.long
@pytest.mark.parametrize("inner", ["allreduce", "dpsgd"])
def test_synchronous_nodes_need_no_thread_multiple(run, monkeypatch, inner):
    monkeypatch.setattr(VirtualWorld, "background", False)
    (trainer, _) = run(2, "hierarchical", steps=2, strategy={"inner": inner})
    assert trainer.totals.step == 2


@pytest.mark.long
def test_nodes_resumed_with_other_nodes(run):
    strategy = {"inner": "dpsgd", "node_size": 2}
    sections = {"steps": 2, "out": "nodes", "strategy": strategy}
    run(4, "hierarchical", **sections)
    for change, words in (
        ({"node_size": 1}, ["2 nodes of 2 ranks", "set strategy.node_size = 2"]),
        ({"inner": "bmuf"}, ["strategy.inner = dpsgd", "resume with dpsgd"]),
    ):
        with pytest.raises(MpilmError) as refused:
            run(
                4, "hierarchical", resume=True, out="nodes",
                strategy={**strategy, **change},
            )  # fmt: skip
        assert_words(line_of(refused), words)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_no_mixing_needs_more_than_two_ranks(topology):
    """A ring of two is a pair, and so is every other graph: nothing to refuse."""
    for rank in fleet("dpsgd", 2, steps=4, topology=topology):
        assert rank.strategy.metrics()["partners"].sum() == 4


# name -> settings before, settings at resume, words of the refusal; None: it goes on
RESUMED = {
    "a server's momentum from now on": (
        "async_sgd", {}, {"momentum": 0.5},
        ["async_sgd: the checkpoint lacks service/velocity", "resume with those"],
    ),
    "no momentum of the server any more": (
        "async_sgd", {"momentum": 0.5}, {"momentum": 0.0},
        ["async_sgd: the checkpoint has service/velocity", "resume with those"],
    ),
    "another momentum of the server": (
        "async_sgd", {"momentum": 0.5}, {"momentum": 0.25}, None,
    ),
    "a bound": ("async_sgd", {}, {"staleness_bound": 0}, None),
    "some units, the rest kept, from now on": (
        "async_sgd", {}, {"units": 0.5, "unsent": "kept"},
        ["async_sgd: the checkpoint lacks", "resume with those"],
    ),
    "all units from now on": (
        "async_sgd", {"units": 0.5, "unsent": "kept"}, {"units": 1.0},
        ["async_sgd: the checkpoint has", "resume with those"],
    ),
    "other units": ("async_sgd", {"units": 0.5}, {"units": 0.25}, None),
    "other exchanges": (
        "adpsgd", {"mixing": "fixed_ring", "pieces": 1},
        {"mixing": "random_pairs", "pieces": 3, "weight": 0.5, "mixes_per_step": 2.0},
        None,
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("nodes", [False, True])
def test_resumed_with_other_settings(run, case, nodes):
    name, before, after, words = RESUMED[case]
    sizes = {"steps": 4, "out": "resumed", "checkpoint": {"every": 80}}

    def start(steps, settings, *, resume):
        sections: dict = {"strategy": settings}
        if nodes:
            inside = {"inner": name, "node_size": 1, "settings": settings}
            sections = {"strategy": inside}
        kind = "hierarchical" if nodes else name
        return run(2, kind, **{**sizes, "steps": steps}, resume=resume, **sections)

    start(4, before, resume=False)
    if words is None:
        trainers = start(8, {**before, **after}, resume=True)
        assert sum(t.learner.samples for t in trainers) >= 8 * 2 * 40
        return
    with pytest.raises(MpilmError) as refused:
        start(8, {**before, **after}, resume=True)
    assert_words(line_of(refused), words)
    assert refused.value.everywhere


SAMPLED = {"softmax": "sampled", "sampled_frequent": 10, "sampled_random": 30}


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ({}, SAMPLED, "model.softmax = full, this run has sampled"),
        (SAMPLED, {"softmax": None}, "model.softmax = sampled, this run has full"),
        (SAMPLED, {"sparse": True}, "model.sparse = "),
        (SAMPLED, {"tied": True, "embed": 16}, "model.embed = 12, this run has 16"),
        (SAMPLED, {"sampled_random": 35}, "model.sampled_random = 30, this run has 35"),
    ],
)
def test_a_checkpoint_of_another_softmax(run, before, after, key):
    run(1, "local", steps=2, out="softmax", model=before)
    with pytest.raises(MpilmError) as refused:
        run(
            1, "local", steps=4, out="softmax", resume=True, model={**before, **after}
        )  # fmt: skip
    assert_words(line_of(refused), [key, "resume with", "--out"])
