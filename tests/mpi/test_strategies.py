"""Every strategy between real ranks; the table is that of the virtual world's battery.

In lockstep they come to the parameters of the virtual world: to the bit at one and two
ranks, where a sum of two numbers has one order; to rounding at more, because MPI
libraries add in an order of their own. Out of lockstep no two runs are alike: there the
law that they must keep whatever the timing is checked (tests/strategies/laws.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpilm.learner.quadratic import ProtocolLearner, layers
from mpilm.strategies import STRATEGIES, Strategy, strategy
from mpilm.testing.fleet import ROWS
from mpilm.world.base import World
from mpilm.world.mpi import MpiWorld
from mpilm.world.virtual import run_virtual
from tests.strategies.cases import CASES
from tests.strategies.fleets import Witness
from tests.strategies.laws import check_mass

STEPS, SIZE = 12, 20_000  # 80 kB: longer than what MPI libraries send eagerly
STEP_S = 2e-3  # of learners that sleep, so that messages come and go meanwhile
ROUNDING = 1e-5  # relative; float32 sums of 8 numbers, 12 times
EXACT = [name for name, case in CASES.items() if case.exact]
FREE = [name for name in CASES if name not in EXACT]
TORCH = ["allreduce", "model_averaging", "bmuf", "gossip_bmuf", "dpsgd", "delay_by_one"]
SUMMED = ["allreduce", "bmuf-staggered-delayed", "eager_diloco"]  # updates


def train(
    world: World, name: str, kind: type[ProtocolLearner] = Witness, **settings: Any
) -> tuple[Any, Strategy, np.ndarray]:
    """Return this rank's learner, strategy and final model, synced halfway."""
    case = CASES[name]
    learner = kind(
        SIZE, compute=world.compute, seed=world.rank, momentum=0.5, noise=0.1
    )
    method = strategy(case.name, world, **{**case.of(world.size), **settings})
    method.require(learner)
    method.start(learner)
    learner.first = learner.theta.copy()  # type: ignore[attr-defined]
    if isinstance(learner, Witness):
        learner.watch(method)
    for part in (1, 2):
        # out of lockstep the ranks may take steps of their own number
        num_steps = STEPS if method.lockstep else STEPS + 3 * world.rank
        for _ in range(num_steps * (part - 1) // 2, num_steps * part // 2):
            method.step(learner)
        method.retire(learner)
        method.finish(learner)
    final = np.empty_like(learner.theta)
    method.final_model_(learner, final)
    return learner, method, final


def is_quiet(world: MpiWorld) -> bool:
    """Return whether no message has come that nobody received."""
    world.comm.Barrier()
    time.sleep(1e-3)
    return not any(handle.Iprobe() for handle in world.resources.handles)


def simulated(world: MpiWorld, main: Callable[[World], Any]) -> list[Any]:
    """Return what `main` returns on virtual ranks; one real rank runs them all."""
    results = run_virtual(main, world.size) if world.rank == 0 else None
    return world.comm.allgather(results)[0] or []


def test_every_strategy_is_in_the_table() -> None:
    assert {CASES[name].name for name in EXACT + FREE} == set(STRATEGIES)


@pytest.mark.mpich
@pytest.mark.eight
@pytest.mark.parametrize("name", EXACT)
def test_both_worlds_agree(world: MpiWorld, name: str, agree: list[bool]) -> None:
    def run(w: World) -> tuple[np.ndarray, np.ndarray]:
        learner, _, final = train(w, name)
        return learner.theta, final

    real = run(world)
    agree.append(is_quiet(world))
    virtual = simulated(world, run)[world.rank]
    for got, want in zip(real, virtual, strict=True):
        if world.size <= 2:
            agree.append(np.array_equal(got, want))
        else:
            agree.append(np.allclose(got, want, rtol=ROUNDING, atol=ROUNDING))
    agree.append(float(np.ptp(real[0])) > 0.1)  # it is a model, not zeros


@pytest.mark.mpich
@pytest.mark.eight
@pytest.mark.parametrize("name", FREE)
def test_mass_is_conserved_out_of_lockstep(
    world: MpiWorld, name: str, agree: list[bool]
) -> None:
    world.step_s = STEP_S
    try:
        learner, method, final = train(world, name)
    finally:
        world.step_s = 0.0
    agree.append(is_quiet(world))
    metrics = method.metrics()
    ranks = [
        SimpleNamespace(
            first=first,
            learner=SimpleNamespace(theta=theta, moved=moved),
            strategy=method,
            partners=partners,
        )
        for first, theta, moved, partners in world.comm.allgather(
            (learner.first, learner.theta, learner.moved, metrics["partners"])
        )
    ]
    try:
        check_mass(CASES[name].name, ranks)
    except AssertionError as error:
        print(f"rank {world.rank}: {name}: {error}")
        agree.append(False)
    agree.append(learner.samples == STEPS + 3 * world.rank)
    everyone = np.mean([rank.learner.theta for rank in ranks], axis=0)
    agree.append(np.allclose(final, everyone, rtol=0, atol=ROUNDING))
    if world.size > 1:
        partners = np.array([rank.partners for rank in ranks])
        agree.append(bool(partners.sum() > 0))
        if name.startswith("adpsgd"):
            agree.append(np.array_equal(partners, partners.T))


@pytest.mark.parametrize("name", EXACT)
def test_both_worlds_count_the_same_traffic(
    world: MpiWorld, name: str, agree: list[bool]
) -> None:
    def count(w: World) -> tuple[int, int, int]:
        traffic = w.traffic
        before = (traffic.bytes_sent, traffic.bytes_received, traffic.messages)
        train(w, name)
        after = (traffic.bytes_sent, traffic.bytes_received, traffic.messages)
        sent, received, messages = np.subtract(after, before).tolist()
        return sent, received, messages

    real = count(world)
    agree.append(real == simulated(world, count)[world.rank])


@pytest.mark.parametrize("name", TORCH)
def test_torch_vectors_train_like_numpy_vectors(
    world: MpiWorld, name: str, agree: list[bool]
) -> None:
    torch = pytest.importorskip("torch")

    class TorchLearner(ProtocolLearner):
        """The same memory, seen as tensors."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.numpy_theta, self.numpy_grad = self.theta, self.grad
            self.theta = torch.from_numpy(self.theta)
            self.grad = torch.from_numpy(self.grad)

        def _work(self, notify: Any, *, scale: float) -> float:
            theta, grad = self.theta, self.grad
            self.theta, self.grad = self.numpy_theta, self.numpy_grad
            loss = super()._work(notify, scale=scale)
            self.theta, self.grad = theta, grad
            return loss

        def update(self) -> None:
            self.theta -= self.lr * self.grad

    def run(kind: type[ProtocolLearner]) -> np.ndarray:
        learner = kind(
            1000, compute=world.compute, seed=world.rank, layout=layers(1000)
        )
        settings = {"group_size": 2} if name == "gossip_bmuf" else {}
        method = strategy(name, world, **settings)
        method.start(learner)
        for _ in range(25):
            method.step(learner)
        method.finish(learner)
        return np.asarray(learner.theta)

    agree.append(np.array_equal(run(TorchLearner), run(ProtocolLearner)))


@pytest.mark.mpich
@pytest.mark.parametrize(
    ("name", "wire"),
    [
        *((name, wire) for name in SUMMED for wire in ("bfloat16", "float16", "int4")),
        *((name, "bfloat16") for name in ("gossip_bmuf", "dpsgd", "sgp")),
    ],
)
def test_a_wire_format_has_the_same_bits_and_bytes_in_both_worlds(
    world: MpiWorld, name: str, wire: str, agree: list[bool]
) -> None:
    """At any number of ranks: a sum goes in the order of ranks."""

    def run(w: World) -> tuple[np.ndarray, np.ndarray, list[int]]:
        before = w.traffic.bytes_sent, w.traffic.bytes_received
        learner, _, final = train(w, name, wire=wire)
        after = w.traffic.bytes_sent, w.traffic.bytes_received
        return learner.theta, final, [b - a for a, b in zip(before, after, strict=True)]

    theta, final, moved = run(world)
    agree.append(is_quiet(world))
    virtual = simulated(world, run)[world.rank]
    agree.append(np.array_equal(theta, virtual[0]))
    agree.append(np.allclose(final, virtual[1], rtol=ROUNDING, atol=ROUNDING))
    agree.append(moved == virtual[2])


@pytest.mark.mpich
@pytest.mark.parametrize("name", ["adpsgd", "async_sgd"])
def test_a_wire_format_loses_no_mass_out_of_lockstep(
    world: MpiWorld, name: str, agree: list[bool]
) -> None:
    learner, method, _ = train(world, name, wire="bfloat16")
    agree.append(is_quiet(world))
    found = world.comm.allgather(
        (learner.first, learner.moved, method.conserved(learner))
    )
    shares = 1 if name == "adpsgd" else world.size  # of a model, on each rank
    first, moved, kept = (np.mean(each, axis=0) for each in zip(*found, strict=True))
    wanted = first + shares * moved
    limit = 2e-5 * max(1.0, float(np.abs(wanted).max()))
    agree.append(float(np.abs(shares * kept - wanted).max()) <= limit)


@pytest.mark.mpich
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["dpsgd", "gossip_bmuf", "adpsgd", "async_sgd"])
def test_rows_lose_no_mass(
    world: MpiWorld, name: str, wire: str, agree: list[bool]
) -> None:
    learner = Witness(
        ROWS.size, compute=world.compute, seed=world.rank, layout=ROWS, noise=0.1
    )
    settings = {"group_size": 2} if name == "gossip_bmuf" and world.size > 1 else {}
    method = strategy(name, world, wire=wire, **settings)
    method.require(learner)
    method.start(learner)
    learner.watch(method)
    before = method.conserved(learner)
    for _ in range(21):
        method.step(learner)
    method.retire(learner)
    method.finish(learner)
    agree.append(is_quiet(world))
    found = world.comm.allgather((before, learner.moved, method.conserved(learner)))
    before, moved, after = (np.mean(each, axis=0) for each in zip(*found, strict=True))
    limit = 2e-5 * max(1.0, float(np.abs(after).max()))
    agree.append(float(np.abs(after - before - moved).max()) <= limit)
    agree.append(float(np.abs(moved[ROWS.num_dense :]).max()) > 0.1)


@pytest.mark.mpich
@pytest.mark.parametrize("rows", ["auto", "union", "gather", "dense"])
def test_rows_are_summed_alike_in_every_way(
    world: MpiWorld, rows: str, agree: list[bool]
) -> None:
    learners = []
    for way in ("union", rows):
        learner = Witness(
            ROWS.size, compute=world.compute, seed=world.rank, layout=ROWS, noise=0.1
        )
        method = strategy("allreduce", world, rows=way)
        method.start(learner)
        for _ in range(12):
            method.step(learner)
        method.finish(learner)
        learners.append(learner)
    agree.append(is_quiet(world))
    found = [np.array(learner.theta) for learner in learners]
    agree.append(float(np.abs(found[0] - found[1]).max()) <= 1e-5)
    agree.append(
        len({theta.tobytes() for theta in world.comm.allgather(found[1])}) == 1
    )


@pytest.mark.mpich
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_state_outside_theta_is_one_for_all_ranks(
    world: MpiWorld, name: str, agree: list[bool]
) -> None:
    pytest.importorskip("torch")
    from tests.strategies.modules import faults, states

    found = faults(world.comm.allgather(states(world, name)))
    agree.append(is_quiet(world))
    if found:
        print(f"rank {world.rank}: {name}: {found}")
    agree.append(not found)
