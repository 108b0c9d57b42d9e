"""What changes under a learner, or cannot be trained, is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpilm.errors import CheckpointError, ModelError
from mpilm.learner.learner import Learner
from mpilm.storage.state_file import read_state, write_state
from tests.unit.learners import (
    Partly,
    Points,
    make_learner,
    make_model,
    sgd,
    train,
)


def partly():
    torch.manual_seed(3)
    return Learner(Partly(), Points(), sgd)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: m.frozen.requires_grad_(), r"frozen\.weight was made trainable"),
        (lambda m: m.used.bias.requires_grad_(False), r"used\.bias was frozen"),
        (lambda m: m.add_module("head", nn.Linear(2, 1)), r"head\.weight was added"),
        (lambda m: m.register_parameter("a", nn.Parameter(torch.ones(1))), "a was ad"),
        (lambda m: setattr(m, "used", nn.Linear(2, 1)), r"used\.weight was added"),
        (lambda m: delattr(m, "used"), r"used\.weight was removed"),
        (lambda m: delattr(m, "unused"), r"unused left the learner's vector"),
        (lambda m: setattr(m, "unused", None), r"unused left the learner's vector"),
        (lambda m: m.double(), r"unused left the learner's vector"),
        (lambda m: m.bfloat16(), r"unused left the learner's vector"),
        (lambda m: m.to("meta"), r"unused left the learner's vector"),
        (lambda m: Learner(m, None, sgd), r"and one Learner of a model"),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_a_change_under_the_learner_is_refused_by_name(change, line, trained):
    learner = partly()
    if trained:
        train(learner, 1)
    change(learner.model)
    with pytest.raises(ModelError, match=line):
        learner.gradient()
    with pytest.raises(ModelError, match=line):
        learner.state()
    with pytest.raises(ModelError, match=line):
        learner.evaluate([])


def test_changes_that_leave_the_parameters_alone_are_none():
    learner, undisturbed = partly(), partly()
    train(learner, 1)
    learner.model.add_module("cache", nn.Identity())
    learner.model.frozen.double().float()
    learner.model.frozen = learner.model.frozen
    learner.model.register_buffer("extra", torch.ones(2))
    learner.model.add_module("fixed", nn.Linear(2, 2).requires_grad_(False))
    train(undisturbed, 1)
    assert train(learner, 3) == train(undisturbed, 3)
    learner.model.fixed.requires_grad_()
    with pytest.raises(ModelError, match=r"fixed\.weight was made trainable"):
        learner.gradient()


def test_a_parameter_frozen_by_the_loss_itself_is_named():
    def loss(model, batch):
        model.used.bias.requires_grad_(False)
        return model.loss(batch)

    learner = Learner(Partly(), Points(), sgd, loss=loss)
    with pytest.raises(ModelError, match=r"used\.bias was frozen"):
        learner.gradient()


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (lambda m, b: 3.0, "the loss is of type float, not a tensor"),
        (lambda m, b: None, "the loss is of type NoneType"),
        (lambda m, b: m.norm(b.inputs), r"the loss has shape \(8, 2\)"),
        (lambda m, b: m.loss(b).detach(), "the loss depends on no parameter"),
        (
            lambda m, b: torch.ones(1, requires_grad=True).sum(),
            "the loss depends on no parameter",
        ),
        (
            lambda m, b: torch.no_grad()(m.loss)(b),
            "the loss depends on no parameter",
        ),
    ],
)
def test_a_loss_that_cannot_be_differentiated_is_refused(loss, line):
    learner = Learner(Partly(), Points(), sgd, loss=loss)
    with pytest.raises(ModelError, match=line):
        learner.gradient()


def test_a_loss_of_one_element_or_that_is_nan_is_returned():
    plain = partly()
    loss = plain.gradient()
    for factor in (1.0, np.nan):

        def odd(model, batch, factor=factor):
            return model.loss(batch).view(1) * factor

        torch.manual_seed(3)
        learner = Learner(Partly(), Points(), sgd, loss=odd)
        assert learner.gradient() == pytest.approx(loss * factor, nan_ok=True)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (nn.Sequential(nn.ReLU()), "no trainable parameters"),
        (nn.Linear(2, 2).requires_grad_(False), "no trainable parameters"),
        (nn.ParameterList([torch.zeros(0, 2)]), "no trainable parameters"),
        (nn.Linear(2, 2).bfloat16(), "weight is torch.bfloat16"),
        (nn.LazyLinear(2), "weight has no shape yet"),
        (nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)), "no shape"),
        (nn.Linear(2, 2, device="meta"), "weight has no memory yet"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(model, line):
    with pytest.raises(ModelError, match=line):
        Learner(model, None, sgd)


@pytest.mark.parametrize("kind", ["part", "buffer", "frozen"])
def test_memory_shared_in_part_is_refused(kind):
    model = nn.Linear(3, 3)
    part = model.weight.data[1:]
    if kind == "buffer":
        model.register_buffer("other", part)
    else:
        model.other = nn.Parameter(part, requires_grad=kind == "part")
    with pytest.raises(ModelError, match="weight and other share memory"):
        Learner(model, None, sgd)


def test_columns_of_one_matrix_share_no_memory():
    memory = torch.ones(4, 6)
    model = nn.Module()
    model.left, model.right = (nn.Parameter(part) for part in memory.split(3, dim=1))
    learner = Learner(model, None, sgd)
    assert learner.layout.size == 24


def test_parameters_without_elements_are_left_alone():
    class Gap(Partly):
        def __init__(self):
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(0, 3))
            self.also_nothing = nn.Parameter(torch.zeros(2, 0))

    learner = Learner(Gap(), Points(), sgd)
    train(learner, 2)
    assert all(segment.size for segment in learner.layout)
    learner.load_state(learner.state())
    train(learner, 1)
    assert learner.model.nothing.requires_grad


@pytest.mark.parametrize("flat", [None, False])
def test_sparse_gradients_train_like_dense_ones(flat):
    class Words(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(9, 3, sparse=sparse)

        def loss(self, batch):
            return self.words(torch.tensor([1, 1, 5])).square().mean()

    sparse, dense = (
        Learner(Words(kind), Points(), sgd, flat=flat) for kind in (True, False)
    )
    assert train(sparse, 3) == train(dense, 3)
    assert torch.equal(sparse.theta, dense.theta)


# state outside theta
def make_rich():
    torch.manual_seed(4)
    model = Partly()
    model.register_buffer("brain", torch.rand(3).bfloat16())
    model.register_buffer("eighth", torch.rand(3).to(torch.float8_e4m3fn))
    model.register_buffer("wave", torch.rand(2, 2, dtype=torch.complex64))
    model.register_buffer("mask", torch.rand(4) > 0.5)
    model.register_buffer("position", torch.arange(3).expand(2, 3))
    model.register_buffer("later", None)
    return model


def test_buffers_of_any_type_are_in_the_state_to_the_bit(tmp_path):
    learner = Learner(make_rich(), Points(), sgd)
    train(learner, 1)
    write_state(tmp_path / "state.h5", learner.state())
    model = make_rich()
    for buffer in model.buffers():
        if buffer.is_contiguous():
            buffer.zero_()
    other = Learner(model, Points(), sgd)
    other.load_state(read_state(tmp_path / "state.h5"))
    expected = learner.model.state_dict()
    for name, value in other.model.state_dict().items():
        assert value.dtype == expected[name].dtype
        real, wanted = (
            torch.view_as_real(x) if x.is_complex() else x.float()
            for x in (value, expected[name])
        )
        assert torch.equal(real, wanted), name


def test_carried_state_of_any_type_is_in_the_state(tmp_path):
    class Carrying(Partly):
        held = (torch.rand(2, 3).bfloat16(), torch.rand(2), torch.tensor([True]))

        def carried(self):
            return self.held

        def load_carried(self, parts):
            self.held = parts

    learner = Learner(Carrying(), Points(), sgd)
    write_state(tmp_path / "state.h5", learner.state())
    learner.model.held = ()
    learner.load_state(read_state(tmp_path / "state.h5"))
    for got, want in zip(learner.model.held, Carrying.held, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s.pop("model/norm.running_mean"), "the checkpoint has no norm.runn"),
        (lambda s: s.update({"model/x": np.ones(2)}), "this model has no x"),
        (
            lambda s: s.update({"model/norm.running_mean": np.ones(3, np.float32)}),
            r"running_mean: torch.float32 \(3,\) in the checkpoint, here .* \(2,\)",
        ),
        (
            lambda s: s.update({"model/norm.running_mean": np.ones(2)}),
            r"running_mean: torch.float64 \(2,\) in the checkpoint",
        ),
        (
            lambda s: s.update({"model/brain": np.ones(3, np.uint8)}),
            r"brain: torch.uint8 \(3,\) in the checkpoint, here torch.bfloat16",
        ),
    ],
)
def test_a_state_of_other_buffers_is_refused_by_name(change, line):
    learner = Learner(make_rich(), Points(), sgd)
    state = learner.state()
    change(state)
    train(learner, 1)
    theta = learner.theta.clone()
    with pytest.raises(CheckpointError, match=line):
        learner.load_state(state)
    assert torch.equal(learner.theta, theta)  # nothing was taken up
    assert learner.samples == 8


def test_a_sparse_buffer_is_refused_by_name():
    model = Partly()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    learner = Learner(model, Points(), sgd)
    train(learner, 1)
    learner.evaluate([Points().next()])
    with pytest.raises(ModelError, match=r"buffer graph .* cannot be sent or stored"):
        learner.state()


# minibatches without a place of their own
class Endless:
    """The batch class of docs/library.md: only next()."""

    def next(self):
        return Points().next()


def test_minibatches_need_no_state():
    learner = Learner(Partly(), Endless(), sgd)
    train(learner, 2)
    state = learner.state()
    assert not [name for name in state if name.startswith("batches")]
    other = Learner(Partly(), Endless(), sgd)
    other.load_state(state)
    assert train(other, 2) == train(learner, 2)


def test_a_place_in_the_data_that_nobody_takes_up_is_refused():
    state = partly().state()
    with pytest.raises(
        CheckpointError, match="batches: the checkpoint has their place"
    ):
        Learner(Partly(), Endless(), sgd).load_state(state)


def test_evaluating_puts_buffers_back():
    class Counting(Partly):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor(0))

        def loss(self, batch):
            self.count = self.count + 1
            return super().loss(batch)

    learner = Learner(Counting(), Points(), sgd)
    train(learner, 2)
    learner.evaluate([Points().next()] * 3)
    assert learner.model.count == 2


def test_evaluating_draws_no_minibatch_and_checks_first():
    learner = make_learner(make_model())
    learner.model.softmax.bias.requires_grad_(False)
    with pytest.raises(ModelError, match=r"softmax\.bias was frozen"):
        learner.evaluate([])
