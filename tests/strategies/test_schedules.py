"""Thousands of random schedules of every strategy; faults that they must find."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.strategies import STRATEGIES
from mpilm.world.virtual.rare import Rare, drawn_rare
from tests.strategies import faulty
from tests.strategies.schedules import MODULE, SETTINGS, replay, schedule, sweep

NUM_SCHEDULES = 500  # of each strategy; `make soak` plays more
ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", STRATEGIES)
def test_random_schedules(name):
    sweep(name, range(NUM_SCHEDULES))


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_schedule(name, seed):
    sweep(name, [seed])


@pytest.mark.long
@pytest.mark.parametrize("name", STRATEGIES)
def test_seeds_reach_what_they_should(name):
    """2 to 16 ranks, stragglers, sync points, uneven steps, various settings."""
    found = [schedule(name, seed) for seed in range(NUM_SCHEDULES)]
    sizes = {chosen.size for chosen in found}
    assert sizes >= set(range(2, 9)) and 12 <= max(sizes) <= 16
    assert {chosen.plan["parts"] for chosen in found} == {1, 2, 3}
    faults = [chosen.plan["faults"] for chosen in found]
    assert any(100.0 in own.slow.values() for own in faults)
    kinds = {profile.kind for own in faults for profile in own.profile}
    assert kinds == {"spikes", "periodic", "slow_start", "slow_link"}
    for key in SETTINGS[name](random.Random(0), 4):
        assert len({str(chosen.settings[key]) for chosen in found}) > 1
    if not STRATEGIES[name].lockstep:
        assert any(len(set(chosen.plan["steps"])) > 3 for chosen in found)


@pytest.mark.parametrize("name", ["allreduce", "sparse_loco", "async_sgd"])
def test_steps_whose_gradient_is_not_finite_are_skipped(name):
    """They count as samples, and what is conserved is conserved without them."""
    seed = next(s for s in range(99) if (r := drawn_rare(s)) and r.are_bad == 0.25)
    ranks = schedule(name, seed).run()
    assert sum(rank.learner.num_skipped for rank in ranks) > 0
    sweep(name, [seed])


def test_a_bad_gradient_moves_no_other_draw():
    """What seeds did before there were any they do still."""
    spoilt = next(s for s in range(99) if (r := drawn_rare(s)) and r.are_bad)
    rare, other = Rare(spoilt), Rare(spoilt)
    assert any(rare.spoils(0, step) for step in range(99))
    assert rare.draw.getstate() == other.draw.getstate()
    assert rare.spoils(1, 5) == other.spoils(1, 5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (faulty.LosesMass, "mass is not conserved"),
        (faulty.WaitsForEver, r"deadlock at|where rank \d called"),
        (faulty.ForgetsAMessage, "messages that nobody received"),
        (faulty.RunsAhead, "steps ahead, more than"),
        (faulty.RollsDice, "other bits"),
    ],
)
def test_a_fault_is_found_and_its_seed_replayed(fault, reason, capsys):
    kind = f"{fault.__module__}:{fault.__name__}"
    with pytest.raises(AssertionError, match=reason):
        sweep(kind, range(200))
    (command,) = re.findall(r"^replay: (.*)$", capsys.readouterr().err, re.MULTILINE)
    seed = int(command.split()[-1])
    assert command == replay(kind, seed) == f"python -m {MODULE} {kind} {seed}"
    sweep(fault.name, [seed])  # without the fault the schedule keeps its promises
    again = subprocess.run(
        [sys.executable, *command.split()[1:]],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert again.returncode != 0
    assert re.search(reason, again.stderr)
    assert f"replay: {command}" in again.stderr
