"""Buffers on a GPU: staged through pinned memory. Ranks may share one GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpilm.world.base import IN_PLACE, MAX, Comm
from mpilm.world.mpi import MpiWorld

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

LENGTH = 300_001


@pytest.fixture
def device(world: MpiWorld) -> str:
    return world.device("cuda")


def late(value: float, device: str) -> Any:
    """Return a vector that the GPU has not finished computing."""
    a = torch.ones(2000, 2000, device=device)
    for _ in range(20):
        a = a @ a / 2000
    return a.mean() * torch.full((LENGTH,), value, device=device)


def test_reductions_wait_for_the_kernels(
    comm: Comm, device: str, agree: list[bool]
) -> None:
    total = comm.size * (comm.size + 1) / 2
    x = late(comm.rank + 1.0, device)
    comm.Allreduce(IN_PLACE, x)
    agree.append(bool(torch.allclose(x, torch.full_like(x, total))))
    y = torch.zeros_like(x)
    comm.Iallreduce(late(comm.rank + 1.0, device), y, MAX).Wait()
    agree.append(bool(torch.allclose(y, torch.full_like(y, comm.size))))
    z = late(comm.rank + 1.0, device)
    requests = [comm.Iallreduce(IN_PLACE, part) for part in z.chunk(5)]
    for request in requests:
        request.Wait()
    agree.append(bool(torch.allclose(z, torch.full_like(z, total))))


def test_broadcast_and_messages(comm: Comm, device: str, agree: list[bool]) -> None:
    x = late(comm.rank + 1.0, device)
    comm.Bcast(x, root=comm.size - 1)
    agree.append(bool(torch.allclose(x, torch.full_like(x, comm.size))))
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    y = torch.zeros(LENGTH, device=device)
    comm.Sendrecv(late(comm.rank + 1.0, device), after, 1, y, before, 1)
    agree.append(bool(torch.allclose(y, torch.full_like(y, before + 1.0))))


def test_a_receive_waits_for_kernels_that_still_read(
    world: MpiWorld, device: str, agree: list[bool]
) -> None:
    comm = world.comm
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    y = torch.ones(LENGTH, device=device)
    slow = late(1.0, device) * y  # reads y, late
    receive = comm.Irecv(y, before)
    comm.Send(np.full(LENGTH, 5.0, np.float32), after)
    receive.Wait()
    agree.append(bool((y == 5.0).all()) and bool(torch.allclose(slow, slow[:1])))


def test_pinned_buffers_are_used_again(
    world: MpiWorld, device: str, agree: list[bool]
) -> None:
    x = torch.ones(1234, device=device)
    for _ in range(5):
        world.comm.Allreduce(IN_PLACE, x)
    agree.append(len(world.resources.staging._free[x.dtype, 1234]) == 1)
