"""Minibatches of any form, and several that make one step."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from mpilm.errors import DataError, ModelError
from mpilm.learner.learner import Learner
from mpilm.learner.minibatch import moved, samples_of
from mpilm.learner.parts import Parts

X = torch.arange(12.0).view(6, 2) / 10
Y = X.sum(dim=1)


class Pair(NamedTuple):
    x: object
    y: object


@dataclass
class Record:
    x: object
    y: object


@dataclass(frozen=True, slots=True)
class Slotted:
    x: object
    y: object


class Own:
    def __init__(self, x, y):
        self.x, self.y = x, y


class Counted(Own):
    num_samples = 5


class Given:
    """A source of the same minibatch again and again."""

    def __init__(self, *batches):
        self.batches = batches
        self.index = 0

    def next(self):
        self.index += 1
        return self.batches[(self.index - 1) % len(self.batches)]


KINDS = {
    "tuple": ((X, Y), lambda b: b),
    "list": ([X, Y], lambda b: b),
    "dict": ({"x": X, "y": Y}, lambda b: (b["x"], b["y"])),
    "mapping": (UserDict(x=X, y=Y), lambda b: (b["x"], b["y"])),
    "named tuple": (Pair(X, Y), lambda b: (b.x, b.y)),
    "dataclass": (Record(X, Y), lambda b: (b.x, b.y)),
    "with slots": (Slotted(X, Y), lambda b: (b.x, b.y)),
    "object": (Own(X, Y), lambda b: (b.x, b.y)),
    "tensor": (torch.cat([X, Y[:, None]], dim=1), lambda b: (b[:, :2], b[:, 2])),
    "nested": ({"inputs": (X,), "y": [Y, "text"]}, lambda b: (*b["inputs"], b["y"][0])),
    "arrays": ((X.numpy(), Y.numpy()), lambda b: b),
    "arrays and text": (
        (np.array(["a", "b"]), X.numpy(), Y.numpy()),
        lambda b: (b[1], b[2]),
    ),
}


def learner(source, unpack, **settings):
    def loss(model, batch):
        x, y = unpack(batch)
        assert isinstance(x, torch.Tensor)
        return (model(x)[:, 0] - y).square().mean()

    return learner_with(loss, source, **settings)


def learner_with(loss, source, **settings):
    torch.manual_seed(0)
    return Learner(
        nn.Linear(2, 1),
        source,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=loss,
        **settings,
    )


@pytest.mark.parametrize("name", KINDS)
def test_any_minibatch_is_taken(name):
    batch, unpack = KINDS[name]
    one = learner(Given(batch), unpack)
    plain = learner(Given((X, Y)), lambda b: b)
    for _ in range(3):
        assert one.gradient() == plain.gradient()
        one.update(), plain.update()
    assert torch.equal(one.theta, plain.theta)
    rows = 2 if name == "arrays and text" else 6
    assert one.samples == 3 * rows
    assert one.evaluate([batch]).num_targets == rows


def test_samples_are_what_the_minibatch_says_before_what_its_first_tensor_has():
    assert samples_of(Counted(X, Y)) == 5
    assert samples_of({"x": X, "num_samples": 4}) == 4
    assert samples_of((torch.tensor(3.0), X)) == 6


def test_samples_are_what_the_function_says_before_all():
    one = learner(
        Given((X, Y)), lambda b: b, num_samples=lambda batch: batch[0].numel()
    )
    one.gradient()
    assert one.samples == 12
    sums = one.evaluate([(X, Y)])
    assert sums.num_targets == 12


def test_a_minibatch_without_rows_is_refused():
    with pytest.raises(DataError, match="num_samples"):
        samples_of({"x": torch.tensor(1.0), "y": "text"})


def test_several_minibatches_make_the_gradient_of_one_that_holds_all():
    parts = Parts([(X[:1], Y[:1]), (X[1:4], Y[1:4]), (X[4:], Y[4:])])
    one, whole = learner(Given(parts), tuple), learner(Given((X, Y)), tuple)
    seen = []
    loss = one.gradient(seen.append)
    assert loss == pytest.approx(whole.gradient(), rel=1e-6)
    torch.testing.assert_close(one.grad, whole.grad, rtol=1e-6, atol=1e-6)
    assert one.samples == 6
    assert len(seen) == 2  # each segment once, when all are in
    one.gradient(scale=0.5)
    torch.testing.assert_close(one.grad, 0.5 * whole.grad, rtol=1e-6, atol=1e-6)


def test_a_parameter_that_the_last_part_leaves_out_keeps_its_gradient():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

    def loss(model, batch):
        x, part = batch
        return getattr(model, part)(x).square().mean()

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    source = Given(Parts([(X, "a"), (X, "b")]), Parts([(X, "b"), (X, "b")]))
    one = Learner(Halves(), source, sgd, loss=loss)
    one.gradient()
    first = one.grad.clone()
    assert first[one.layout["a.weight"].slice].abs().sum() > 0
    assert first[one.layout["b.weight"].slice].abs().sum() > 0
    one.gradient()  # nothing is left of the first
    assert one.grad[one.layout["a.weight"].slice].abs().sum() == 0


def test_a_loss_may_come_with_the_number_of_wrong_guesses():
    def loss(model, batch):
        x, y = batch
        found = model(x)[:, 0]
        return (found - y).square().mean(), ((found - y).abs() > 1e9).sum() + 2

    one = learner_with(loss, Given((X, Y)))
    one.gradient()
    sums = one.evaluate([(X, Y), (X[:3], Y[:3])])
    assert (sums.num_targets, sums.errors) == (9, 4.0)


def test_an_evaluation_of_a_loss_that_is_no_scalar_is_refused():
    one = learner_with(lambda model, batch: model(batch[0]), Given((X, Y)))
    with pytest.raises(ModelError, match="scalar"):
        one.evaluate([(X, Y)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_type_are_refused_with_what_would_do(dtype):
    with pytest.raises(ModelError, match=r"weight is torch.*model\.float\(\)"):
        Learner(nn.Linear(2, 1, dtype=dtype), None, torch.optim.SGD)


def test_the_samples_of_packed_sequences_are_sequences_and_lengths_stay_on_the_cpu():
    packed = pack_sequence([torch.ones(3, 2), torch.ones(5, 2)], enforce_sorted=False)
    batch = {"packed": packed, "y": torch.zeros(2)}
    assert samples_of(batch) == 2
    elsewhere = torch.device("meta")
    found = moved(batch, lambda tensor: tensor.to(elsewhere), elsewhere)
    assert found["packed"].data.device == found["y"].device == elsewhere
    assert found["packed"].batch_sizes.device == torch.device("cpu")


def test_an_iterable_is_gone_through_again_and_again():
    rows = DataLoader(TensorDataset(X, Y), batch_size=4)
    ours = learner(rows, lambda b: b)
    for _ in range(4):
        ours.gradient()
    assert ours.samples == 12
    ended = learner(iter([(X, Y)]), lambda b: b)
    ended.gradient()
    with pytest.raises(DataError, match="a list_iterator that has ended"):
        ended.gradient()
    for wrong in (3, X, {"x": X}):
        with pytest.raises(DataError, match="give an object with next"):
            learner(wrong, lambda b: b)
