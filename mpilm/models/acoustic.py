"""Acoustic models: feed-forward network, LSTM and bidirectional LSTM.

Source      DNN: H. Su and H. Chen, arXiv 1507.01239, 2015. LSTM: X. Cui et al.,
            arXiv 2110.11199, 2021 (six bidirectional layers, linear bottleneck).
Notation    x_TBD -> inputs, frames spliced by the data; T frames, B sequences
            H -> hidden, L -> layers, C -> classes
Models      dnn    h_0 = x,  h_l = f(W_l h_(l-1) + b_l),  f sigmoid or ReLU      (1)
            lstm   h = LSTM layers over t (torch's), from a zero state            (2)
            blstm  H/2 cells forwards and H/2 backwards in each layer             (3)
                   (2) and (3): h <- W_b h + b_b where there is a bottleneck      (4)
            loss = mean cross-entropy of softmax(W h + b) over the labels         (5)
Frame error share of the labels that are not the likeliest class.
First model sigmoid layers: uniform in +-4 sqrt(6 / (in + out)); ReLU: He's normal
            sqrt(2 / in) (X. Glorot and Y. Bengio 2010; K. He et al. 2015); LSTM uniform
            in +-1/sqrt(cells), forget-gate bias 1; bottleneck and softmax uniform in
            +-sqrt(6 / (in + out)); other biases 0.
Departs     nowhere.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mpilm.models.base import SoftmaxModel, open_forget_gates_
from mpilm.models.softmax import PADDING, Softmax, chunks, times_transposed

Activation = Literal["sigmoid", "relu"]


class AcousticModel(SoftmaxModel):
    """Base: `hidden_features` makes of frames what goes into the softmax.

    Its loss is (5).
    """

    softmax: Softmax

    @abstractmethod
    def hidden_features(self, batch: Any) -> Tensor:
        """Return the softmax layer's inputs, (T, B, H)."""

    def forward(self, batch: Any) -> Tensor:
        """Return the softmax layer's inputs, (T*B, H), contiguous."""
        return self.hidden_features(batch).flatten(0, 1)

    @torch.no_grad()
    def nll(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return summed negative log-likelihood (nats, float64) and wrong frames, 0-d.

        Args:
            batch: as for `loss`.
        """
        x_NH, y_N = self(batch), batch.targets.flatten()
        nll = torch.zeros((), dtype=torch.float64, device=x_NH.device)
        errors = torch.zeros((), dtype=torch.int64, device=x_NH.device)
        weight, bias = self.softmax.weight, self.softmax.bias
        for rows in chunks(len(x_NH), len(bias), x_NH.device):
            logits, y = times_transposed(x_NH[rows], weight, bias), y_N[rows]
            each = F.cross_entropy(logits, y, ignore_index=PADDING, reduction="none")
            nll += each.double().sum()
            errors += ((logits.argmax(1) != y) & (y != PADDING)).sum()
        return nll, errors

    @torch.no_grad()
    def log_posteriors(self, batch: Any) -> Tensor:
        """Return ln p(class | frames), (T, B, C).

        Args:
            batch: as for `loss`; its targets are not looked at.
        """
        h_TBH = self.hidden_features(batch)
        return torch.log_softmax(self.softmax.logits(h_TBH), dim=-1)


class Dnn(AcousticModel):
    """A feed-forward network on spliced frames (1).

    Args:
        num_inputs: numbers in a spliced frame, >= 1.
        num_classes: C.
        hidden: units of each layer H, >= 1.
        layers: hidden layers L, >= 1.
        activation: f.
    """

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        *,
        hidden: int,
        layers: int,
        activation: Activation = "sigmoid",
    ) -> None:
        super().__init__()
        sizes = [num_inputs] + [hidden] * layers
        self.hidden = nn.ModuleList(
            nn.Linear(below, above) for below, above in pairwise(sizes)
        )
        self.softmax = Softmax(hidden, num_classes)
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the first model."""
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            if self.activation == "sigmoid":
                nn.init.xavier_uniform_(layer.weight, gain=4.0)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        reset_softmax(self.softmax)

    def hidden_features(self, batch: Any) -> Tensor:
        x: Tensor = batch.inputs
        for layer in self.hidden:
            x = layer(x)
            x = torch.sigmoid(x) if self.activation == "sigmoid" else torch.relu(x)
        return x


class LstmAm(AcousticModel):
    """An LSTM, one- or two-sided, every sequence from a zero state (2), (3), (4).

    Args:
        num_inputs: numbers in a (spliced) frame, >= 1.
        num_classes: C.
        hidden: cells of each layer H, both directions together.
        layers: LSTM layers L, >= 1.
        bottleneck: units of the linear layer before the softmax; 0: none.
        dropout: share of units dropped after every LSTM layer, 0 <= dropout < 1.
        bidirectional: whether half of the cells run backwards; then H is even.
    """

    def __init__(
        self,
        num_inputs: int,
        num_classes: int,
        *,
        hidden: int,
        layers: int,
        bottleneck: int = 0,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            num_inputs,
            hidden // 2 if bidirectional else hidden,
            layers,
            dropout=dropout if layers > 1 else 0.0,  # torch warns where it is in vain
            bidirectional=bidirectional,
        )
        self.dropout = nn.Dropout(dropout)
        self.bottleneck = nn.Linear(hidden, bottleneck) if bottleneck else None
        self.softmax = Softmax(bottleneck or hidden, num_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the first model."""
        self.lstm.reset_parameters()
        open_forget_gates_(self.lstm)
        if self.bottleneck is not None:
            nn.init.xavier_uniform_(self.bottleneck.weight)
            nn.init.zeros_(self.bottleneck.bias)
        reset_softmax(self.softmax)

    def hidden_features(self, batch: Any) -> Tensor:
        lengths = getattr(batch, "lengths", None)
        if self.lstm.bidirectional and lengths and min(lengths) < len(batch.inputs):
            h_TBH = self._within(batch.inputs, lengths)
        else:  # forwards, what follows the end of an utterance changes nothing in it
            h_TBH, _ = self.lstm(batch.inputs)
        h_TBH = self.dropout(h_TBH)
        return h_TBH if self.bottleneck is None else self.bottleneck(h_TBH)

    def _within(self, x_TBD: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return the LSTM's outputs where the way back begins at each one's end."""
        each = torch.tensor(lengths)
        packed = pack_padded_sequence(x_TBD, each, enforce_sorted=False)
        packed, _ = self.lstm(packed)
        h_TBH, _ = pad_packed_sequence(packed, total_length=len(x_TBD))
        return h_TBH


def reset_softmax(softmax: Softmax) -> None:
    """Draw the first softmax layer."""
    nn.init.xavier_uniform_(softmax.weight)
    nn.init.zeros_(softmax.bias)
