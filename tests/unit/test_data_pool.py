"""The common pool: every chunk once, nobody waits, a slow rank takes fewer.

How ranks know how far all are together: test_data_counts.py.
"""

from __future__ import annotations

from collections import Counter as Count
from typing import Any

import numpy as np
import pytest

from mpilm.data.batch import Batch
from mpilm.data.pool import PoolBatches
from mpilm.errors import DataError, MpilmError
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine
from mpilm.world.virtual import Simulation, VirtualWorld, run_virtual

BATCH, STEPS, WINDOWS = 2, 3, 4
CHUNK = BATCH * STEPS * WINDOWS
CHUNKS = 10
TOKENS = np.arange(CHUNKS * CHUNK + 6, dtype=np.uint32)


def pool(
    rank: int = 0, size: int = 1, world: VirtualWorld | None = None, **changes: Any
) -> PoolBatches:
    settings = {"batch": BATCH, "steps": STEPS, "chunk_windows": WINDOWS, "seed": 1}
    settings |= changes
    return PoolBatches(TOKENS, rank=rank, size=size, world=world, **settings)


def chunk_of(batch: Batch) -> int:
    """Return the chunk that a minibatch is from, and check its content."""
    assert np.array_equal(batch.targets, batch.inputs + 1)
    assert batch.num_samples == BATCH * STEPS
    first = int(batch.inputs[0, 0])
    chunk, place = divmod(first, CHUNK)
    window = place // STEPS
    assert batch.start == (window == 0)
    rows = np.arange(BATCH) * STEPS * WINDOWS
    expected = chunk * CHUNK + window * STEPS + rows + np.arange(STEPS)[:, None]
    assert np.array_equal(batch.inputs, expected)
    return chunk


def chunks(source: PoolBatches, number: int) -> list[int]:
    """Draw `number` whole chunks."""
    drawn = []
    for _ in range(number):
        of_windows = {chunk_of(source.next()) for _ in range(WINDOWS)}
        assert len(of_windows) == 1
        drawn.append(of_windows.pop())
    return drawn


# dealt in turn


