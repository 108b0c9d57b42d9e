"""What a step is made of, on the card and on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpilm import vectors
from mpilm.data.streams import Streams
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from mpilm.models.sampled_softmax import SampledSoftmax
from mpilm.models.softmax import linear_cross_entropy, linear_nll
from mpilm.optim.build import clip_

TOKENS = np.random.default_rng(0).integers(0, 200, 5000).astype(np.uint16)


@pytest.mark.parametrize("vocab", [50, 1024, 1500, 40_000])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_fused_softmax_is_torchs(cuda: str, vocab: int, autocast: bool) -> None:
    """Kernels differ below and above 1024 columns; the softmax overwrites its input."""
    torch.manual_seed(0)
    x = torch.randn(70, 32)
    W, b = 0.3 * torch.randn(vocab, 32), 0.1 * torch.randn(vocab)
    y = torch.randint(vocab, (70,))
    y[::9] = -1

    def gradients(loss: Any, device: str, *, autocast: bool) -> list[torch.Tensor]:
        own = [t.to(device).requires_grad_() for t in (x, W, b)]
        with torch.autocast(device[:4], torch.bfloat16, enabled=autocast):
            value = loss(*own, y.to(device))
        return [value.cpu(), *(g.cpu() for g in torch.autograd.grad(value, own))]

    def plain(x: Any, W: Any, b: Any, y: Any) -> torch.Tensor:
        return F.cross_entropy(F.linear(x, W, b), y, ignore_index=-1)

    right = gradients(plain, "cpu", autocast=False)
    found = gradients(linear_cross_entropy, cuda, autocast=autocast)
    theirs = gradients(plain, cuda, autocast=autocast)
    for r, f, t in zip(right, found, theirs, strict=True):
        scale = r.abs().max()
        assert (f - r).abs().max() <= 2.0 * (t - r).abs().max() + 1e-4 * scale
    nll = linear_nll(x.to(cuda), W.to(cuda), b.to(cuda), y.to(cuda))
    assert nll.item() == pytest.approx(right[0].item() * int((y >= 0).sum()), rel=1e-4)


def make_learner(device: str, kind: str = "sgd", *, sparse: bool = True) -> Learner:
    torch.manual_seed(1)

    def softmax(num_inputs: int, num_words: int) -> SampledSoftmax:
        return SampledSoftmax(  # all words: nothing is drawn, so devices agree
            num_inputs,
            num_words,
            num_frequent=50,
            num_random=num_words,
            sparse=True,
        )

    extra: Any = {"softmax": softmax, "sparse": True} if sparse else {}
    model = LstmLm(200, embed=16, hidden=24, layers=2, **extra)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        if kind == "adamw":
            return torch.optim.AdamW(parameters, lr=0.01, fused=True)
        more = {"momentum": 0.9, "weight_decay": 1e-3} if kind == "momentum" else {}
        return torch.optim.SGD(parameters, lr=0.5, fused=True, **more)

    batches = Streams(TOKENS, 4, 10)
    return Learner(model, batches, optimizer, device=device, flat=True, sparse=sparse)


def train(learner: Learner, num_steps: int = 6) -> list[float]:
    losses = []
    for _ in range(num_steps):
        losses.append(float(learner.gradient()))
        learner.update()
    return losses


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("sparse", [False, True])
def test_rows_and_lazy_updates_are_those_of_the_cpu(
    cuda: str, kind: str, sparse: bool
) -> None:
    gpu = make_learner(cuda, kind, sparse=sparse)
    cpu = make_learner("cpu", kind, sparse=sparse)
    assert train(gpu) == pytest.approx(train(cpu), rel=2e-3)
    assert gpu.theta.device.type == "cuda"
    assert all(m.device == gpu.theta.device for m in gpu.moments().values())
    difference = (gpu.theta.cpu() - cpu.theta).abs().max()
    assert difference < 0.02 * cpu.theta.abs().max()


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("where", ["dense", "rows"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(
    cuda: str, kind: str, sparse: bool, where: str, value: float
) -> None:
    if where == "rows" and not sparse:
        pytest.skip("there are no rows")
    learner = make_learner(cuda, kind, sparse=sparse)
    train(learner, 2)
    before = learner.state()
    learner.gradient()
    spoilt = learner.grad
    if where == "rows":
        spoilt = next(iter(learner.rows.values())).values.view(-1)
    spoilt[len(spoilt) // 2] = value
    learner.update()
    after = learner.state()
    assert learner.skipped
    may_move = ("samples", "batches/", "random/", "carried/")
    for key in before:
        if not key.startswith(may_move):
            assert np.array_equal(before[key], after[key]), key
    assert all(map(np.isfinite, train(learner, 2)))
    learner.settle()
    assert not learner.skipped
    assert learner.checked.num_left_out == 1


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_gradients_taken_at_once_are_those_taken_one_by_one(
    cuda: str, scale: float, sparse: bool
) -> None:
    """Whoever waits for segments gets them as they come; else one kernel copies all."""
    learners = [make_learner(cuda, sparse=sparse) for _ in range(2)]
    ready: list[slice] = []
    for _ in range(3):
        losses = [
            float(learners[0].gradient(scale=scale)),
            float(learners[1].gradient(ready.append, scale=scale)),
        ]
        assert losses[0] == losses[1]
        assert torch.equal(learners[0].grad, learners[1].grad)
        assert learners[0].grad.abs().max() > 0.0
        for name, rows in learners[0].rows.items():
            assert torch.equal(rows.ids, learners[1].rows[name].ids)
            assert torch.equal(rows.values, learners[1].rows[name].values)
        for learner in learners:
            learner.update()
    assert ready


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_state_goes_from_device_to_device(cuda: str, kind: str, sparse: bool) -> None:
    for one, other in ((cuda, "cpu"), ("cpu", cuda), (cuda, cuda)):
        first = make_learner(one, kind, sparse=sparse)
        train(first)
        second = make_learner(other, kind, sparse=sparse)
        second.load_state(first.state())
        assert second.theta.device.type == other[:4]
        assert torch.equal(first.theta.cpu(), second.theta.cpu())
        moments = second.moments()
        for name, moment in first.moments().items():
            assert torch.equal(moment.cpu(), moments[name].cpu())
            assert moments[name].device.type == other[:4]
        exact = one == other
        losses = train(first), train(second)
        assert losses[0] == (losses[1] if exact else pytest.approx(losses[1], rel=2e-3))


def test_a_norm_is_clipped_without_a_look_at_it(cuda: str) -> None:
    vectors_ = [torch.tensor([3.0], device=cuda), torch.tensor([4.0], device=cuda)]
    assert clip_(vectors_, 1.0).item() == pytest.approx(5.0)
    assert [v.item() for v in vectors_] == pytest.approx([0.6, 0.8])


def test_vectors_stay_where_they_are(cuda: str) -> None:
    vector = torch.arange(10.0, device=cuda)
    assert len(list(vectors.chunked(torch.zeros(1 << 18, device=cuda)))) == 1
    assert vectors.copy_of(vector).device == vector.device
    assert vectors.zeros(3, vector).device == vector.device
    assert vectors.end_to_end([vector, vector]).device == vector.device
    assert vectors.is_finite(vector)
    assert not vectors.is_finite(vector / 0.0)
    vectors.fill_(vector, np.ones(10, np.float32))
    assert vectors.to_array(vector).tolist() == [1.0] * 10
    table, ids = vector.view(5, 2), np.array([1, 3])
    vectors.set_rows_(table, ids, torch.zeros(2, 2, device=cuda))
    assert vectors.rows_at(table, ids).sum().item() == 0.0


def test_a_learners_card_is_the_current_one(cuda: str) -> None:
    """Of two cards: DLPack refuses tensors of the other, cuDNN mistakes its state."""
    last = torch.cuda.device_count() - 1
    learner = make_learner(f"cuda:{last}")
    assert torch.cuda.current_device() == last
    train(learner, 2)
    torch.cuda.set_device(0)
