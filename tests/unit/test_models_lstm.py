"""The LSTM that gives up its gate derivatives: against nn.LSTM and numbers of its own.

Its gradients are seen through natural gradient with a huge alpha, which is plain SGD.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mpilm.models.lstm import lstm_layer
from mpilm.optim.configs import NgSgdConfig
from mpilm.optim.ng_sgd import precondition_

PLAIN = NgSgdConfig(alpha=1e15, max_change="none")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
        ],
    ),
]


def distance(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def gradients(lstm, x, state):
    """Return outputs, last state and all gradients of one nn.LSTM."""
    torch.manual_seed(3)  # of dropout
    y, (h, c) = lstm(x, state)
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (part * torch.randn(part.shape, generator=generator).to(part.device)).sum()
        for part in (y, h, c)
    )
    inputs = [x, *(state or ()), *lstm.parameters()]
    return [y, h, c, *torch.autograd.grad(loss, inputs)]


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """Without TF32, to which cuDNN rounds factors else: it is off by 2e-4."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize(
    ("layers", "bidirectional", "dropout"),
    [(1, False, 0.0), (1, True, 0.0), (2, False, 0.0), (3, True, 0.0), (2, True, 0.3)],
)
def test_equals_torchs_lstm_to_1e_5(layers, bidirectional, dropout, carried, device):
    if dropout and device == "cuda":
        pytest.skip("cuDNN draws other masks")
    T, B, I, H = 9, 4, 7, 5  # noqa: E741
    torch.manual_seed(0)
    lstm = nn.LSTM(I, H, layers, dropout=dropout, bidirectional=bidirectional)
    lstm = lstm.to(device)
    x = torch.randn(T, B, I, device=device, requires_grad=True)
    state = None
    if carried:
        shape = (layers * (1 + bidirectional), B, H)
        parts = (torch.randn(shape, device=device) for _ in range(2))
        state = tuple(part.requires_grad_() for part in parts)
    expected = gradients(lstm, x, state)
    fast = copy.deepcopy(lstm)
    precondition_(fast, PLAIN)
    found = gradients(fast, x, state)
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 1e-5
    assert not torch.equal(found[-1], expected[-1])  # another path, to rounding


def test_training_size_equals_torchs_lstm_to_1e_5():
    torch.manual_seed(0)
    lstm = nn.LSTM(256, 256)
    x = torch.randn(35, 20, 256, requires_grad=True)
    expected = gradients(lstm, x, None)
    fast = copy.deepcopy(lstm)
    precondition_(fast, PLAIN)
    for a, b in zip(gradients(fast, x, None), expected, strict=True):
        assert distance(a, b) < 1e-5


def test_float64_gradients_are_those_of_finite_differences():
    torch.manual_seed(1)
    T, B, I, H = 3, 2, 3, 2  # noqa: E741
    shapes = [(T, B, I), (B, H), (B, H), (4 * H, I), (4 * H, H), (4 * H,), (4 * H,)]
    parts = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    for reverse in (False, True):

        def layer(x, h, c, *weights, reverse=reverse):
            return lstm_layer(x, (h, c), weights, reverse=reverse)

        assert torch.autograd.gradcheck(layer, parts)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_of_several_lengths(bidirectional):
    torch.manual_seed(2)
    lstm = nn.LSTM(3, 4, 2, bidirectional=bidirectional)
    x, lengths = torch.randn(6, 3, 3), torch.tensor([4, 6, 1])
    fast = copy.deepcopy(lstm)
    precondition_(fast, PLAIN)
    found = []
    for each in (lstm, fast):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, _ = pad_packed_sequence(each(packed)[0])
        weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
        found.append([y, *torch.autograd.grad((y * weights).sum(), each.parameters())])
    for a, b in zip(*found, strict=True):
        assert distance(a, b) < 1e-5


def test_one_sequence_without_a_batch_and_no_gradient():
    lstm = nn.LSTM(3, 4)
    x = torch.randn(5, 3)
    y, (h, c) = lstm(x)
    precondition_(lstm, PLAIN)
    found, (h_found, c_found) = lstm(x)
    assert torch.allclose(found, y, atol=1e-6)
    assert h_found.shape == h.shape
    assert torch.allclose(c_found, c, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(lstm(x)[0], y, atol=1e-6)
