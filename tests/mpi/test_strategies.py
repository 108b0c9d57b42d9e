"""Strategies between real ranks come to the parameters of the virtual world.

To the bit at one and two ranks, where a sum of two numbers has one order; to rounding
at more: MPI libraries add in an order of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpilm.protocol import ProtocolLearner
from mpilm.strategies import strategy
from mpilm.world.base import World
from mpilm.world.mpi import MpiWorld
from mpilm.world.virtual import run_virtual

STEPS, SIZE = 25, 20_000
ROUNDING = 1e-5  # relative; float32 sums of 4 numbers, 25 times

CASES: dict[str, dict[str, Any]] = {
    "local": {},
    "allreduce": {"bucket_bytes": 16_000},
    "model_averaging": {"period": 4, "momentum": "average"},
    "dpsgd": {"topology": "random_ring", "seed": 3},
    "delay_by_one": {},
}


def train(world: World, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return this rank's model after some steps, and the final one."""
    learner = ProtocolLearner(
        SIZE, compute=world.compute, seed=world.rank, momentum=0.5, noise=0.1
    )
    method = strategy(name, world, **CASES[name])
    method.start(learner)
    for _ in range(STEPS):
        method.step(learner)
    method.finish(learner)
    final = np.empty_like(learner.theta)
    method.final_model_(learner, final)
    return learner.theta, final


@pytest.mark.mpich
@pytest.mark.parametrize("name", CASES)
def test_both_worlds_agree(world: MpiWorld, name: str, agree: list[bool]) -> None:
    real = train(world, name)
    virtual = run_virtual(lambda w: train(w, name), world.size)[world.rank]
    for got, want in zip(real, virtual, strict=True):
        if world.size <= 2:
            agree.append(np.array_equal(got, want))
        else:
            agree.append(np.allclose(got, want, rtol=ROUNDING, atol=ROUNDING))
    agree.append(float(np.ptp(real[0])) > 0.1)  # it is a model, not zeros


@pytest.mark.parametrize("name", CASES)
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
    agree.append(real == run_virtual(count, world.size)[world.rank])


@pytest.mark.parametrize("name", list(CASES)[1:])
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

        def _work(self, notify: Any) -> float:
            theta, grad = self.theta, self.grad
            self.theta, self.grad = self.numpy_theta, self.numpy_grad
            loss = super()._work(notify)
            self.theta, self.grad = theta, grad
            return loss

        def update(self) -> None:
            self.theta -= self.lr * self.grad

    def run(kind: type[ProtocolLearner]) -> np.ndarray:
        learner = kind(1000, compute=world.compute, seed=world.rank)
        method = strategy(name, world)
        method.start(learner)
        for _ in range(STEPS):
            method.step(learner)
        method.finish(learner)
        return np.asarray(learner.theta)

    agree.append(np.array_equal(run(TorchLearner), run(ProtocolLearner)))