def test_an_epoch_visits_every_chunk_once_in_an_order_of_its_own() -> None:
    source = pool()
    assert (source.num_chunks, source.num_dropped, source.epoch) == (CHUNKS, 5, 0.0)
    epochs = [chunks(source, CHUNKS) for _ in range(3)]
    assert source.epoch == 3.0
    for order in epochs:
        assert sorted(order) == list(range(CHUNKS))
    assert epochs[0] != epochs[1] != epochs[2]
    assert chunks(pool(), CHUNKS) == epochs[0]
    assert chunks(pool(seed=2), CHUNKS) != epochs[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_in_lockstep_share_the_sequence_of_one(size: int) -> None:
    alone = chunks(pool(), 12)
    ranks = [chunks(pool(rank, size), 12 // size) for rank in range(size)]
    assert [c for turn in zip(*ranks, strict=True) for c in turn] == alone


@pytest.mark.parametrize("before", [0, 1, 3, 4, 5, 45])
def test_a_resumed_pool_goes_on_to_the_bit(before: int) -> None:
    straight = pool(1, 3)
    for _ in range(before):
        straight.next()
    resumed = pool(1, 3)
    resumed.load_state(straight.state())
    assert resumed.epoch == straight.epoch
    for _ in range(50):
        a, b = straight.next(), resumed.next()
        assert np.array_equal(a.inputs, b.inputs)
        assert np.array_equal(a.targets, b.targets)
        assert a.start == b.start


def test_a_cursor_of_another_pool_is_refused() -> None:
    state = pool(0, 2).state()
    for other in (pool(0, 3), pool(0, 2, seed=2), pool(0, 2, chunk_windows=2)):
        with pytest.raises(DataError, match="the place in the data was saved with"):
            other.load_state(state)


def test_more_ranks_than_chunks_are_refused() -> None:
    pool(9, 10)
    with pytest.raises(DataError) as error:
        pool(0, 11)
    assert str(error.value) == (
        f"11 ranks x batch 2 x steps 3 x chunk of 4 need at least {11 * CHUNK + 1}"
        f" tokens, the data has {len(TOKENS)}"
    )


# leased from a counter


def learn(world: VirtualWorld, seconds: float, log: Any = None) -> list[int]:
    """Take minibatches until the time is over; return the leases taken."""
    source = pool(world.rank, world.size, world)
    source.start()
    leases = []
    while world.now_s() < seconds:
        batch = source.next()
        chunk = chunk_of(batch)
        if batch.start:
            leases.append(source.lease)
            assert source.chunk(source.lease) == chunk
        world.compute(lambda notify: None)
    source.close()
    if log is not None:
        log[world.rank] = world.traffic.blocked_s
    return leases


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_every_lease_is_given_once(size: int) -> None:
    size = min(size, CHUNKS)
    machine = Machine(step_s=0.1, jitter=0.5)
    taken = run_virtual(lambda w: learn(w, 12.0), size, machine=machine, seed=3)
    everything = sorted(lease for leases in taken for lease in leases)
    assert len(set(everything)) == len(everything)
    # each rank may hold one lease that it had asked for and never began
    missing = set(range(everything[-1] + 1)) - set(everything)
    assert len(missing) <= size - 1
    for leases in taken:
        assert leases == sorted(leases)


def test_the_same_seed_gives_the_same_leases() -> None:
    def run(seed: int) -> list[list[int]]:
        machine = Machine(step_s=0.1, jitter=0.5)
        return run_virtual(lambda w: learn(w, 8.0), 4, machine=machine, seed=seed)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_straggler_takes_fewer_chunks_and_the_data_is_seen_evenly() -> None:
    faults = Faults(slow={"2": 10.0})
    machine = Machine(step_s=0.1)
    taken = run_virtual(lambda w: learn(w, 80.0), 4, machine=machine, faults=faults)
    numbers = [len(leases) for leases in taken]
    assert numbers[2] * 10 == pytest.approx(numbers[0], abs=10)
    assert numbers[0] == pytest.approx(200, abs=2)
    seen = Count(
        pool().chunk(lease) for leases in taken for lease in leases
    )  # all chunks, though one rank is slow
    assert max(seen.values()) - min(seen.values()) <= 2


def test_the_learner_never_waits_for_a_lease_but_the_first() -> None:
    """The answer comes while the chunk before is computed."""
    blocked: dict[int, float] = {}

    def main(world: VirtualWorld) -> None:
        source = pool(world.rank, world.size, world)
        source.start()
        source.next()
        before_s = world.now_s()
        for _ in range(10 * WINDOWS):
            world.compute(lambda notify: None)
            source.next()
        blocked[world.rank] = world.now_s() - before_s - 10 * WINDOWS * 0.1
        source.close()

    run_virtual(main, 4, machine=Machine(step_s=0.1, latency_s=0.05))
    assert max(blocked.values()) < 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_it_ends_however_the_ranks_end(seed: int) -> None:
    """Ranks stop at different times, some before their first minibatch."""
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 9))
    ends = random.choice([0.0, 0.05, 1.0, 7.0], size)
    slow = {str(int(random.integers(size))): float(random.choice([1.0, 10.0, 100.0]))}
    machine = Machine(step_s=0.1, jitter=0.9, latency_s=float(random.choice([0, 0.3])))
    simulation = Simulation(size, machine=machine, faults=Faults(slow=slow), seed=seed)
    taken = simulation.run(lambda w: learn(w, float(ends[w.rank])))
    assert simulation.undelivered == []
    everything = [lease for leases in taken for lease in leases]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("until_s", [0.0, 3.0, 5.0])
def test_leases_go_on_after_a_checkpoint(closed: bool, until_s: float) -> None:
    """Every lease is begun once or handed back; each rank goes on where it was."""
    machine = Machine(step_s=0.1, jitter=0.5)
    faults = Faults(slow={"1": 7.0})

    def first(world: VirtualWorld) -> tuple[dict[str, Any], list[int], Batch]:
        source = pool(world.rank, world.size, world)
        source.start()
        leases = []
        while world.now_s() < until_s + world.rank:
            if source.next().start:
                leases.append(source.lease)
            world.compute(lambda notify: None)
        if closed:
            source.close()
        state = source.state()
        if not closed:
            source.close()
        assert equal(source.state(), state)
        # what would come next on this rank, if it is in the middle of a chunk
        following = source.next() if source._window < WINDOWS else None
        return state, leases, following

    def second(world: VirtualWorld) -> tuple[dict[str, Any], list[int]]:
        state, _, following = saved[world.rank]
        source = pool(world.rank, world.size, world)
        source.start()
        if world.rank == 0:
            world.sleep(1.0)  # nobody may ask before the counter is back
        source.load_state(state)
        source.synchronise(0)
        leases = []
        for number in range(15):
            batch = source.next()
            if number == 0 and following is not None:
                assert np.array_equal(batch.inputs, following.inputs)
                assert not batch.start
            if batch.start:
                leases.append(source.lease)
            world.compute(lambda notify: None)
        state = source.state()
        source.close()
        return state, leases

    saved = run_virtual(first, 4, machine=machine, faults=faults, seed=1)
    more = run_virtual(second, 4, machine=machine, seed=2)
    begun: list[int] = []
    for ranks in (saved, more):
        states = [found[0] for found in ranks]
        begun += [lease for found in ranks for lease in found[1]]
        for state in states:  # the same on all ranks, but for the rank's own place
            handed_back = state["returned"].tolist()
            assert (state["next_lease"], handed_back) == (
                states[0]["next_lease"],
                states[0]["returned"].tolist(),
            )
        assert sorted(begun + handed_back) == list(range(states[0]["next_lease"]))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in one
    )


def test_a_slow_rank_holds_no_chunk_that_others_could_begin() -> None:
    """Leases are begun nearly in order: a rank asks shortly before it needs one."""
    begun: list[tuple[float, int]] = []

    def main(world: VirtualWorld) -> None:
        source = pool(world.rank, world.size, world)
        source.start()
        while world.now_s() < 30.0:
            if source.next().start:
                begun.append((world.now_s(), source.lease))
            world.compute(lambda notify: None)
        source.close()

    faults = Faults(slow={"3": 10.0})
    run_virtual(main, 4, machine=Machine(step_s=0.1), faults=faults)
    latest = -1
    for _, lease in begun:
        # while the slow rank computes two minibatches, three ranks begin 15 chunks
        assert lease > latest - 20
        latest = max(latest, lease)


def test_minibatches_before_start_and_after_close_are_errors() -> None:
    def before(world: VirtualWorld) -> None:
        pool(world.rank, world.size, world).next()

    def after(world: VirtualWorld) -> None:
        source = pool(world.rank, world.size, world)
        source.start()
        source.close()
        source.next()

    with pytest.raises(MpilmError, match=r"start\(\) comes before"):
        run_virtual(before, 2)
    with pytest.raises(MpilmError, match="the pool is closed"):
        run_virtual(after, 2)
