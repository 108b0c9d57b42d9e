"""The learner: flat views, notifications, updates."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import nn

from mpilm.data.batch import Batch
from mpilm.data.streams import Streams
from mpilm.learner.learner import Learner
from mpilm.learner.parameters import ModelError
from mpilm.learner.threads import use_threads
from tests.unit.learners import (
    TOKENS,
    VOCAB,
    Partly,
    Points,
    adamw,
    make_learner,
    make_model,
    sgd,
    train,
)


def assert_views(learner):
    """Every parameter and every .grad is a view of the flat vector."""
    assert learner.theta.is_contiguous()
    assert learner.grad.is_contiguous()
    for segment in learner.layout:
        parameter = learner.model.get_parameter(segment.name)
        for tensor, flat in [
            (parameter, learner.theta),
            (parameter.grad, learner.grad),
        ]:
            assert tensor.shape == segment.shape
            assert tensor.is_contiguous()
            assert tensor.data_ptr() == flat[segment.slice].data_ptr(), segment.name


def test_building_keeps_values_and_names():
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = make_learner(model)
    assert {segment.name for segment in learner.layout} == set(before)
    assert learner.layout.size == sum(p.numel() for p in before.values())
    for segment in learner.layout:
        flat = learner.theta[segment.slice].view(segment.shape)
        assert torch.equal(flat, before[segment.name])


def test_numpy_computes_with_the_threads_of_the_rank_too():
    """Its BLAS takes every core of itself, on every rank of a node."""
    with threadpool_limits():  # as it was, afterwards
        for number in (1, 2):
            use_threads(number)
            libraries = threadpool_info()
            blas = [one for one in libraries if one["user_api"] == "blas"]
            assert blas
            assert {one["num_threads"] for one in blas} == {number}
            assert torch.get_num_threads() == number
    torch.set_num_threads(1)


def test_components_are_embedding_lstm_layers_and_softmax():
    layout = make_learner().layout
    assert list(layout.components) == ["embedding", "lstm.l0", "lstm.l1", "softmax"]
    covered = [s for slices in layout.components.values() for s in slices]
    assert sum(s.stop - s.start for s in covered) == layout.size


def test_the_order_is_torchs_but_for_cudnns_weights_before_biases():
    names = [segment.name for segment in make_learner().layout]
    assert names == [
        "embedding.weight",
        *(f"lstm.weight_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")),
        *(f"lstm.bias_{kind}_l{layer}" for layer in (0, 1) for kind in ("ih", "hh")),
        "softmax.weight",
        "softmax.bias",
    ]
    both_ways = Learner(nn.LSTM(2, 3, bidirectional=True), None, sgd).layout
    assert [segment.name for segment in both_ways] == [
        *(
            "weight_ih_l0",
            "weight_hh_l0",
            "weight_ih_l0_reverse",
            "weight_hh_l0_reverse",
        ),
        *("bias_ih_l0", "bias_hh_l0", "bias_ih_l0_reverse", "bias_hh_l0_reverse"),
    ]
    assert list(both_ways.components) == ["l0"]


def test_tied_weights_have_one_segment():
    learner = make_learner(make_model(tied=True))
    names = [segment.name for segment in learner.layout]
    assert names.count("embedding.weight") == 1
    assert "softmax.weight" not in names
    assert "projection" in learner.layout.components
    learner.gradient()
    assert_views(learner)
    weight = learner.model.softmax.weight
    assert weight.data_ptr() == learner.theta.data_ptr()


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("flat", [True, False])
def test_views_stay_views(optimizer, flat):
    learner = make_learner(optimizer=optimizer, flat=flat)
    train(learner, 2)
    assert_views(learner)
    learner.load_state(learner.state())
    train(learner, 1)
    assert_views(learner)
    learner.model.to("cpu").float()
    learner.model.train().requires_grad_()
    learner.model.load_state_dict(make_model().state_dict())
    assert learner.theta[0] == make_model().embedding.weight[0, 0]
    train(learner, 1)
    assert_views(learner)


def test_dropped_gradients_come_back():
    learner, undisturbed = make_learner(), make_learner()
    for _ in range(3):
        learner.gradient()
        learner.model.zero_grad(set_to_none=True)
        learner.optimizer.zero_grad(set_to_none=True)
        learner.update()
    train(undisturbed, 3)
    assert torch.equal(learner.theta, undisturbed.theta)
    assert_views(learner)


@pytest.mark.parametrize(
    "leave",
    [
        lambda model: model.double(),
        lambda model: model.load_state_dict(make_model().state_dict(), assign=True),
        lambda model: setattr(model.softmax, "bias", nn.Parameter(torch.ones(VOCAB))),
    ],
)
def test_a_module_that_left_the_vector_is_refused_by_name(leave):
    learner = make_learner()
    train(learner, 1)
    leave(learner.model)
    with pytest.raises(
        Exception, match=r"parameter \w+\.\w+ left the learner's vector"
    ):
        learner.gradient()
    with pytest.raises(ModelError, match="left the learner's vector"):
        learner.state()


def test_parameters_that_share_memory_unnoticed_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ModelError, match=r"0\.weight and 1\.weight share memory"):
        Learner(model, None, sgd)


def test_other_precisions_and_empty_models_are_refused():
    with pytest.raises(ModelError, match=r"parameter 0\.weight is torch\.float64"):
        Learner(nn.Sequential(nn.Linear(2, 2).double()), None, sgd)
    with pytest.raises(ModelError, match="no trainable parameters"):
        Learner(nn.ReLU(), None, sgd)


def test_gradient_is_that_of_plain_torch():
    plain = make_model(dropout=0.0)
    learner = make_learner(copy.deepcopy(plain))
    batches = Streams(TOKENS, 4, 5)
    for _ in range(3):
        batch = Batch(
            *(torch.as_tensor(x) if hasattr(x, "shape") else x for x in batches.next())
        )
        plain.zero_grad()
        expected = plain.loss(batch)
        expected.backward()
        assert learner.gradient() == expected.item()
        for segment in learner.layout:
            gradient = plain.get_parameter(segment.name).grad.view(-1)
            assert torch.equal(learner.grad[segment.slice], gradient), segment.name
    assert learner.samples == 3 * 4 * 5


@pytest.mark.parametrize("tied", [False, True])
def test_each_segment_is_announced_once_when_it_is_final(tied):
    learner = make_learner(make_model(tied=tied))
    announced = []

    def ready(where):
        announced.append((where, learner.grad[where].clone()))

    learner.gradient()
    learner.gradient(ready)
    assert len(announced) == len(learner.layout.segments)
    assert {where.start for where, _ in announced} == {
        segment.start for segment in learner.layout
    }
    for where, then in announced:
        assert torch.equal(learner.grad[where], then)
    order = [where.start for where, _ in announced]
    position = {s.name: order.index(s.start) for s in learner.layout}
    assert position["softmax.bias"] < position["lstm.weight_hh_l1"]
    assert position["lstm.weight_hh_l1"] < position["lstm.weight_hh_l0"]
    assert position["embedding.weight"] == len(order) - 1


def test_parameters_without_gradient_are_zero_and_announced_last():
    learner = Learner(Partly(), Points(), sgd)
    learner.grad.fill_(7.0)
    order = []
    learner.gradient(order.append)
    unused = learner.layout["unused"]
    assert order[-1] == unused.slice
    assert len(order) == len(learner.layout.segments)
    assert learner.grad[unused.slice].tolist() == [0.0, 0.0, 0.0]
    assert "frozen.weight" not in [segment.name for segment in learner.layout]


def test_a_failing_loss_or_callback_leaves_the_learner_usable():
    learner, undisturbed = make_learner(), make_learner()

    def fail(_):
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        learner.gradient(fail)
    learner.model.loss(  # the module's own backward announces nothing
        Batch(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4).long(), 8, True)
    ).backward()
    undisturbed.gradient()
    undisturbed.model.load_carried(learner.model.carried())
    announced = []
    learner.gradient(announced.append)
    undisturbed.gradient()
    assert len(announced) == len(learner.layout.segments)
    assert torch.equal(learner.grad, undisturbed.grad)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_update_on_the_flat_vector_is_that_of_torch(optimizer):
    learner, separate = make_learner(optimizer=optimizer), make_model()
    own = optimizer(list(separate.parameters()))
    for _ in range(4):
        learner.gradient()
        for segment in learner.layout:
            gradient = learner.grad[segment.slice].view(segment.shape).clone()
            separate.get_parameter(segment.name).grad = gradient
        learner.update()
        own.step()
    for segment in learner.layout:
        flat = learner.theta[segment.slice].view(segment.shape)
        assert torch.allclose(flat, separate.get_parameter(segment.name), atol=1e-7)


def test_flat_and_separate_optimisers_agree():
    flat, separate = make_learner(), make_learner(flat=False)
    train(flat, 3)
    train(separate, 3)
    assert torch.allclose(flat.theta, separate.theta, atol=1e-6)
    moment = flat.moments()["momentum_buffer"]
    for segment in separate.layout:
        part = separate.moments()[f"momentum_buffer/{segment.name}"]
        assert torch.allclose(moment[segment.slice], part, atol=1e-6)


def test_moments_are_the_optimisers_own_memory():
    learner = make_learner()
    assert learner.moments() == {}
    train(learner, 1)
    (moment,) = learner.moments().values()
    assert torch.equal(moment, learner.grad)
    moment *= 0.0
    theta = learner.theta.clone()
    learner.gradient()
    learner.update()
    assert torch.allclose(learner.theta, theta - 0.5 * learner.grad)
    adam = make_learner(optimizer=adamw)
    train(adam, 1)
    assert set(adam.moments()) == {"exp_avg", "exp_avg_sq"}
    assert all(m.shape == (adam.layout.size,) for m in adam.moments().values())


def test_learning_rate_is_set_in_all_groups_in_proportion():
    def two_groups(parameters):
        first, *rest = parameters
        slow = {"params": [first], "lr": 0.1}
        return torch.optim.SGD([{"params": rest}, slow], lr=1.0)

    learner = make_learner(optimizer=two_groups, flat=False)
    learner.lr = 0.0
    learner.lr = 0.5
    assert learner.lr == 0.5
    rates = [group["lr"] for group in learner.optimizer.param_groups]
    assert rates == pytest.approx([0.5, 0.05])


def test_changing_theta_in_place_changes_the_model():
    learner = make_learner()
    learner.theta *= 0.0
    learner.theta += 2.0
    assert all((p == 2.0).all() for p in learner.model.parameters())


def test_training_learns_a_cycle():
    tokens = np.tile(np.arange(VOCAB, dtype=np.uint16), 60)
    learner = Learner(make_model(embed=16, hidden=32), Streams(tokens, 4, 10), adamw)
    learner.lr = 0.02
    losses = train(learner, 150)
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.2)
    assert losses[-1] < 0.1


def test_compute_runs_the_work_and_passes_ready_on():
    calls = []

    def compute(work, ready=None):
        parts = []
        loss = work(parts.append)
        calls.append((len(parts), ready))
        for part in parts if ready else ():
            ready(part)
        return loss

    announced = []
    learner = make_learner(compute=compute)
    learner.gradient()
    learner.gradient(announced.append)
    num_segments = len(learner.layout.segments)
    assert [call[0] for call in calls] == [num_segments, num_segments]
    assert len(announced) == num_segments
