"""Adaptive softmax: torch's, with the three methods that a language model asks for.

Source      E. Grave et al., "Efficient softmax approximation for GPUs", ICML 2017.
Notation    cutoffs -> c_1 < c_2 < ..., ids where the next cluster of rarer words begins
            p(w) = p_head(w)                       w < c_1
                 = p_head(cluster) p_cluster(w)    else, words of a cluster sharing a
                                                   matrix of rank H / div^cluster
Departs     from torch's in: targets may be -1, no target.

It is another model than the full softmax, with fewer parameters, not an estimate of it:
loss and perplexity are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpilm.errors import ConfigError
from mpilm.models.softmax import PADDING, chunks


class AdaptiveSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """Adaptive softmax with its cross-entropy.

    Args:
        num_inputs: H.
        num_words: V; ids in the order of frequency.
        cutoffs: ascending, 0 < cutoff < V.
        div: each cluster's inner size is that of the one before over this.

    Raises:
        ConfigError: nothing would be left of the last cluster's inner size.
    """

    def __init__(
        self, num_inputs: int, num_words: int, *, cutoffs: Sequence[int], div: float
    ) -> None:
        if num_inputs < div ** len(cutoffs):
            raise ConfigError(
                f"model.adaptive_div = {div:g}: {num_inputs} inputs over it,"
                f" {len(cutoffs)} times, are less than 1; it works with fewer"
                " adaptive_cutoffs or a smaller adaptive_div"
            )
        super().__init__(
            num_inputs, num_words, list(cutoffs), div_value=div, head_bias=True
        )

    def reset_parameters(self) -> None:
        """Draw all matrices as the full softmax's; biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, x_NH: Tensor, targets_N: Tensor) -> Tensor:  # type: ignore[override]
        """Return the mean cross-entropy over the targets, 0-d, in nats; 0 if none."""
        is_target_N = targets_N != PADDING
        if not is_target_N.any():
            return x_NH.sum() * 0.0
        loss: Tensor = super().forward(x_NH[is_target_N], targets_N[is_target_N]).loss
        return loss

    @torch.no_grad()
    def nll(self, x_NH: Tensor, targets_N: Tensor) -> Tensor:
        """Return the summed negative log-likelihood, 0-d float64, in nats."""
        is_target_N = targets_N != PADDING
        x_NH, targets_N = x_NH[is_target_N], targets_N[is_target_N]
        total = torch.zeros((), dtype=torch.float64, device=x_NH.device)
        for rows in chunks(len(x_NH), self.n_classes, x_NH.device):
            total -= super().forward(x_NH[rows], targets_N[rows]).output.double().sum()
        return total

    def logits(self, x_NH: Tensor) -> Tensor:
        """Return ln p, (N, V)."""
        return self.log_prob(x_NH)
