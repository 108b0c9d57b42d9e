"""The host side of a buffer while MPI may touch it.

MPI reads and writes main memory. A numpy array or a torch tensor on the CPU is its own
host side, without a copy. A CUDA tensor has a pinned host buffer, taken from a pool and
copied on a side stream:

    current stream  -- kernels that write --|event
    side stream                             |-- to host --|             |-- back --|
    MPI                                                   |== Allreduce |

The host waits for each copy before it goes on, so whoever sees a request done may use
the tensor on any stream. Copies to the host and back have a stream each: a copy that
waits for kernels does not hold up one that brings another message home.

An MPI library that takes buffers on a GPU (`Staging.direct`) gets the tensor itself,
once the kernels before the call are done. torch is never imported here unless somebody
brings a tensor.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from mpilm.world.buffers import described


class Stage:
    """A buffer in main memory: its own host side.

    host  what MPI reads and writes
    """

    def __init__(self, host: Any) -> None:
        self.host = host

    def begin(self) -> None:
        """Block until what was computed before the call is; this is no communication.

        Beside a GPU a learner would else seem to wait for other ranks all the time.
        """

    def arrived(self) -> None:
        """Block until MPI may have `host`, with what the buffer held at the call."""

    def deliver(self) -> None:
        """Copy `host` into the buffer; return when that is done."""

    def release(self) -> None:
        """MPI will not touch `host` any more."""


class Staging:
    """Makes stages; keeps pinned buffers and side streams for reuse.

    direct  "cuda": MPI takes tensors on a GPU itself; "": none
    """

    def __init__(self) -> None:
        self.direct = ""
        self._free: dict[tuple[Any, int], list[Any]] = defaultdict(list)
        self._streams: dict[Any, Any] = {}

    def stage(self, buf: Any, *, fetch: bool) -> Stage:
        """Return the host side of `buf`.

        Args:
            buf: 1-D contiguous numpy array or torch tensor.
            fetch: MPI will read it, so its content is brought to the host.

        Raises:
            WorldError: `buf` cannot be communicated.
        """
        described(buf)
        if isinstance(buf, np.ndarray):
            return Stage(buf)
        if buf.device.type == self.direct:
            return DirectStage(buf.detach())
        if buf.is_cuda:
            return CudaStage(self, buf.detach(), fetch=fetch)
        return Stage(buf.detach().numpy())

    def take(self, tensor: Any) -> Any:
        """Return a pinned buffer for `tensor`, a used one if there is one."""
        import torch

        size = capacity(tensor.numel())
        try:
            return self._free[tensor.dtype, size].pop()
        except IndexError:
            return torch.empty(size, dtype=tensor.dtype, pin_memory=True)

    def give(self, pinned: Any) -> None:
        """Take a pinned buffer back."""
        self._free[pinned.dtype, pinned.numel()].append(pinned)

    def stream(self, device: Any, way: str) -> Any:
        """Return the side stream of a GPU for copies "out" to the host, or "back"."""
        import torch

        if (device, way) not in self._streams:
            self._streams[device, way] = torch.cuda.Stream(device)
        return self._streams[device, way]

    def finish(self, copy: Any) -> None:
        """Wait for the event at the end of a copy."""
        copy.synchronize()


def capacity(size: int) -> int:
    """Return the elements of a pinned buffer for `size` elements.

    At most an eighth more, of eight lengths between a power of two and the next: the
    messages of rows have another length in every step, and each would keep a buffer.

    >>> capacity(10), capacity(1000), capacity(1025)
    (10, 1024, 1152)
    """
    unit = 1 << max(0, (size - 1).bit_length() - 4)
    return -(-size // unit) * unit


class CudaStage(Stage):
    """A tensor on a GPU and its pinned buffer."""

    def __init__(self, staging: Staging, tensor: Any, *, fetch: bool) -> None:
        self.staging, self.tensor = staging, tensor
        self.pinned = staging.take(tensor)
        self.part = self.pinned[: tensor.numel()]
        super().__init__(self.part.numpy())
        # kernels that were started before the call may still use the tensor
        self.before = kernels_before(tensor)
        self.fetched = self._copy("out") if fetch else None

    def _copy(self, way: str) -> Any:
        """Start a copy on its stream; return the event of its end."""
        import torch

        to, source = self.part, self.tensor
        if way == "back":
            to, source = source, to
        stream = self.staging.stream(self.tensor.device, way)
        done = torch.cuda.Event(blocking=True)
        stream.wait_event(self.before)
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)
            done.record(stream)
        return done

    def begin(self) -> None:
        self.before.synchronize()

    def arrived(self) -> None:
        if self.fetched is not None:
            self.staging.finish(self.fetched)

    def deliver(self) -> None:
        self.staging.finish(self._copy("back"))

    def release(self) -> None:
        self.staging.give(self.pinned)


class DirectStage(Stage):
    """A tensor that MPI takes where it lies."""

    def __init__(self, tensor: Any) -> None:
        super().__init__(WhereItLies(tensor))
        self.before = kernels_before(tensor) if tensor.is_cuda else None

    def begin(self) -> None:
        if self.before is not None:
            self.before.synchronize()

    def arrived(self) -> None:
        """As `begin`: MPI knows nothing of streams, and a receive must wait as well."""
        self.begin()
        if self.before is not None:
            enter(self.host.tensor.device)


class WhereItLies:
    """A tensor under the face of a numpy array, as far as MPI calls here look at it.

    mpi4py finds the memory by DLPack, on a CPU and on a GPU.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.size, self.nbytes = tensor.numel(), tensor.nbytes
        self.itemsize = tensor.element_size()
        self.dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))

    def __getitem__(self, part: slice) -> WhereItLies:
        return WhereItLies(self.tensor[part])

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        # -1: `arrived` has waited already
        stream = None if stream is None else -1
        return self.tensor.__dlpack__(stream=stream, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.tensor.__dlpack_device__()
        return device


def kernels_before(tensor: Any) -> Any:
    """Return an event after all kernels that the current stream has been given."""
    import torch

    return torch.cuda.current_stream(tensor.device).record_event(
        torch.cuda.Event(blocking=True)
    )


def enter(device: Any) -> None:
    """Make a GPU the current one of this thread, as MPI libraries take for granted."""
    import torch

    torch.cuda.set_device(device)
