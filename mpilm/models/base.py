"""What models that end in a softmax layer share: loss, first weights, precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

Compute = Literal["float32", "bfloat16", "auto"]

# Cells of a layer up to which bfloat16 is faster on a CPU that has it: two layers take
# 0.70 of float32's time at H = 128, 0.62 at 200, 0.79 at 512, 0.99 at 1024 (EPYC with
# AVX-512 BF16, 20 x 35, one thread, 2026-11: benchmarks/bench_lm_options.py).
LARGEST_BFLOAT16_CPU = 512


class SoftmaxModel(nn.Module, ABC):
    """Base: `forward` makes of a minibatch what goes into `softmax`."""

    softmax: nn.Module

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """Return the softmax layer's inputs, (T*B, H), contiguous."""

    def loss(self, batch: Any) -> Tensor:
        """Return the mean cross-entropy of a minibatch, 0-d, in nats.

        Args:
            batch: a `mpilm.data.batch.Batch` of tensors on the model's device.
        """
        loss: Tensor = self.softmax(self(batch), batch.targets.flatten())
        return loss


@torch.no_grad()
def open_forget_gates_(lstm: nn.Module) -> None:
    """Set the biases of all forget gates of nn.LSTMs to 1 (b_ih) and 0 (b_hh)."""
    for name, parameter in lstm.named_parameters():
        _, _, key = name.rpartition(".")
        if key.startswith(("bias_ih", "bias_hh")):
            _, forget, _, _ = parameter.chunk(4)
            forget.fill_(1.0 if key.startswith("bias_ih") else 0.0)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 by itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def computing(
    compute: Compute, hidden: int, device: torch.device
) -> AbstractContextManager[Any]:
    """Return in what a layer of `hidden` cells is computed: torch.autocast or nothing.

    "auto" is bfloat16 where it pays.
    """
    if compute == "auto":
        pays = device.type != "cpu" or hidden <= LARGEST_BFLOAT16_CPU
        compute = "bfloat16" if pays and has_bfloat16(device) else "float32"
    if compute == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
