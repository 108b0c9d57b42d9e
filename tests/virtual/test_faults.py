"""Profiles of faults: what they declare, and what they do in virtual time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from mpilm.config import read_config, resolve
from mpilm.errors import ConfigError, WorldError
from mpilm.world.base import IN_PLACE
from mpilm.world.faults import Faults
from mpilm.world.machine import Link, Machine
from mpilm.world.profiles import FailAt, Periodic, SlowLink, Spikes
from mpilm.world.virtual import run_virtual

STEP = Machine(step_s=1.0, latency_s=0.25, bandwidth_Bps=64.0)


def faults(*profiles, **others):
    return Faults(profile=profiles, **others)


def factors(declared, rank, steps):
    return [declared.slowdown(rank, float(step), step) for step in range(steps)]


@pytest.mark.parametrize(
    ("profile", "on_rank_1"),
    [
        ({"kind": "constant", "factor": 3.0}, [3, 3, 3, 3, 3, 3]),
        ({"kind": "slow_start", "steps": 2, "factor": 3.0}, [3, 3, 1, 1, 1, 1]),
        (
            {"kind": "periodic", "every_steps": 3, "for_steps": 1, "factor": 3.0},
            [1, 1, 3, 1, 1, 3],
        ),
        (
            {"kind": "periodic", "every_s": 4.0, "for_s": 1.5, "factor": 3.0},
            [1, 1, 1, 3, 1, 1],
        ),
        ({"kind": "spikes", "probability": 1.0, "factor": 3.0}, [3] * 6),
        ({"kind": "spikes", "probability": 0.0, "factor": 3.0}, [1] * 6),
    ],
)
def test_a_profile_slows_the_ranks_that_it_names(profile, on_rank_1):
    named = faults({**profile, "ranks": [1, 4]})
    assert factors(named, 1, 6) == on_rank_1
    assert factors(named, 4, 6) == on_rank_1
    assert factors(named, 2, 6) == [1.0] * 6
    assert factors(faults(profile), 2, 6) == on_rank_1


def test_spikes_are_as_often_as_declared_and_the_same_for_a_seed():
    profile = {"kind": "spikes", "probability": 0.1, "factor": 20.0}
    slow = np.array(factors(faults(profile), 0, 4000)) > 1.0
    assert abs(slow.mean() - 0.1) < 3 * math.sqrt(0.09 / 4000)
    assert np.array_equal(np.array(factors(faults(profile), 0, 4000)) > 1.0, slow)
    assert not np.array_equal(np.array(factors(faults(profile), 1, 4000)) > 1.0, slow)
    other = np.array(factors(faults(profile, seed=2), 0, 4000)) > 1.0
    assert not np.array_equal(other, slow)
    twice = np.array(factors(faults(profile, profile), 0, 4000))
    assert {1.0, 20.0, 400.0} == set(twice)  # two profiles do not spike together


def test_profiles_of_one_rank_multiply():
    both = faults(
        {"kind": "constant", "ranks": [0], "factor": 2.0},
        {"kind": "slow_start", "steps": 1, "factor": 5.0},
        slow={"0": 3.0},
    )
    assert factors(both, 0, 2) == [30.0, 6.0]
    assert factors(both, 1, 2) == [5.0, 1.0]


def test_profiles_come_from_toml_and_go_back(tmp_path):
    path = tmp_path / "faults.toml"
    path.write_text(
        """
        [faults]
        slow = {"3" = 10.0}
        seed = 7
        [[faults.profile]]
        kind = "spikes"
        ranks = [0, 1]
        probability = 0.02
        factor = 20.0
        [[faults.profile]]
        kind = "slow_link"
        peers = [2]
        latency_s = 0.5
        [[faults.profile]]
        kind = "fail_at"
        rank = 1
        step = 9
        """
    )
    config = read_config(path)
    assert config.faults.profile == (
        Spikes(ranks=(0, 1), probability=0.02, factor=20.0),
        SlowLink(peers=(2,), latency_s=0.5),
        FailAt(rank=1, step=9),
    )
    path.write_text(config.to_toml())
    assert read_config(path) == config
    short = resolve({}, ['faults.profile=[{kind="fail_at", rank=1, step=9}]'])
    assert short.faults.profile == (FailAt(rank=1, step=9),)


def test_the_examples_of_the_docs_are_understood(tmp_path):
    page = Path(__file__).parents[2] / "docs/faults.md"
    examples = page.read_text().partition("\n## ")[0]
    lines = examples.splitlines()
    path = tmp_path / "faults.toml"
    path.write_text("\n".join(line for line in lines if line.startswith("    ")))
    found = read_config(path).faults
    assert found.slow == {"3": 10.0}
    kinds = [profile.kind for profile in found.profile]
    assert kinds == [
        *("spikes", "periodic", "slow_start", "slow_link", "fail_at", "join_at"),
    ]


PERIODS = {"every_steps": 4, "for_steps": 1, "every_s": 4.0, "for_s": 1.0}
BOTH_PERIODS = {"kind": "periodic", "factor": 2.0, **PERIODS}


@pytest.mark.parametrize(
    ("profile", "line"),
    [
        ({"factor": 2.0}, "faults.profile 1: a table with a kind, one of constant"),
        ({"kind": "spike"}, "unknown kind 'spike'; did you mean 'spikes'?"),
        (
            {"kind": "constant", "factr": 2.0},
            r"\[faults.profile 1 \(constant\)\] unknown key 'factr'; did you mean",
        ),
        ({"kind": "constant", "factor": 0.5}, "not a factor of at least 1"),
        ({"kind": "constant", "factor": math.inf}, "not a factor of at least 1"),
        ({"kind": "constant", "ranks": [-1], "factor": 2.0}, "ranks"),
        ({"kind": "spikes", "factor": 2.0}, "missing required field `probability`"),
        (
            {"kind": "spikes", "factor": 2.0, "probability": 2.0},
            "probability: Expected",
        ),
        ({"kind": "periodic", "factor": 2.0}, "a period is every_steps and for_steps"),
        (
            {"kind": "periodic", "factor": 2.0, "every_s": 1.0, "for_s": 2.0},
            "not more than the first",
        ),
        (
            {"kind": "periodic", "factor": 2.0, "every_s": 1.0, "for_steps": 1},
            "a period is",
        ),
        *(({**BOTH_PERIODS, name: 0}, "a period is") for name in PERIODS),
        ({"kind": "slow_link", "bandwidth_Bps": 0.0}, "bandwidth_Bps: Expected"),
        ({"kind": "fail_at", "rank": 1}, "missing required field `step`"),
    ],
)
def test_profiles_that_make_no_sense_are_refused_in_one_line(profile, line):
    with pytest.raises(ConfigError, match=line) as refused:
        resolve({"faults": {"profile": [profile]}}, origin="x.toml")
    assert str(refused.value).startswith("x.toml: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "profile",
    [
        {"kind": "constant", "ranks": [4], "factor": 2.0},
        {"kind": "slow_link", "ranks": [0], "peers": [4]},
        {"kind": "fail_at", "rank": 4, "step": 0},
    ],
)
def test_ranks_that_do_not_exist_are_refused(profile):
    declared = faults({"kind": "constant", "factor": 1.0}, profile)
    with pytest.raises(ConfigError, match=r"profile 2 .*no rank 4, there are only 4"):
        declared.check(4)
    declared.check(5)


def steps(world):
    ends = []
    for _ in range(4):
        world.compute(lambda notify: None)
        ends.append(world.now_s())
    return ends


def test_steps_take_virtual_time_by_profile():
    declared = faults(Periodic(ranks=(1,), factor=3.0, every_steps=2, for_steps=1))
    fast, slow = run_virtual(steps, 2, machine=STEP, faults=declared)
    assert fast == [1.0, 2.0, 3.0, 4.0]
    assert slow == [1.0, 4.0, 5.0, 8.0]


def messages(world):
    """Return when a message of 16 bytes from each other rank was there."""
    comm, found = world.comm, {}
    data = np.zeros(4, np.float32)
    for source in range(world.size):
        comm.Barrier()
        began_s = world.now_s()
        if world.rank == source:
            for peer in range(world.size):
                if peer != source:
                    comm.Send(data, peer)
        else:
            comm.Recv(data, source)
            found[source] = world.now_s() - began_s
    return found


def test_messages_over_a_slow_link_take_longer_either_way():
    link = SlowLink(ranks=(0,), peers=(2,), latency_s=1.0, bandwidth_Bps=16.0)
    plain = run_virtual(messages, 3, machine=STEP)
    slow = run_virtual(messages, 3, machine=STEP, faults=faults(link))
    for rank in range(3):
        for source, before_s in plain[rank].items():
            if {rank, source} == {0, 2}:
                # 1 s of latency, 16 bytes in 1 s and not in 1/4 s, at both ports
                assert slow[rank][source] - before_s >= 1.75
            elif source < 2:  # rank 2 sends to rank 1 when its port is free again
                assert slow[rank][source] == before_s


def test_a_slow_link_is_the_link_of_every_collective_that_crosses_it():
    link = faults(SlowLink(ranks=(0,), peers=(2,), latency_s=1.0))
    assert link.link_within([0, 1]) == Link(0.0, math.inf)
    assert link.link_within([2, 0, 1]) == Link(1.0, math.inf)
    assert link.ends_link(2, [0, 1, 2])
    assert not link.ends_link(1, [0, 1, 2])

    def reduce(world):
        pair = world.comm.Split(world.rank % 2)
        began_s = world.now_s()
        pair.Allreduce(IN_PLACE, np.zeros(4, np.float32))
        return world.now_s() - began_s

    # rank 0 and 2: one round of 1.25 + 1/4 s; 1 and 3: of 1/4 + 1/4 s
    took = run_virtual(reduce, 4, machine=STEP, faults=link)
    assert took == [1.5, 0.5, 1.5, 0.5]


def test_a_rank_that_dies_is_reported():
    def train(world):
        for _ in range(4):
            world.compute(lambda notify: None)
            world.comm.Barrier()

    with pytest.raises(WorldError, match=r"rank 2: dies before step 3, as \[faults\]"):
        run_virtual(train, 4, machine=STEP, faults=faults(FailAt(rank=2, step=3)))
    run_virtual(train, 4, machine=STEP, faults=faults(FailAt(rank=2, step=4)))


def test_the_same_seed_is_the_same_run():
    declared = faults(
        Spikes(probability=0.5, factor=7.0), SlowLink(ranks=(1,), latency_s=0.5)
    )
    machine = Machine(step_s=1.0, jitter=0.5)

    def train(world):
        for _ in range(9):
            world.compute(lambda notify: None)
            world.comm.Allreduce(IN_PLACE, np.zeros(4, np.float32))
        return world.now_s()

    first = run_virtual(train, 4, machine=machine, faults=declared, seed=3)
    again = run_virtual(train, 4, machine=machine, faults=declared, seed=3)
    assert first == again


def test_a_link_is_scaled_with_the_bytes():
    link = SlowLink(ranks=(0,), latency_s=0.5, bandwidth_Bps=100.0)
    both = faults(link, Spikes(probability=0.5, factor=2.0), seed=3).scaled(4.0)
    assert both.link(0, 1) == Link(0.5, 25.0)
    assert both.profile[1] == Spikes(probability=0.5, factor=2.0)
    assert both.seed == 3
