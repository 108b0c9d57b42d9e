"""Restricted Boltzmann machines, trained greedily one on another, to begin a DNN with.

Source      G. Hinton, "A Practical Guide to Training Restricted Boltzmann Machines",
            2010; recipe: H. Su and H. Chen, arXiv 1507.01239, 2015.
Notation    v_ND, h_NH -> visible, hidden units   a_D, b_H -> their biases   W_HD
            s -> sigmoid;  mean over the N rows of a minibatch: < >
Energy      Bernoulli visible  E(v, h) = -a v - b h - h W v                      (1)
            Gaussian visible   E(v, h) = |v - a|^2 / 2 - b h - h W v             (2)
            (unit variance: features are to be normalised, mean and variance)
Free energy F(v) = -ln sum_h exp(-E(v, h))
                 = visible part of (1) or (2) - sum_j softplus(b_j + (W v)_j)    (3)
CD-1        p(h = 1 | v) = s(W v + b)                                            (4)
            v0 -> h0 drawn from (4) -> v1 = s(h0 W + a), Gaussian: h0 W + a      (5)
            dW = <h1 v1> - <h0 v0>, h_i = p(h = 1 | v_i);
            da = <v1> - <v0>;  db = <h1> - <h0>                                  (6)
            which is the gradient of <F(v0) - F(v1)> with v1 held fixed          (7)
Stack       what layer l + 1 sees are the probabilities (4) of layer l.
Invariants  (7): torch's gradient of a loss whose slope is (7), so that an RBM is a
            module like any other, and every strategy trains it. The loss's value is the
            squared error of the reconstruction.
Departs     nowhere. The L2 penalty is on W alone, as in Kaldi's rbm-train-cd1-frmshuff.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rbm(nn.Module):
    """One restricted Boltzmann machine.

    weight        (H, D), as nn.Linear has it
    hidden_bias   (H,)
    visible_bias  (D,)

    Args:
        gaussian: whether the visible units are real numbers (2), else in [0, 1] (1).
        stddev: of the first weights; the first biases are 0.
    """

    def __init__(
        self, visible: int, hidden: int, *, gaussian: bool, stddev: float = 0.1
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, visible) * stddev)
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.gaussian = gaussian

    def hidden(self, v_ND: Tensor) -> Tensor:
        """Return p(h = 1 | v), (N, H) (4)."""
        return torch.sigmoid(F.linear(v_ND, self.weight, self.hidden_bias))

    def visible(self, h_NH: Tensor) -> Tensor:
        """Return the mean of v given h, (N, D) (5)."""
        v_ND = F.linear(h_NH, self.weight.t(), self.visible_bias)
        return v_ND if self.gaussian else torch.sigmoid(v_ND)

    def free_energy(self, v_ND: Tensor) -> Tensor:
        """Return F(v), (N,) (3)."""
        hidden_N = F.softplus(F.linear(v_ND, self.weight, self.hidden_bias)).sum(1)
        if self.gaussian:
            return 0.5 * (v_ND - self.visible_bias).square().sum(1) - hidden_N
        return -(v_ND @ self.visible_bias) - hidden_N

    def contrast(self, v_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return <F(v0) - F(v1)>, 0-d (7), and the reconstruction v1, (N, D)."""
        with torch.no_grad():
            v1_ND = self.visible(torch.bernoulli(self.hidden(v_ND)))  # (5)
        return (self.free_energy(v_ND) - self.free_energy(v1_ND)).mean(), v1_ND


class RbmStack(nn.Module):
    """The RBM that is being trained, above layers that stay as they are.

    Args:
        lower: (weight, bias) of the layers below.
        top: what is trained.
        penalty: L2 penalty of its weights.
    """

    def __init__(
        self, lower: Sequence[tuple[Tensor, Tensor]], top: Rbm, *, penalty: float = 0.0
    ) -> None:
        super().__init__()
        self.top, self.penalty = top, penalty
        for index, (weight, bias) in enumerate(lower):
            self.register_buffer(f"weight{index}", weight, persistent=False)
            self.register_buffer(f"bias{index}", bias, persistent=False)
        self._num_lower = len(lower)

    @torch.no_grad()
    def below(self, batch: Any) -> Tensor:
        """Return what the top RBM sees of a minibatch, (N, D)."""
        x: Tensor = batch.inputs.flatten(0, 1)
        for index in range(self._num_lower):
            weight = self.get_buffer(f"weight{index}")
            x = torch.sigmoid(F.linear(x, weight, self.get_buffer(f"bias{index}")))
        return x

    def loss(self, batch: Any) -> Tensor:
        """Return the mean squared reconstruction error, 0-d; its gradient is (6)."""
        v_ND = self.below(batch)
        slope, v1_ND = self.top.contrast(v_ND)
        if self.penalty:
            slope = slope + 0.5 * self.penalty * self.top.weight.square().sum()
        return slope - slope.detach() + (v_ND - v1_ND).square().sum(1).mean()

    @torch.no_grad()
    def nll(self, batch: Any) -> Tensor:
        """Return the summed squared reconstruction error of frames with a label.

        Nothing is drawn: v1 is the mean given the probabilities (4).
        """
        v_ND = self.below(batch)
        v1_ND = self.top.visible(self.top.hidden(v_ND))
        each_N = (v_ND - v1_ND).double().square().sum(1)
        return each_N[batch.targets.flatten() >= 0].sum()
