"""The fused softmax and cross-entropy against torch's and against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mpilm.models import softmax
from mpilm.models.softmax import Softmax, chunks, linear_cross_entropy, linear_nll


def draw_problem(num_rows, num_inputs, num_words, *, padding=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, num_inputs, generator=generator, dtype=dtype)
    weight = torch.randn(num_words, num_inputs, generator=generator, dtype=dtype)
    bias = torch.randn(num_words, generator=generator, dtype=dtype)
    targets = torch.randint(num_words, (num_rows,), generator=generator)
    targets[torch.randperm(num_rows, generator=generator)[:padding]] = -1
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    return *leaves, targets


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(
    "shape_and_padding",
    [(300, 16, 50, 0), (300, 16, 50, 77), (1, 4, 3, 0), (65, 1, 1, 5), (500, 8, 2, 9)],
)
def test_loss_and_gradients_match_float64(monkeypatch, shape_and_padding, onednn):
    *shape, padding = shape_and_padding
    if onednn and softmax.ONEDNN_LINEAR is None:
        pytest.skip("this torch has no oneDNN")
    product = softmax.ONEDNN_LINEAR if onednn else None
    monkeypatch.setattr(softmax, "PRODUCT", product)
    monkeypatch.setattr(softmax, "MIN_CHUNK_ROWS", 64)
    monkeypatch.setattr(softmax, "CHUNK_BYTES", 4)
    *leaves, targets = draw_problem(*shape, padding=padding)
    loss = linear_cross_entropy(*leaves, targets)
    (2.5 * loss).backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = F.linear(*exact)
    expected = F.cross_entropy(logits, targets, ignore_index=-1)
    (2.5 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    for leaf, exact_leaf in zip(leaves, exact, strict=True):
        scale = exact_leaf.grad.abs().max().item() + 1e-12
        assert (leaf.grad - exact_leaf.grad).abs().max().item() <= 2e-6 * scale + 1e-9
    total = linear_nll(*[leaf.detach() for leaf in leaves], targets)
    assert total.dtype == torch.float64
    assert total.item() == pytest.approx(
        expected.item() * (shape[0] - padding), rel=1e-6
    )


def test_gradcheck_in_float64(monkeypatch):
    monkeypatch.setattr(softmax, "MIN_CHUNK_ROWS", 3)
    monkeypatch.setattr(softmax, "CHUNK_BYTES", 4)
    *leaves, targets = draw_problem(8, 3, 5, padding=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *inputs: linear_cross_entropy(*inputs, targets), leaves
    )


def test_far_apart_logits_give_a_finite_exact_loss():
    x = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [500.0], [-500.0]])
    bias = torch.zeros(3)
    loss = linear_cross_entropy(x, weight, bias, torch.tensor([2, 1]))
    loss.backward()
    assert loss.item() == 500.0  # the mean of 1000 and 0
    assert x.grad.tolist() == [[500.0], [0.0]]


def test_no_target_at_all_costs_nothing():
    *leaves, targets = draw_problem(10, 4, 6, padding=10)
    loss = linear_cross_entropy(*leaves, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert all(leaf.grad.abs().max() == 0.0 for leaf in leaves)


def test_not_a_number_comes_through():
    *leaves, targets = draw_problem(10, 4, 6)
    with torch.no_grad():
        leaves[1][0, 0] = torch.nan
    assert linear_cross_entropy(*leaves, targets).isnan()


@pytest.mark.parametrize("target", [6, -2])
def test_targets_outside_the_vocabulary_are_refused(target):
    *leaves, targets = draw_problem(10, 4, 6)
    targets[3] = target
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(*leaves, targets)


@pytest.mark.parametrize(("rows", "words"), [(1, 10), (700, 10_000), (64, 200_000)])
def test_chunks_cover_all_rows_once(rows, words):
    found = list(chunks(rows, words, torch.device("cpu")))
    covered = [row for part in found for row in range(rows)[part]]
    assert covered == list(range(rows))
    lengths = {part.stop - part.start for part in found}
    assert max(lengths) - min(lengths) <= 1


def test_the_layer_has_one_loss_with_and_without_gradient():
    layer = Softmax(4, 6)
    torch.nn.init.normal_(layer.weight)
    x, _, _, targets = draw_problem(10, 4, 6, padding=3)
    with torch.no_grad():
        without = layer(x, targets)
    assert without.item() == pytest.approx(layer(x, targets).item(), rel=1e-6)
    expected = F.cross_entropy(layer.logits(x), targets, ignore_index=-1)
    assert without.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [8 << 20, 4 * 500 * 128])
@pytest.mark.parametrize("product", [softmax.ONEDNN_LINEAR, None])
def test_under_autocast_it_is_as_exact_as_torchs_own(
    features: torch.dtype,
    chunk_bytes: int,
    product: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(softmax, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(softmax, "PRODUCT", product)
    torch.manual_seed(0)
    N, H, V = 300, 64, 500
    x, W, b = torch.randn(N, H), 0.3 * torch.randn(V, H), 0.1 * torch.randn(V)
    y = torch.randint(V, (N,))
    y[::7] = -1

    def found(loss: Any, *, autocast: bool) -> list[torch.Tensor]:
        kind = features if autocast else torch.float32
        own = [x.to(kind), W.clone(), b.clone()]
        for tensor in own:
            tensor.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(*own)
        return [value, *torch.autograd.grad(value, own)]

    def plain(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, W, b), y, ignore_index=-1)

    def ours(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return softmax.linear_cross_entropy(x, W, b, y)

    exact = found(plain, autocast=False)
    theirs, own = found(plain, autocast=True), found(ours, autocast=True)
    assert [t.dtype for t in own] == [t.dtype for t in theirs]
    for right, their, our in zip(exact, theirs, own, strict=True):
        error, theirs_is = ((v - right).abs().max() for v in (our, their))
        assert error <= 2.0 * theirs_is + 1e-6
        assert error < 0.02 * right.abs().max()


def test_words_in_blocks_are_as_exact_as_all_at_once(monkeypatch):
    monkeypatch.setattr("mpilm.models.softmax.MOST_WORDS", 7)
    *leaves, targets = draw_problem(11, 4, 40)
    inputs = [leaf.detach().double() for leaf in leaves]
    targets[:3] = torch.tensor([0, 39, -1])
    inputs[2][5] = 300.0  # exp of it is no float32, of the rest 0 beside it
    logits = inputs[0] @ inputs[1].T + inputs[2]
    reference = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    found = linear_nll(*(part.float() for part in inputs), targets)
    assert found.item() == pytest.approx(reference.item(), rel=1e-6)
    targets[1] = 40
    with pytest.raises((RuntimeError, IndexError)):
        linear_nll(*(part.float() for part in inputs), targets)
