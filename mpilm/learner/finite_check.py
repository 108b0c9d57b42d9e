"""Is a gradient finite? If not, the update is left out; on a GPU nobody waits for it.

    GPU     gradient n | max |g|, flag | update n, nothing if flag | gradient n + 1 ...
    host                                 copy of flag n ->|     update n + 1: reads it

torch's fused optimisers change neither theta nor their state where `found_inf` is 1;
torch.amp.GradScaler uses that. So the host learns a step late whether an update did
anything. What cannot go so is looked at before the update: gradients on a CPU, other
optimisers, momentum before it has begun (torch would leave it undefined), and row
tables, whose steps wait for the GPU anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, optim

from mpilm.vectors import is_finite

FUSED = (optim.SGD, optim.Adam, optim.AdamW)  # those that look at `found_inf`


class FiniteCheck:
    """Says which updates are to be left out, and which have been.

    Args:
        optimizer: makes the updates.
        device: where the gradients are.
        waits: whether every gradient is looked at before its update.
        on_bad: called once for each update that is left out, when that is known.

    num_left_out  updates that were, as far as is known
    num_in_a_row  the last ones of them, without one between that was made
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        device: torch.device,
        *,
        waits: bool,
        on_bad: Callable[[], None],
    ) -> None:
        self.num_left_out = self.num_in_a_row = 0
        self._optimizer, self._on_bad = optimizer, on_bad
        self._pending = False
        groups = optimizer.param_groups
        is_fused = type(optimizer) in FUSED and all(g.get("fused") for g in groups)
        self._may_be_late = is_fused and not waits
        on_gpu = device.type == "cuda"
        self._flag = torch.zeros((), device=device)
        self._on_host = torch.zeros((), pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None

    def passes(self, gradients: Sequence[Tensor]) -> bool:
        """Return whether to call the optimiser: the gradient is finite, or it will see.

        Blocks until it is known of the update before.
        """
        if self._may_be_late and len(gradients) == 1 and self._has_begun():
            self.settle()
            self._begin(gradients[0])
            return True
        self._optimizer.__dict__.pop("found_inf", None)
        if self.looks_good(gradients):
            return True
        self._count_bad()
        return False

    def looks_good(self, gradients: Sequence[Tensor]) -> bool:
        """Return whether a gradient is finite; blocks until it has been computed."""
        self.settle()
        if not all(map(is_finite, gradients)):
            return False
        self.num_in_a_row = 0
        return True

    def _has_begun(self) -> bool:
        """Return whether every momentum has a value."""
        return all(
            self._optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
            for group in self._optimizer.param_groups
            if group.get("momentum")
            for parameter in group["params"]
        )

    def _begin(self, gradient: Tensor) -> None:
        """Let the GPU find out; its update goes by it."""
        most = torch.linalg.vector_norm(gradient, math.inf)
        torch.logical_not(most < math.inf, out=self._flag)  # NaN < inf is false
        self._on_host.copy_(self._flag, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._optimizer.__dict__["found_inf"] = self._flag
        self._pending = True

    def settle(self) -> None:
        """Block until it is known of the last update whether it was left out."""
        if self._pending:
            if self._copied is not None:
                self._copied.synchronize()
            self._pending = False
            if self._on_host:
                self._count_bad()
            else:
                self.num_in_a_row = 0

    def _count_bad(self) -> None:
        self.num_left_out += 1
        self.num_in_a_row += 1
        self._on_bad()
