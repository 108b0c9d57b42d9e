"""LSTM layers with what regularises and shrinks them, each an option of its own.

Source      Locked dropout: Y. Gal and Z. Ghahramani, "A Theoretically Grounded
            Application of Dropout in Recurrent Neural Networks", NIPS 2016. Dropped
            recurrent weights: S. Merity, N. S. Keskar and R. Socher, "Regularizing and
            Optimizing LSTM Language Models" (AWD-LSTM), ICLR 2018. Projection: H. Sak,
            A. Senior and F. Beaufays (LSTMP), Interspeech 2014. Layer norm: J. L. Ba,
            J. R. Kiros and G. E. Hinton, arXiv 1607.06450, 2016.
Notation    x_TBI -> inputs; T time steps, B sequences, L layers, H cells
            y_TBO -> outputs: O = projected, else H
            p, q -> dropout, weight_dropout;  keep(p) -> 1/(1-p) with probability
            1 - p, else 0, each element by itself
Layer       W = W_hh * keep(q), drawn once for a minibatch                        (1)
            the LSTM of lstm_lm.py with W in the place of W_hh; in a projected one
            h_t = W_hr (o tanh(c_t)), which is what W_hh multiplies, too           (2)
            y_t = norm(h_t): gain * (h_t - mean) / sqrt(variance + 1e-5) + bias    (3)
            between the layers D(y)
Dropout     D(x) = x * keep(p) of (T, B, O), or locked of (1, B, O): the same units of a
            sequence for all time steps of a minibatch                             (4)
Departs     (4) does not drop what W_hh multiplies, as Gal and Ghahramani do; (1) is for
            that, as in AWD-LSTM. (3) normalises the outputs, not the gates as Ba et al.
            do: those can only be had step by step, without oneDNN and cuDNN.
Invariants  without options: nn.LSTM, its first model to the bit, outputs to rounding.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

# What torch warns of and is meant: cuDNN copies weights that are dropped; projections
# have no oneDNN kernel (docs/language_models.md has the cost of either).
EXPECTED = ("RNN module weights are not part", "LSTM with projections is not supported")
Carry = tuple[Tensor, Tensor]  # h (L, B, O), c (L, B, H)


class LstmLayers(nn.Module):
    """Layers of LSTM, dropout between them.

    Args:
        num_inputs: I.
        hidden: H.
        num_layers: L.
        projected: O < H; 0: no projection.
        dropout: p, between the layers.
        locked: whether a mask of dropout holds for all time steps.
        weight_dropout: q.
        layer_norm: whether there is (3).

    layers  an nn.LSTM each. On a GPU its weights are one chunk, as cuDNN wants them;
            where (1) replaces W_hh they are not, and cuDNN copies the layer's weights
            in every minibatch
    norms   a LayerNorm each, or none
    """

    def __init__(
        self,
        num_inputs: int,
        hidden: int,
        num_layers: int,
        *,
        projected: int = 0,
        dropout: float = 0.0,
        locked: bool = False,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        outputs = projected or hidden
        sizes = [num_inputs] + [outputs] * (num_layers - 1)
        self.layers = nn.ModuleList(
            nn.LSTM(size, hidden, proj_size=projected) for size in sizes
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(outputs) for _ in range(num_layers if layer_norm else 0)
        )
        self.dropout = Dropout(dropout, locked=locked)
        self.weight_dropout = weight_dropout

    def reset_parameters(self) -> None:
        """Draw all layers anew, as nn.LSTM does; gains 1, their biases 0."""
        for module in (*self.layers, *self.norms):
            module.reset_parameters()

    def forward(self, x_TBI: Tensor, state: Carry | None) -> tuple[Tensor, Carry]:
        """Return y (T, B, O) of the last layer, and h and c after the last step."""
        with warnings.catch_warnings():
            for text in EXPECTED:
                warnings.filterwarnings("ignore", text)
            return self._forward(x_TBI, state)

    def _forward(self, x_TBI: Tensor, state: Carry | None) -> tuple[Tensor, Carry]:
        last: list[Carry] = []
        y = x_TBI
        for number, layer in enumerate(self.layers):
            if number:
                y = self.dropout(y)
            own = None
            if state is not None:
                own = state[0][number, None], state[1][number, None]
            y, after = self._layer(layer, y, own)
            last.append(after)
            if self.norms:
                y = self.norms[number](y)
        h, c = (torch.cat(parts) for parts in zip(*last, strict=True))
        return y, (h, c)

    def _layer(
        self, layer: nn.Module, x_TBI: Tensor, state: Carry | None
    ) -> tuple[Tensor, Carry]:
        assert isinstance(layer, nn.LSTM)
        if not (self.weight_dropout and self.training):
            y, last = layer(x_TBI, state)
            return y, last
        weights: dict[str, Tensor] = dict(layer.named_parameters())
        name = "weight_hh_l0"
        weights[name] = nn.functional.dropout(weights[name], self.weight_dropout)  # (1)
        if state is None:
            B = x_TBI.shape[1]
            h = x_TBI.new_zeros(1, B, layer.proj_size or layer.hidden_size)
            state = h, x_TBI.new_zeros(1, B, layer.hidden_size)
        y, h, c = torch.lstm(
            x_TBI,
            state,
            list(weights.values()),
            has_biases=True,
            num_layers=1,
            dropout=0.0,
            train=True,
            bidirectional=False,
            batch_first=False,
        )
        return y, (h, c)


class Dropout(nn.Dropout):
    """nn.Dropout; locked: units of x (T, B, D) are dropped for all time steps (4).

    >>> kept_T1D = Dropout(0.5, locked=True)(torch.ones(3, 1, 4))
    >>> torch.equal(kept_T1D[0], kept_T1D[2]), set(kept_T1D.unique().tolist()) <= {0, 2}
    (True, True)
    """

    def __init__(self, p: float, *, locked: bool = False) -> None:
        super().__init__(p)
        self.locked = locked

    def forward(self, x_TBD: Tensor) -> Tensor:
        if not (self.locked and self.training and self.p):
            return super().forward(x_TBD)
        mask = x_TBD.new_empty(1, *x_TBD.shape[1:]).bernoulli_(1.0 - self.p)
        return x_TBD * mask.div_(1.0 - self.p)


def drop_words(x_TBE: Tensor, ids_TB: Tensor, p: float) -> Tensor:
    """Return embeddings without some words, wherever they stand in the minibatch.

    The mask is that of rows of the embedding matrix, drawn for those that are read.

    Args:
        x_TBE: embeddings of ids_TB.
        p: the probability that a word is dropped; those left are divided by 1 - p.
    """
    words, places = ids_TB.unique(return_inverse=True)
    mask = x_TBE.new_empty(len(words), 1).bernoulli_(1.0 - p).div_(1.0 - p)
    return x_TBE * mask[places]
