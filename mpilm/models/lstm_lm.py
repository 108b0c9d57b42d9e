"""LSTM language model: embedding, LSTM layers, softmax; state carried on.

Source      W. Zaremba, I. Sutskever and O. Vinyals, "Recurrent Neural Network
            Regularization", arXiv 1409.2329, 2014: where dropout stands, carried state.
            O. Press and L. Wolf, "Using the Output Embedding to Improve Language
            Models", EACL 2017: tied weights. Locked and weight dropout, layer norm,
            LSTMP: see lstm_layers.py, with which (2) and (3) are computed then.
Notation    w_TB -> inputs, token ids; T time steps, B sequences
            E -> embed, H -> hidden, L -> layers, V -> vocabulary
Model       x = D(embedding[w]); with embed_dropout first without some words  (1)
            layer l = 1..L, with D between the layers:
            i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of
                         W_ih x_t + b_ih + W_hh h_(t-1) + b_hh  (4 blocks of H) (2)
            c_t = f c_(t-1) + i g,   h_t = o tanh(c_t)                         (3)
            loss = mean cross-entropy of softmax(softmax.weight D(h) + softmax.bias) (4)
            D drops each unit with probability `dropout` while training; in (1) and (4)
            that may be another one.
Carried     h and c after the last step are where the next minibatch begins, without
            gradient (truncated back-propagation through time).
First model embedding and softmax weights uniform in +-0.1, softmax bias 0 (PyTorch's
            word_language_model example); LSTM uniform in +-1/sqrt(H) (torch's own);
            forget-gate bias 1 (R. Jozefowicz et al., ICML 2015).
Departs     tied weights with embed != hidden (or projected) go through one more matrix,
            `projection` (E, H), between (3) and (4). A sampled softmax is trained on
            another loss than (4), an adaptive one has another softmax: see their files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.errors import ConfigError
from mpilm.models.adaptive_softmax import AdaptiveSoftmax
from mpilm.models.base import Compute, SoftmaxModel, computing, open_forget_gates_
from mpilm.models.lstm_layers import Dropout, LstmLayers, drop_words
from mpilm.models.sampled_softmax import SampledSoftmax
from mpilm.models.softmax import Softmax

State = tuple[Tensor, ...]  # (h_LBH, c_LBH), or () for zeros


class LstmLm(SoftmaxModel):
    """An LSTM language model that carries its state from minibatch to minibatch.

    The first model is drawn from torch's global random state: the same after the same
    `torch.manual_seed`.

    Args:
        vocab: number of words V, >= 1.
        embed: size of an embedding E, >= 1.
        hidden: LSTM cells in each layer H, >= 1.
        layers: LSTM layers L, >= 1.
        dropout: share of units dropped, 0 <= dropout < 1.
        tied: whether softmax.weight is embedding.weight.
        softmax: from (inputs, words) to the softmax layer; the full one if not given.
        sparse: whether the embedding's gradient is a sparse tensor, of the rows that a
            minibatch has read.
        input_dropout, output_dropout: in the place of `dropout` after the embedding,
            and before the softmax.
        embed_dropout: share of words whose embedding is dropped in a minibatch.
        locked, weight_dropout, layer_norm, projected: see lstm_layers.py.
        compute: of the LSTM while training, on a GPU of the softmax's products too;
            parameters are float32.

    Raises:
        ConfigError: tied weights with a softmax that has no row for each word.
    """

    softmax: Softmax | AdaptiveSoftmax

    def __init__(
        self,
        vocab: int,
        *,
        embed: int,
        hidden: int,
        layers: int = 1,
        dropout: float = 0.0,
        tied: bool = False,
        softmax: Callable[[int, int], Softmax | AdaptiveSoftmax] = Softmax,
        sparse: bool = False,
        input_dropout: float | None = None,
        output_dropout: float | None = None,
        embed_dropout: float = 0.0,
        locked: bool = False,
        weight_dropout: float = 0.0,
        layer_norm: bool = False,
        projected: int = 0,
        compute: Compute = "float32",
    ) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0  # torch warns where it has no effect
        self.embedding = nn.Embedding(vocab, embed, sparse=sparse)
        self.lstm: nn.LSTM | LstmLayers
        if locked or weight_dropout or layer_norm or projected:
            self.lstm = LstmLayers(
                embed,
                hidden,
                layers,
                projected=projected,
                dropout=between,
                locked=locked,
                weight_dropout=weight_dropout,
                layer_norm=layer_norm,
            )
        else:
            self.lstm = nn.LSTM(embed, hidden, layers, dropout=between)
        outputs = projected or hidden
        has_one_more = tied and embed != outputs
        self.projection = (
            nn.Linear(outputs, embed, bias=False) if has_one_more else None
        )
        self.softmax = softmax(embed if tied else outputs, vocab)
        if tied:
            require_tieable(self.softmax, sparse=sparse)
            self.softmax.weight = self.embedding.weight

        def rate(own: float | None) -> float:
            return dropout if own is None else own

        self.input_dropout = Dropout(rate(input_dropout), locked=locked)
        self.dropout = Dropout(rate(output_dropout), locked=locked)
        self.embed_dropout, self.compute, self.hidden = embed_dropout, compute, hidden
        self._carried: State = ()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the first model."""
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.lstm.reset_parameters()
        open_forget_gates_(self.lstm)
        if self.projection is not None:
            self.projection.reset_parameters()
        self.softmax.reset_parameters()

    def features(self, inputs_TB: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the softmax layer's inputs, (T*B, H or E), and the last state."""
        x_TBE = self.embedding(inputs_TB)
        if self.embed_dropout and self.training:
            x_TBE = drop_words(x_TBE, inputs_TB, self.embed_dropout)
        x_TBE = self.input_dropout(x_TBE)
        if self.training and self.compute != "float32":
            with computing(self.compute, self.hidden, x_TBE.device):
                h_TBH, last = self.lstm(x_TBE, state or None)
            h_TBH, last = h_TBH.float(), tuple(part.float() for part in last)
        else:
            h_TBH, last = self.lstm(x_TBE, state or None)
        h_TBH = self.dropout(h_TBH)
        if self.projection is not None:
            h_TBH = self.projection(h_TBH)
        return h_TBH.flatten(0, 1), last

    def forward(self, batch: Any) -> Tensor:
        """Return the features of a minibatch, going on from the carried state."""
        state = () if batch.start else self._carried
        x_NH, last = self.features(batch.inputs, state)
        self._carried = tuple(part.detach() for part in last)
        return x_NH

    def loss(self, batch: Any) -> Tensor:
        """Return the mean cross-entropy of a minibatch (4); see `SoftmaxModel`."""
        if isinstance(self.softmax, SampledSoftmax) and self.training:
            # before dropout, as where `rows_read` does
            self.softmax.draw(batch.targets.flatten())
        if self.training and batch.inputs.is_cuda:
            with computing(self.compute, self.hidden, batch.inputs.device):
                return super().loss(batch)
        return super().loss(batch)

    @torch.no_grad()
    def rows_read(self, batch: Any) -> dict[str, Tensor]:
        """Return the rows that the next `loss`, of this minibatch, will read.

        Args:
            batch: as for `loss`.

        Returns:
            parameter's name -> ids, ascending, each once, for those whose gradients are
            sparse. A sample of the softmax is drawn for it.
        """
        read = {"embedding.weight": batch.inputs.unique()}
        if isinstance(self.softmax, SampledSoftmax):
            ids = self.softmax.draw(batch.targets.flatten())
            if self.softmax.weight is self.embedding.weight:
                both = torch.cat([read["embedding.weight"], ids])
                read["embedding.weight"] = both.unique()
            else:
                read["softmax.weight"] = ids
            read["softmax.bias"] = ids
        return read

    @torch.no_grad()
    def nll(self, batch: Any) -> Tensor:
        """Return the summed negative log-likelihood of the targets, 0-d float64, nats.

        Args:
            batch: as for `loss`.
        """
        return self.softmax.nll(self(batch), batch.targets.flatten())

    def carried(self) -> State:
        """Return the carried state (h_LBH, c_LBH); () before the first minibatch."""
        return self._carried

    def load_carried(self, state: State) -> None:
        """Go on from `state`; () means zeros."""
        self._carried = tuple(state)

    @torch.no_grad()
    def generate(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        never: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Return ids drawn one by one after `prompt`; the carried state stays.

            p(w) = softmax(logits / temperature), among the top_k likeliest

        Args:
            prompt: at least one id.
            num_tokens: how many to draw, >= 0.
            temperature: 0 takes the likeliest.
            top_k: 0 means all.
            never: ids that are not drawn.
            generator: random state, on the CPU; torch's global one if not given.
        """
        was_training = self.training
        self.eval()
        device = self.embedding.weight.device
        fed = torch.tensor(list(prompt), dtype=torch.int64, device=device)[:, None]
        state: State = ()
        drawn: list[int] = []
        for _ in range(num_tokens):
            x_NH, state = self.features(fed, state)
            logits_V = self.softmax.logits(x_NH[-1:])[0].float().cpu()
            logits_V[list(never)] = -torch.inf
            drawn.append(draw(logits_V, temperature, top_k, generator))
            fed = fed.new_tensor([[drawn[-1]]])
        self.train(was_training)
        return drawn


def require_tieable(softmax: nn.Module, *, sparse: bool) -> None:
    """Raise unless the softmax's weights can be those of an embedding.

    Raises:
        ConfigError: it has no matrix of a row per word, or a gradient of all rows where
            that of the embedding is to be of a few.
    """
    if not isinstance(softmax, Softmax):
        raise ConfigError(
            "model.tied = true: an adaptive softmax has no matrix with a row for each"
            ' word; model.softmax = "full" and "sampled" have one'
        )
    if sparse and not isinstance(softmax, SampledSoftmax):
        raise ConfigError(
            "model.sparse = true with model.tied: the full softmax has a gradient for"
            ' every row of the shared matrix; model.softmax = "sampled" has not'
        )


def draw(
    logits_V: Tensor,
    temperature: float,
    top_k: int,
    generator: torch.Generator | None = None,
) -> int:
    """Return an id drawn from softmax(logits / temperature) among the likeliest.

    >>> draw(torch.tensor([0.0, 2.0, 1.0]), temperature=0.0, top_k=0)
    1
    """
    if temperature <= 0.0:
        return int(logits_V.argmax())
    if 0 < top_k < len(logits_V):
        least = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    p_V = torch.softmax(logits_V / temperature, 0)
    return int(torch.multinomial(p_V, 1, generator=generator))
