"""Buffers on a GPU: staged through pinned memory. Ranks may share one GPU.

What MPI takes itself (`gpu_messages = "direct"`) is tested with tensors on the CPU,
too: the same code gives them to MPI, by DLPack.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mpilm.config import resolve
from mpilm.errors import ConfigError
from mpilm.train.gpu_messages import choose_messages
from mpilm.world.base import IN_PLACE, MAX, Comm
from mpilm.world.mpi import MpiWorld, large
from mpilm.world.mpi.staging import capacity

torch = pytest.importorskip("torch")
LENGTH = 300_001
GUARD = 77.0


@pytest.fixture
def device(world: MpiWorld) -> str:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return world.device("cuda")


@pytest.fixture
def direct(world: MpiWorld) -> Iterator[None]:
    """MPI gets tensors on the CPU as they are."""
    staging = world.resources.staging
    staging.direct = "cpu"
    yield
    staging.direct = ""


def late(value: float, device: str) -> Any:
    """Return a vector that the GPU has not finished computing."""
    a = torch.ones(2000, 2000, device=device)
    for _ in range(20):
        a = a @ a / 2000
    return a.mean() * torch.full((LENGTH,), value, device=device)


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_broadcast_and_messages(comm: Comm, device: str, agree: list[bool]) -> None:
    x = late(comm.rank + 1.0, device)
    comm.Bcast(x, root=comm.size - 1)
    agree.append(bool(torch.allclose(x, torch.full_like(x, comm.size))))
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    y = torch.zeros(LENGTH, device=device)
    comm.Sendrecv(late(comm.rank + 1.0, device), after, 1, y, before, 1)
    agree.append(bool(torch.allclose(y, torch.full_like(y, before + 1.0))))


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_pinned_buffers_are_used_again(
    world: MpiWorld, device: str, agree: list[bool]
) -> None:
    x = torch.ones(1234, device=device)
    for _ in range(5):
        world.comm.Allreduce(IN_PLACE, x)
    agree.append(len(world.resources.staging._free[x.dtype, capacity(1234)]) == 1)


@pytest.mark.gpu
def test_waiting_for_kernels_is_not_waiting_for_ranks(
    world: MpiWorld, device: str, agree: list[bool]
) -> None:
    comm, traffic = world.comm, world.traffic
    comm.Allreduce(IN_PLACE, late(1.0, device))  # warm
    torch.cuda.synchronize()
    began_s = world.now_s()
    late(1.0, device)
    torch.cuda.synchronize()
    kernels_s = world.now_s() - began_s
    x = torch.ones(8, device=device)
    comm.Barrier()
    late(1.0, device)
    before_s = traffic.blocked_s
    comm.Allreduce(IN_PLACE, x)
    # ranks that share a GPU are not done with their kernels at the same time
    agree.append(traffic.blocked_s - before_s < 0.5 * kernels_s * comm.size + 0.05)


@pytest.mark.gpu
def test_direct_messages_where_mpi_takes_them(
    world: MpiWorld, device: str, agree: list[bool]
) -> None:
    config = resolve({"world": {"gpu_messages": "auto"}})
    line = choose_messages(world, config)
    if line != "GPU messages: direct":
        pytest.skip(line)
    try:
        exchange(world.comm, device, agree)
    finally:
        world.resources.staging.direct = ""


@pytest.mark.usefixtures("direct")
@pytest.mark.mpich
@pytest.mark.parametrize("most", [large.MOST, 7], ids=["whole", "pieces"])
def test_tensors_that_mpi_takes_as_they_are(
    comm: Comm, agree: list[bool], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "MOST", most)
    exchange(comm, "cpu", agree)


def exchange(comm: Comm, device: str, agree: list[bool]) -> None:
    """Compare every kind of message of tensors with what must come."""
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    for dtype in (torch.float32, torch.float64, torch.int64, torch.uint8):
        kind = {"dtype": dtype, "device": device}
        sent = torch.arange(20, **kind) + comm.rank
        whole = torch.full((21,), GUARD, **kind)
        want = [*range(before, 20 + before), GUARD]
        receive = comm.Irecv(whole[:-1], before, 1)
        comm.Send(sent, after, 1)
        receive.Wait()
        agree.append(whole.tolist() == want)
        whole.zero_()
        request = comm.Isend(sent, after, 2)
        message = None
        while message is None:
            message = comm.Improbe(before, 2)
        message.Recv(whole[:-1])
        request.Wait()
        agree.append(whole[:-1].tolist() == want[:-1])
        comm.Bcast(whole[:-1], root=0)
        root = (comm.size - 1) % comm.size  # before rank 0
        agree.append(whole[:-1].tolist() == list(range(root, 20 + root)))
        total = [comm.size * k + sum(range(comm.size)) for k in range(20)]
        comm.Allreduce(sent, whole[:-1])
        agree.append(whole[:-1].tolist() == total)
        request = comm.Iallreduce(IN_PLACE, sent)
        request.Wait()
        agree.append(sent.tolist() == total)


def test_the_progress_thread_is_told_of_the_card_once(
    world: MpiWorld, agree: list[bool]
) -> None:
    seen: list[str] = []
    world.progress.enter = lambda: seen.append(threading.current_thread().name)
    world.comm.Barrier()
    deadline_s = time.monotonic() + 60.0
    while not seen and time.monotonic() < deadline_s:
        time.sleep(0.01)
    world.comm.Barrier()
    time.sleep(0.05)
    agree.append(seen == ["mpilm progress"])
    world.progress.enter = None


def test_direct_messages_are_refused_on_the_cpu(
    world: MpiWorld, agree: list[bool]
) -> None:
    own = {"train": {"device": "cpu"}}
    config = resolve({"world": {"gpu_messages": "direct"}, **own})
    with pytest.raises(ConfigError, match=r"world\.gpu_messages.*rank 0.*the CPU"):
        choose_messages(world, config)
    for kind in ("auto", "staged"):
        config = resolve({"world": {"gpu_messages": kind}, **own})
        agree.append(choose_messages(world, config) == "")
    agree.append(world.resources.staging.direct == "")
