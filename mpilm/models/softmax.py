"""Full softmax and cross-entropy in one pass over chunks of rows.

Notation    x_NH -> inputs; N rows (time steps x sequences), H units
            W_VH, b_V -> weight, bias; V words       y_N -> targets, -1 = padding
            s_n -> weight of a row in the mean: 1 / (number of targets), padding 0
Forward     l = x W^T + b                                                      (1)
            p = softmax(l),   z_n = ln sum_v exp(l_nv)                         (2)
            loss = sum_n s_n (z_n - l_n,y(n))                                  (3)
Gradient    e = p - onehot(y)                                                  (4)
            dx = diag(s) e W                                                   (5)
            dW = e^T diag(s) x                                                 (6)
            db = e^T s                                                         (7)

All of it is computed in the forward pass, chunk by chunk: (1), (2) and (4) overwrite
one buffer that stays in the cache, so the N x V logits are never all in memory. The
backward pass multiplies by the gradient of the loss, which is 1 nearly always. The
weights s go into the small factors of (5) and (6), never over e.

Under torch.autocast the factors of the products are rounded to its type, as those of
F.linear are; (2) to (4) and all sums stay in float32.

On a GPU torch's own functions are a third as many kernels, for which a small step
waits: they are used where all logits are as few as those of one chunk.

Departs     nowhere: the numbers are those of `F.cross_entropy(F.linear(x, W, b), y)`
            to rounding. Without any target the loss is 0 instead of NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PADDING = -1

# Bytes of logits in one chunk on a CPU: a quarter of the last-level cache of the one
# measured in docs/learner.md; the step time is flat within a factor of 2 of them.
CHUNK_BYTES = 8 << 20
# On a GPU a share of its memory. The larger the faster: V = 267,735, 4,096 rows, in
# chunks of 64 MB 95 ms, 256 MB 90, 1 GB 83, 8 GB 76, torch's own 77 (an H200).
CHUNK_SHARE = 64
# Each chunk reads and writes dW once: at V = 50,000, chunks of 64 rows are 20% slower,
# of 256 rows 5% faster (measured, same machine).
MIN_CHUNK_ROWS = 128
# Words whose logits a CPU has at a time where nothing is trained: 8 MB of 128 rows.
# All of 267,735 would be 137 MB, their softmax as much again, and 1.3 times the time
# (2.3 s for 3.1 of 700 rows, H = 512, AMD EPYC; from 4,096 to 32,768 it is flat).
MOST_WORDS = 1 << 14


def times_transposed(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a b^T + bias; `b` may be a transposed view, `a` is contiguous.

    On CPUs that are not Intel's in float32 by oneDNN: there torch's own product (MKL)
    is less than half as fast, on Intel's 6% faster (docs/learner.md has both).
    """
    if a.device.type == "cpu" and a.dtype == torch.float32 and PRODUCT:
        return PRODUCT(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


def plus_product(
    total: Tensor | None, a: Tensor, b: Tensor, kind: torch.dtype | None = None
) -> Tensor:
    """Return total + a b, of type `kind` (a's), in the memory of `total`; None: 0.

    Where torch's own product is in use it adds as it goes, which saves a pass over
    `total`: 6.0 ms for 7.8 of a chunk at V = 10,000, H = 256 (CPU time, the machine of
    docs/natural_gradient.md).
    """
    kind = kind or a.dtype
    if total is None:
        return times_transposed(a, b.t()).to(kind)
    if a.dtype == kind and (a.is_cuda or PRODUCT is None):
        return total.addmm_(a, b)
    return total.add_(times_transposed(a, b.t()))


def _onednn_linear() -> Any:
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


ONEDNN_LINEAR = _onednn_linear()  # None: this torch has no oneDNN
PRODUCT = None if _is_intel() else ONEDNN_LINEAR  # in use; None: torch's own


def chunk_bytes(device: torch.device) -> int:
    """Return the bytes that the logits of one chunk may have."""
    if device.type != "cuda":
        return CHUNK_BYTES
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return memory // CHUNK_SHARE


def chunks(num_rows: int, num_words: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of rows of nearly equal length that cover all rows."""
    fit = chunk_bytes(device) // (4 * num_words)
    num_chunks = -(-num_rows // max(MIN_CHUNK_ROWS, fit))
    for chunk in range(num_chunks):
        start = chunk * num_rows // num_chunks
        yield slice(start, (chunk + 1) * num_rows // num_chunks)


def joined(parts: list[Tensor]) -> Tensor:
    """Return the rows of all parts as one tensor, without a copy if there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def weights_of(targets_N: Tensor, like: Tensor) -> Tensor:
    """Return s (N, 1), with the type of `like`."""
    is_target_N = targets_N != PADDING
    return (is_target_N.to(like.dtype) / is_target_N.sum().clamp(min=1))[:, None]


def errors(
    x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield for chunks of rows: which; e (4), good until the next one; -ln p(y).

    Of other types than `bias_V` the first two: they are only multiplied.
    """
    y_N1 = targets_N.masked_fill(targets_N == PADDING, 0)[:, None]
    factor_bias_V = bias_V.to(x_NH.dtype)
    for rows in chunks(len(x_NH), len(weight_VH), x_NH.device):
        y = y_N1[rows]
        logits = times_transposed(x_NH[rows], weight_VH, factor_bias_V)  # (1)
        logits = logits.to(bias_V.dtype)
        peak = logits.amax(1, keepdim=True)
        target_logit = logits.gather(1, y)
        p = torch.softmax(logits, 1, out=logits)  # (2)
        z = peak - p.amax(1, keepdim=True).log()  # p at the peak is exp(peak - z)
        e = p.scatter_add_(1, y, p.new_full((1, 1), -1.0).expand_as(y))  # (4)
        yield rows, e, z - target_logit


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor
    ) -> Tensor:
        s_N1 = weights_of(targets_N, bias_V)
        kind = x_NH.dtype  # of the factors
        nll_chunks: list[Tensor] = []
        dx_chunks: list[Tensor] = []
        db_V = torch.zeros_like(bias_V)
        dW_HV: Tensor | None = None
        for rows, e, nll in errors(x_NH, weight_VH, bias_V, targets_N):
            x, s = x_NH[rows], s_N1[rows]
            nll_chunks.append(nll)
            db_V.addmv_(e.t(), s[:, 0])  # (7)
            e = e.to(kind)
            dx = times_transposed(e, weight_VH.t())  # (5)
            dx_chunks.append(dx.to(s.dtype).mul_(s))
            sx_HN = (x * s).to(kind).t().contiguous()
            dW_HV = plus_product(dW_HV, sx_HN, e, s.dtype)  # (6)
        ctx.save_for_backward(joined(dx_chunks), dW_HV, db_V)
        return (joined(nll_chunks) * s_N1).sum()  # (3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        dx_NH, dW_HV, db_V = ctx.saved_tensors
        gradients = (dx_NH, dW_HV.t(), db_V)
        if grad_loss.is_cuda or grad_loss.item() != 1.0:
            gradients = tuple(gradient * grad_loss for gradient in gradients)
        return (*gradients, None)


def linear_cross_entropy(
    x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor
) -> Tensor:
    """Return the mean cross-entropy of softmax(x W^T + b) over the targets (3).

    Args:
        x_NH: inputs, floating point, contiguous.
        weight_VH: one row per word.
        bias_V: one number per word.
        targets_N: int64, 0 to V-1, or -1: no target.

    Returns:
        the mean in nats, 0-d; 0 if there is no target.
    """
    device = x_NH.device.type
    if device == "cuda" and fits(x_NH, weight_VH):
        return mean_cross_entropy(F.linear(x_NH, weight_VH, bias_V), targets_N)
    kind = weight_VH.dtype
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
    factors = x_NH.to(kind), weight_VH.to(kind)
    with torch.autocast(device, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(*factors, bias_V, targets_N)
    return loss


def fits(x_NH: Tensor, weight_VH: Tensor) -> bool:
    """Return whether all logits are as few as those of one chunk."""
    return 4 * len(x_NH) * len(weight_VH) <= chunk_bytes(x_NH.device)


def mean_cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Return (3) of logits by torch's own functions; 0 if there is no target."""
    nll = F.cross_entropy(logits_NV, targets_N, ignore_index=PADDING, reduction="sum")
    return nll / (targets_N != PADDING).sum().clamp(min=1)


@torch.no_grad()
def linear_nll(
    x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor
) -> Tensor:
    """Return the summed negative log-likelihood of the targets, 0-d float64, in nats.

    Arguments as for `linear_cross_entropy`.
    """
    total = torch.zeros((), dtype=torch.float64, device=x_NH.device)
    num_words = len(weight_VH)
    in_blocks = num_words > MOST_WORDS and not x_NH.is_cuda
    for rows in chunks(len(x_NH), MOST_WORDS if in_blocks else num_words, x_NH.device):
        x, targets = x_NH[rows], targets_N[rows]
        if in_blocks:
            nll = nll_by_words(x, weight_VH, bias_V, targets)
        else:
            logits = times_transposed(x, weight_VH, bias_V)
            nll = F.cross_entropy(
                logits, targets, ignore_index=PADDING, reduction="none"
            )
        total += nll.double().sum()
    return total


def nll_by_words(
    x_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor
) -> Tensor:
    """Return z_n - l_n,y(n), (N,), with the logits of MOST_WORDS words at a time.

    Of the words so far: peak, the largest logit, and sum_v exp(l_nv - peak), which
    shrinks by exp(peak - new peak) when the peak grows.
    """
    y_N1 = targets_N.masked_fill(targets_N == PADDING, 0)[:, None]
    peak = x_NH.new_full((len(x_NH), 1), float("-inf"))
    summed = torch.zeros_like(peak)
    target_logit = bias_V[:, None].gather(0, y_N1)  # refuses one that there is not
    for start in range(0, len(weight_VH), MOST_WORDS):
        words = slice(start, min(start + MOST_WORDS, len(weight_VH)))
        logits = times_transposed(x_NH, weight_VH[words], bias_V[words])
        place = (y_N1 - start).clamp_(0, words.stop - start - 1)
        is_here = (y_N1 >= start) & (y_N1 < words.stop)
        target_logit = torch.where(is_here, logits.gather(1, place), target_logit)
        higher = torch.maximum(peak, logits.amax(1, keepdim=True))
        summed *= (peak - higher).exp_()
        summed += logits.sub_(higher).exp_().sum(1, keepdim=True)
        peak = higher
    nll = peak + summed.log() - target_logit
    return nll[:, 0].masked_fill(targets_N == PADDING, 0.0)


class Softmax(nn.Module):
    """Full softmax over `num_words` with its cross-entropy.

    weight  (V, H), may be tied to an embedding
    bias    (V,)
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, num_inputs: int, num_words: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_words, num_inputs))
        self.bias = nn.Parameter(torch.zeros(num_words))

    def reset_parameters(self) -> None:
        """Draw the weights uniform in +-0.1; biases 0."""
        nn.init.uniform_(self.weight, -0.1, 0.1)
        nn.init.zeros_(self.bias)

    def forward(self, x_NH: Tensor, targets_N: Tensor) -> Tensor:
        """Return the mean cross-entropy, 0-d, in nats."""
        if not torch.is_grad_enabled():
            num_targets = (targets_N != PADDING).sum().clamp(min=1)
            return (self.nll(x_NH, targets_N) / num_targets).to(x_NH.dtype)
        return linear_cross_entropy(x_NH, self.weight, self.bias, targets_N)

    def nll(self, x_NH: Tensor, targets_N: Tensor) -> Tensor:
        """Return the summed negative log-likelihood, 0-d float64, in nats."""
        return linear_nll(x_NH, self.weight, self.bias, targets_N)

    def logits(self, x_NH: Tensor) -> Tensor:
        """Return the logits, (N, V)."""
        return F.linear(x_NH, self.weight, self.bias)
