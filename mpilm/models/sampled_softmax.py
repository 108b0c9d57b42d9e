"""Sampled softmax: trained on a few rows of W, one sample for the whole minibatch.

Source      Y. Bengio and J.-S. Senecal, "Adaptive Importance Sampling to Accelerate
            Training of a Neural Probabilistic Language Model", IEEE Transactions on
            Neural Networks, 2008. T. Xiao et al., IJCAI 2017, by its abstract: that
            traffic is sampled; targets, frequent words and a random part are our
            reading (docs/references.md).
Notation    x_NH, W_VH, b_V, y_N  as in softmax.py; word ids 0..V-1, most frequent first
            F -> num_frequent    m -> num_random    S -> number of words in the sample
Sample      A = {targets of the minibatch}, {0..F-1} and the last `num_recent` targets
                before it: certain                                               (1)
            R = one draw of m words from F..V-1 by the log-uniform distribution,
                q(k) = ln((k+2) / (k+1)) / ln((V+1) / (F+1)),                    (2)
                one from each of m strata of equal probability
            sample = A and R, each word once                                     (3)
            pi_k = 1 for k in A, else the probability that k is in R             (4)
Loss        l_nk = x_n W_k + b_k - ln pi_k,  k in the sample                     (5)
            the mean cross-entropy of softmax(l) over the targets                (6)
Invariants  sum_k exp(l_nk) over the sample has the mean Z_n, the sum over all words:
            (4) is exact. F = V is the full softmax.
            Nothing that is computed in a step has V elements (see `sparse`).
Departs     (2) draws from strata, not independently: of m independent draws a fifth
            would be repeated words, and the sum would vary more. Words of F..V-1 that
            are targets are left out of R without being drawn again.

The logarithm of an unbiased Z is a little too small in the mean, so the training loss
is a little below the full one. Evaluation is always by the full softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpilm.models.softmax import PADDING, Softmax, linear_cross_entropy


class LogUniform:
    """Draws about m words of F..V-1 by (2).

    Args:
        num_words: V.
        num_frequent: F, 0 <= F <= V.
        num_random: m >= 0; where it is V - F or more, all words are taken.

    What it needs of all words or strata is made once for a device: the fewer kernels a
    step has on a GPU, the better.

    >>> LogUniform(100, num_frequent=90, num_random=10).draw(torch.device("cpu"))
    tensor([90, 91, 92, 93, 94, 95, 96, 97, 98, 99])
    """

    def __init__(self, num_words: int, *, num_frequent: int, num_random: int) -> None:
        self.first, self.num_words = num_frequent, num_words
        self.num_random = min(num_random, num_words - num_frequent)
        self.takes_all = self.num_random == num_words - num_frequent
        self._log_first = math.log(num_frequent + 1)
        self._log_range = math.log((num_words + 1) / (num_frequent + 1))
        self._width = self._log_range / max(1, self.num_random)  # of a stratum
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def draw(self, device: torch.device) -> Tensor:
        """Return R, int64, ascending; from torch's global random state.

        A word that holds several strata comes several times.
        """
        if self.takes_all:
            return torch.arange(self.first, self.num_words, device=device)
        starts_M, _ = self._constants_on(device)
        u_M = torch.rand(self.num_random, dtype=torch.float64, device=device)
        u_M.mul_(self._width).add_(starts_M).exp_()
        return u_M.long().sub_(1).clamp_(self.first, self.num_words - 1)

    def log_probabilities(self, device: torch.device) -> Tensor:
        """Return ln pi (4) of all words, (V,) float32; 0 below F. Not to be changed."""
        return self._constants_on(device)[1]

    def _constants_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return where the strata begin, float64, and `log_probabilities`."""
        if device not in self._constants:
            strata = torch.arange(self.num_random, dtype=torch.float64)
            starts = self._log_first + strata * self._width
            log_pi = torch.zeros(self.num_words)
            words = torch.arange(self.first, self.num_words)
            log_pi[self.first :] = self.log_probability(words)
            self._constants[device] = starts.to(device), log_pi.to(device)
        return self._constants[device]

    def log_probability(self, ids: Tensor) -> Tensor:
        """Return ln pi (4) of words of F..V-1, float64.

        The part of the strata that a word takes is [a, b). It is missed when neither
        the stratum that it begins in nor the one that it ends in draws it; a stratum
        that lies in it whole does.
        """
        k = ids.double()
        if self.takes_all:
            return torch.zeros_like(k)
        a = self._strata(k)
        b = self._strata(k + 1)
        first, last = a.floor(), b.floor()
        missed = (a - first) * (last + 1 - b)
        missed = torch.where(last > first + 1, 0.0, missed)
        return torch.where(last == first, b - a, 1.0 - missed).log()

    def _strata(self, k: Tensor) -> Tensor:
        """Return how many strata lie before word k."""
        below = ((k + 1).log() - self._log_first) / self._log_range
        return below.clamp(0.0, 1.0) * self.num_random


