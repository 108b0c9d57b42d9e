"""Preconditioned layers against the same affine maps written out, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpilm.models import softmax as softmax_module
from mpilm.models.softmax import PADDING, Softmax
from mpilm.optim.affine import precondition, preconditioner
from mpilm.optim.configs import NgSgdConfig
from mpilm.optim.ng_sgd import precondition_

CONFIG = NgSgdConfig(rank_in=4, rank_out=5, max_change="none", update_period=2)
STEPS = 15  # the first 11 update


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def close(found, expected, limit=1e-10):
    return all(distance(a, b) < limit for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("gain", [1.0, 50.0])
def test_precondition_equals_the_preconditioner_itself(ones, gain):
    """Also where little is left of X, and its norm cannot be had by subtraction."""
    gain = 1.0 if ones else gain
    slow, fast = (preconditioner(CONFIG, 4, 300) for _ in range(2))
    torch.manual_seed(0)
    direction = torch.randn(300 - ones)
    for step in range(30):
        X = torch.randn(40, 1) * direction + 0.01 * torch.randn(40, 300 - ones)
        X[:, :5] += step
        given = torch.cat([X, torch.ones(40, 1)], 1) if ones else gain * X
        expected, scale = slow(given)
        hat = precondition(fast, X, ones=ones, gain=gain)
        found = torch.cat([hat.rows, hat.ones[:, None]], 1) if ones else hat.rows * gain
        assert distance(found, expected) < 1e-4
        assert float(hat.scale) == pytest.approx(float(scale), rel=1e-4)
    assert float(scale) > 5  # little was left
    assert slow.fisher.t == fast.fisher.t == 30


class Unrolled(nn.Module):
    """An LSTM layer as one nn.Linear on [x_t, h_(t-1)], of all steps at once.

    The steps' inputs h come from nn.LSTM; `derivatives` are those of the gates, which
    autograd finds at each step of a slow loop.
    """

    def __init__(self, lstm):
        super().__init__()
        I, H = lstm.input_size, lstm.hidden_size  # noqa: E741
        self.linear = nn.Linear(I + H, 4 * H, dtype=torch.float64)
        with torch.no_grad():
            both = torch.cat([lstm.weight_ih_l0, lstm.weight_hh_l0], 1)
            self.linear.weight.copy_(both)
            self.linear.bias.copy_(lstm.bias_ih_l0 + lstm.bias_hh_l0)

    def loop(self, x, h, c):
        """Return outputs, inputs of the map and gates of every step, plainly."""
        weight, bias = self.linear.weight.detach(), self.linear.bias.detach()
        outputs, inputs, gates = [], [], []
        for x_t in x:
            inputs.append(torch.cat([x_t, h], 1))
            gates.append(F.linear(inputs[-1], weight, bias).requires_grad_())
            i, f, g, o = gates[-1].chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), inputs, gates


def test_lstm_gates_equal_a_linear_layer_over_all_steps():
    torch.manual_seed(0)
    T, B, I, H = 7, 6, 5, 4  # noqa: E741
    lstm = nn.LSTM(I, H).double()
    unrolled = Unrolled(lstm)
    precondition_(lstm, CONFIG)
    precondition_(unrolled, CONFIG)
    for _ in range(STEPS):
        x = torch.randn(T, B, I, dtype=torch.float64)
        h, c = torch.randn(2, 1, B, H, dtype=torch.float64)
        weights = torch.randn(T, B, H, dtype=torch.float64)
        y, _ = lstm(x, (h, c))
        found = torch.autograd.grad((y * weights).mean(), lstm.parameters())
        y_slow, inputs, gates = unrolled.loop(x, h.view(B, H), c.view(B, H))
        assert distance(y, y_slow) < 1e-12
        dz = torch.autograd.grad((y_slow * weights).mean(), gates)
        z = unrolled.linear(torch.cat(inputs).detach())
        g_W, g_b = torch.autograd.grad(z, unrolled.linear.parameters(), torch.cat(dz))
        assert close(found, [g_W[:, :I], g_W[:, I:], g_b, g_b])


def test_lstm_padding_is_no_row():
    """Packed sequences: only their own steps are rows of the map."""
    from torch.nn.utils.rnn import pack_padded_sequence

    torch.manual_seed(1)
    lstm = nn.LSTM(3, 4).double()
    layer = precondition_(lstm, CONFIG)[0]
    whole = copy.deepcopy(layer)
    x, lengths = torch.randn(6, 3, 3, dtype=torch.float64), torch.tensor([6, 2, 4])
    packed, _ = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
    packed.data.square().sum().backward()
    seen = layer.sides["in"][0].fisher
    assert seen.t == 1
    rows = []
    with torch.no_grad():
        y, _ = lstm(x)
    before = torch.cat([torch.zeros(1, 3, 4, dtype=torch.float64), y[:-1]])
    for sequence, length in enumerate(lengths):
        rows.append(torch.cat([x, before], 2)[:length, sequence])
    X = torch.cat(rows)
    whole.sides["in"][0](torch.cat([X, X.new_ones(len(X), 1)], 1))
    assert abs(whole.sides["in"][0].fisher.trace() - seen.trace()) < 1e-9


def test_embedding_equals_its_preconditioned_derivatives_summed_by_row():
    torch.manual_seed(0)
    embedding = nn.Embedding(9, 6).double()
    precondition_(embedding, CONFIG)
    by_hand = preconditioner(CONFIG, CONFIG.rank_out, 6)
    for _ in range(STEPS):
        ids = torch.randint(0, 8, (4, 5))
        weights = torch.randn(4, 5, 6, dtype=torch.float64)
        loss = (embedding(ids) * weights).sum() / 20
        (found,) = torch.autograd.grad(loss, embedding.parameters())
        rows, scale = by_hand(weights.view(20, 6))
        expected = torch.zeros_like(found)
        expected.index_add_(0, ids.flatten(), rows * scale / 20)
        assert distance(found, expected) < 1e-10
        assert not found[8].any()


@pytest.mark.parametrize("form", ["none", "nnet2", "su_chen"])
@pytest.mark.parametrize("summed", [False, True])
def test_softmax_in_chunks_equals_the_affine_map_on_all_logits(
    monkeypatch, form, summed
):
    """From the second minibatch on; the first is whole in both."""
    monkeypatch.setattr(softmax_module, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setattr(softmax_module, "CHUNK_BYTES", 1)
    torch.manual_seed(0)
    config = NgSgdConfig(
        rank_in=4,
        rank_out=5,
        update_period=2,
        summed=summed,
        max_change=form,
        max_change_per_sample=0.01,
        lr=20.0,
    )
    softmax = Softmax(6, 30).double()
    nn.init.normal_(softmax.weight)
    linear = nn.Linear(6, 30).double()
    linear.load_state_dict(softmax.state_dict())
    chunked, whole = (precondition_(m, config)[0] for m in (softmax, linear))
    for _ in range(STEPS):
        x = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
        y = torch.randint(0, 30, (50,))
        y[::7] = PADDING
        loss = softmax(x, y)
        found = torch.autograd.grad(loss, [x, *softmax.parameters()])
        expected_loss = F.cross_entropy(linear(x), y, ignore_index=PADDING)
        expected = torch.autograd.grad(expected_loss, [x, *linear.parameters()])
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
        assert close(found, expected)
    states = [layer.sides["out"][0].fisher for layer in (chunked, whole)]
    assert distance(states[0].W_RD, states[1].W_RD) < 1e-9
    assert states[0].t == STEPS


def test_tied_weights_get_the_sum_and_one_limit():
    from mpilm.models.lstm_lm import LstmLm
    from mpilm.optim.ng_sgd import NgSgd

    torch.manual_seed(0)
    model = LstmLm(11, embed=4, hidden=4, tied=True)
    config = NgSgdConfig(lr=1e4, max_change_map=0.01, max_change_all=1.0)
    maps = precondition_(model, config)
    optimizer = NgSgd(list(model.parameters()), maps=maps, config=config)
    before = model.embedding.weight.detach().clone()
    x_NH, _ = model.features(torch.randint(0, 11, (5, 2)), ())
    model.softmax(x_NH, torch.randint(0, 11, (10,))).backward()
    optimizer.step()
    moved = (model.embedding.weight.detach() - before).norm().item()
    assert moved == pytest.approx(0.01, rel=0.2)
