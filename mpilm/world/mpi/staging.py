"""The host side of a buffer while MPI may touch it.

MPI reads and writes main memory. A numpy array or a torch tensor on the CPU is its own
host side, without a copy. A CUDA tensor has a pinned host buffer, taken from a pool and
copied on a side stream:

    current stream  -- kernels that write --|event
    side stream                             |-- to host --|             |-- back --|
    MPI                                                   |== Allreduce |

The host waits for each copy before it goes on, so whoever sees a request done may use
the tensor on any stream. torch is never imported here unless somebody brings a tensor.
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

    def __init__(self, host: np.ndarray) -> None:
        self.host = host

    def arrived(self) -> None:
        """Block until `host` holds what the buffer held at the call."""

    def deliver(self) -> None:
        """Copy `host` into the buffer; return when that is done."""

    def release(self) -> None:
        """MPI will not touch `host` any more."""


class Staging:
    """Makes stages; keeps pinned buffers and side streams for reuse."""

    def __init__(self) -> None:
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
        if buf.is_cuda:
            return CudaStage(self, buf.detach(), fetch=fetch)
        return Stage(buf.detach().numpy())

    def take(self, tensor: Any) -> Any:
        """Return a pinned buffer as long as `tensor`, a used one if there is one."""
        import torch

        free = self._free[tensor.dtype, tensor.numel()]
        try:
            return free.pop()
        except IndexError:
            return torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)

    def give(self, pinned: Any) -> None:
        """Take a pinned buffer back."""
        self._free[pinned.dtype, pinned.numel()].append(pinned)

    def stream(self, device: Any) -> Any:
        """Return the side stream of a GPU."""
        import torch

        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class CudaStage(Stage):
    """A tensor on a GPU and its pinned buffer."""

    def __init__(self, staging: Staging, tensor: Any, *, fetch: bool) -> None:
        import torch

        self.staging, self.tensor = staging, tensor
        self.pinned = staging.take(tensor)
        super().__init__(self.pinned.numpy())
        self.stream = staging.stream(tensor.device)
        # kernels that were started before the call may still use the tensor
        self.before = torch.cuda.current_stream(tensor.device).record_event()
        self.fetched = self._copy(self.pinned, tensor) if fetch else None

    def _copy(self, to: Any, source: Any) -> Any:
        """Start a copy on the side stream; return the event of its end."""
        import torch

        done = torch.cuda.Event(blocking=True)
        self.stream.wait_event(self.before)
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            done.record(self.stream)
        return done

    def arrived(self) -> None:
        if self.fetched is not None:
            self.fetched.synchronize()

    def deliver(self) -> None:
        self._copy(self.tensor, self.pinned).synchronize()

    def release(self) -> None:
        self.staging.give(self.pinned)