class SparseRows(torch.autograd.Function):
    """`table[ids]`, each id once and ascending; the gradient is sparse.

    `F.embedding(sparse=True)` is this too, but not for a vector, such as the biases.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return table.index_select(0, ids)  # several times as fast as table[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        found = torch.sparse_coo_tensor(
            ids[None], grad, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return found, None


class SampledSoftmax(Softmax):
    """Softmax that is trained on a sample; evaluated and used in full.

    Args:
        num_inputs: H.
        num_words: V.
        num_frequent: F, the most frequent words, always in the sample; 0 <= F <= V.
        num_random: m, words drawn.
        num_recent: targets of earlier minibatches whose words are in the sample. What
            was a target has a large logit; drawn with a small pi it stands for hundreds
            of words, and the sum over the sample varies as much.

    recent  (num_recent,) int64, these targets, the latest last; -1: none yet. A buffer;
            there is none if num_recent is 0
    sparse  the gradients of weight and bias are torch's sparse tensors, of the rows of
            the sample; else of all rows, zeros for the others
    """

    recent: Tensor | None

    def __init__(
        self,
        num_inputs: int,
        num_words: int,
        *,
        num_frequent: int,
        num_random: int,
        num_recent: int = 0,
        sparse: bool = False,
    ) -> None:
        super().__init__(num_inputs, num_words)
        none_yet = torch.full((num_recent,), PADDING) if num_recent else None
        self.register_buffer("recent", none_yet)
        self.sparse, self.num_frequent = sparse, num_frequent
        self.random = LogUniform(
            num_words, num_frequent=num_frequent, num_random=num_random
        )
        self._frequent_F = torch.arange(num_frequent)
        self._drawn: tuple[Tensor, ...] = ()  # targets, and their sample

    def forward(self, x_NH: Tensor, targets_N: Tensor) -> Tensor:
        """Return the mean cross-entropy, 0-d, in nats: (6) while training."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x_NH, targets_N)
        self.draw(targets_N)
        (_, ids_S, log_pi_S, targets_N), self._drawn = self._drawn, ()
        if self.sparse:
            weight_SH = SparseRows.apply(self.weight, ids_S)
            bias_S = SparseRows.apply(self.bias, ids_S)
        else:
            weight_SH = self.weight.index_select(0, ids_S)
            bias_S = self.bias.index_select(0, ids_S)
        return linear_cross_entropy(x_NH, weight_SH, bias_S - log_pi_S, targets_N)

    def draw(self, targets_N: Tensor) -> Tensor:
        """Draw the sample of the next loss, that of these targets, unless it is drawn.

        Returns:
            (S,) int64, its words, ascending.
        """
        if not self._drawn or not torch.equal(self._drawn[0], targets_N):
            self._drawn = (targets_N, *self.sample(targets_N))
        return self._drawn[1]

    @torch.no_grad()
    def sample(self, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a sample (3), ln pi (4) and the targets' places in the sample.

        Args:
            targets_N: int64, -1: no target, stays -1.

        Returns:
            (S,) int64 ascending; (S,) float32; (N,) int64.
        """
        device = targets_N.device
        if self._frequent_F.device != device:
            self._frequent_F = self._frequent_F.to(device)
        is_target_N = targets_N != PADDING
        any_target = targets_N.amax().clamp(min=0) if len(targets_N) else 0
        known_N = torch.where(is_target_N, targets_N, any_target)
        before = [] if self.recent is None else self._before(targets_N[is_target_N])
        drawn = self.random.draw(device)
        parts = torch.cat([self._frequent_F, known_N, *before, drawn])
        ids_S, places = torch.unique(parts, return_inverse=True)
        known = places[self.num_frequent : self.num_frequent + len(known_N)]
        certain = places[self.num_frequent : len(parts) - len(drawn)]
        log_pi_S = self.random.log_probabilities(device).index_select(0, ids_S)
        log_pi_S.index_fill_(0, certain, 0.0)  # drawn or not
        return ids_S, log_pi_S, torch.where(is_target_N, known, PADDING)

    def _before(self, known: Tensor) -> list[Tensor]:
        """Return the targets before these (1), which are remembered from now on."""
        assert self.recent is not None
        before = self.recent.clone()
        self.recent.copy_(torch.cat([before, known])[len(known) :])
        return [before[before != PADDING]]
