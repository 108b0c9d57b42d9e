"""What `probe` measures: in the virtual world, the machine that was declared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mpilm.convert import convert
from mpilm.learner.quadratic import ProtocolLearner
from mpilm.simulate.calibrate import calibrate, own_step_s, step_times
from mpilm.strategies import strategy
from mpilm.world.machine import Machine
from mpilm.world.virtual import run_virtual

MODEL_BYTES = 400_000
NETWORK = Machine(
    latency_s=1e-3,
    bandwidth_Bps=2e6,
    rendezvous_s=4e-3,
    enter_s=0.5e-3,
    reduce_latency_s=2e-3,
    reduce_Bps=1e6,
    ranks_per_node=2,
    node_latency_s=1e-4,
    node_bandwidth_Bps=8e6,
    node_rendezvous_s=3e-4,
    node_enter_s=2e-4,
    node_reduce_latency_s=3e-4,
    node_reduce_Bps=5e6,
    leader_latency_s=7e-4,
    leader_bandwidth_Bps=4e6,
    leader_rendezvous_s=3e-3,
    leader_enter_s=4e-4,
    leader_reduce_latency_s=1e-3,
    leader_reduce_Bps=3e6,
)
BURSTS = dataclasses.replace(
    NETWORK, rendezvous_s=0.0, leader_rendezvous_s=0.0, burst_bytes=30_000
)
ALONE = dataclasses.replace(NETWORK, ranks_per_node=1)


def measured(machine: Machine, hosts: list[str]) -> dict[str, float]:
    def main(world):
        return calibrate(world, hosts, model_bytes=MODEL_BYTES, step_s=0.5)

    found = run_virtual(main, len(hosts), machine=machine)
    assert all(one == found[0] for one in found), "the ranks disagree"
    return found[0]


@pytest.mark.parametrize("machine", [NETWORK, BURSTS], ids=["rendezvous", "burst"])
def test_it_finds_what_was_declared_on_both_levels(machine: Machine) -> None:
    found = measured(machine, ["a", "a", "b", "b", "c", "c", "d", "d"])
    assert found.keys() == {
        prefix + key
        for prefix in ("", "node_", "leader_")
        for key in (
            "latency_s",
            "bandwidth_Bps",
            "rendezvous_s",
            "enter_s",
            "reduce_latency_s",
            "reduce_Bps",
        )
    } | {"burst_bytes"}
    for key, value in found.items():
        assert value == pytest.approx(getattr(machine, key), rel=0.02), key


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_one_rank_a_node_has_no_inner_level(ranks: int) -> None:
    found = measured(ALONE, [f"host{rank}" for rank in range(ranks)])
    assert not any(key.startswith(("node_", "leader_")) for key in found)
    for key, value in found.items():
        assert value == pytest.approx(getattr(ALONE, key), rel=0.02), key


def test_one_node_has_no_outer_level() -> None:
    whole = dataclasses.replace(NETWORK, ranks_per_node=4)
    found = measured(whole, ["a"] * 4)
    assert all(key.startswith("node_") for key in found)
    assert found["node_reduce_Bps"] == pytest.approx(5e6, rel=0.02)


def test_nodes_with_unlike_numbers_of_ranks_are_measured() -> None:
    found = measured(NETWORK, ["a", "a", "b"])
    # rank 1 has no partner, so rank 0 has the link alone
    assert found["bandwidth_Bps"] == pytest.approx(4e6, rel=0.02)
    assert found["node_bandwidth_Bps"] == pytest.approx(8e6, rel=0.02)


def test_waiting_is_no_part_of_a_step_of_its_own() -> None:
    """The optimiser and the strategy's arithmetic are, once a step."""
    machine = dataclasses.replace(ALONE, step_s=0.25, update_s=0.05, mix_s=0.02)

    def main(world):
        learner = ProtocolLearner(1000, compute=world.compute, seed=world.rank)
        averaging = strategy("model_averaging", world, period=1)
        own_s = own_step_s(world, averaging, learner, 4)
        return own_s, len(step_times(learner, 3)[0])

    own_s, num_steps = run_virtual(main, 4, machine=machine)[0]
    assert own_s == pytest.approx(0.32)
    assert num_steps == 3


@pytest.mark.parametrize("seed", range(10))
def test_whatever_noise_does_to_the_times_simulate_takes_what_is_found(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: a model's exchange quicker than it can be gave a negative node_reduce_Bps.

    The same times on all ranks, as `seconds` promises.
    """
    draw = [np.random.default_rng(seed) for _ in range(4)]

    def noise(world, *_args, **_options):
        return float(draw[world.rank].exponential(0.01))

    monkeypatch.setattr("mpilm.simulate.calibrate.seconds", noise)
    found = measured(NETWORK, ["a", "a", "b", "b"])
    machine = convert(Machine, found, "machine")
    assert min(machine.reduce_Bps, machine.node_reduce_Bps) > 0.0
    assert machine.leader_reduce_Bps > 0.0
