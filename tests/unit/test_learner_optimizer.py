"""The learner's optimiser: settings and moments of every kind, kept, reset, refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn, optim

from mpilm.errors import CheckpointError, ModelError
from mpilm.learner.learner import Learner
from mpilm.storage.state_file import read_state, write_state
from tests.unit.learners import Partly, Points, make_learner, make_model, train

KINDS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "dampened": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: optim.Adam(p, lr=0.01, amsgrad=True),
    "maximize": lambda p: optim.AdamW(p, lr=0.01, maximize=True, foreach=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), fused=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.3),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "asgd": lambda p: optim.ASGD(p, lr=0.01, t0=2),
    "rprop": lambda p: optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
}
BY_SHAPE = {"adafactor"}


def two_groups(parameters, kind=optim.SGD, **settings):
    """Return an optimiser with other settings for matrices than for vectors."""
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    return kind(
        [
            {"params": matrices, "weight_decay": 0.1, **settings},
            {"params": vectors, "weight_decay": 0.0, "lr": 0.05},
        ],
        lr=0.1,
    )


def settings(learner):
    """Return the groups without their parameters, by value."""
    groups = copy.deepcopy(learner.optimizer.param_groups)
    return [{k: v for k, v in g.items() if k != "params"} for g in groups]


@pytest.mark.long
@pytest.mark.parametrize("flat", [None, False])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_to_the_bit_with_every_kind(kind, flat, tmp_path):
    whole = make_learner(optimizer=KINDS[kind], flat=flat)
    train(whole, 3)
    write_state(tmp_path / "state.h5", whole.state())
    losses = train(whole, 3)
    resumed = make_learner(optimizer=KINDS[kind], flat=flat)
    train(resumed, 1)
    resumed.load_state(read_state(tmp_path / "state.h5"))
    assert train(resumed, 3) == losses
    assert torch.equal(resumed.theta, whole.theta)


@pytest.mark.long
@pytest.mark.parametrize("flat", [None, False])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_reset_it_goes_on_as_one_that_begins(kind, flat):
    tired = make_learner(optimizer=KINDS[kind], flat=flat)
    train(tired, 5)
    tired.reset_moments()
    fresh = make_learner(optimizer=KINDS[kind], flat=flat)
    fresh.theta.copy_(tired.theta)
    fresh.batches.load_state(tired.batches.state())
    fresh.model.load_carried(tired.model.carried())
    assert train(tired, 4) == train(fresh, 4)
    assert torch.equal(tired.theta, fresh.theta)


def test_a_reset_before_the_first_step_changes_nothing():
    one, other = (make_learner(optimizer=KINDS["adagrad"]) for _ in range(2))
    one.reset_moments()
    assert train(one, 3) == train(other, 3)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (optim.SGD, {"momentum": 0.7, "nesterov": True, "maximize": True}),
        (optim.AdamW, {"betas": (0.7, 0.9), "eps": 1e-5, "amsgrad": True}),
        (optim.Adam, {"lr": torch.tensor(0.3), "capturable": False, "foreach": False}),
        (optim.RMSprop, {"alpha": 0.5, "centered": True}),
        (optim.Rprop, {"etas": (0.4, 1.3), "step_sizes": (1e-5, 40)}),
    ],
)
def test_every_setting_of_every_group_survives_to_the_bit(kind, given, tmp_path):
    if kind is optim.Rprop:  # it has no weight_decay
        learner = make_learner(optimizer=lambda p: optim.Rprop(p, lr=0.1, **given))
        other = make_learner(optimizer=lambda p: optim.Rprop(p, lr=0.2))
    else:
        learner = make_learner(optimizer=lambda p: two_groups(p, kind, **given))
        other = make_learner(optimizer=lambda p: two_groups(p, kind))
    for number, group in enumerate(learner.optimizer.param_groups):
        group["initial_lr"] = group["max_lr"] = 1 / 3 + number
    expected = settings(learner)
    write_state(tmp_path / "state.h5", learner.state())
    other.load_state(read_state(tmp_path / "state.h5"))
    for mine, theirs in zip(settings(other), expected, strict=True):
        for key in ("foreach", "fused", "capturable"):  # how, not what
            mine.pop(key, None)
            theirs.pop(key, None)
        assert mine == theirs
        assert {k: type(v) for k, v in mine.items()} == {
            k: type(v) for k, v in theirs.items()
        }


def test_rates_of_all_groups_survive_even_if_the_first_is_0():
    def frozen_first(parameters):
        return optim.SGD(
            [{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:]}], lr=0.1
        )

    learner = make_learner(optimizer=frozen_first)
    assert learner.lr == 0.1
    learner.lr = 0.2
    other = make_learner(optimizer=frozen_first)
    other.load_state(learner.state())
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.0, 0.2]
    other.lr = 0.3
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.0, 0.3]


def test_one_cycle_goes_on_where_it_was():
    def trained(state=None):
        learner = make_learner(optimizer=lambda p: optim.SGD(p, lr=0.1, momentum=0.9))
        schedule = optim.lr_scheduler.OneCycleLR(
            learner.optimizer, max_lr=0.5, total_steps=10
        )
        if state:
            learner.load_state(state[0])
            schedule.load_state_dict(state[1])
        else:
            for _ in range(4):
                train(learner, 1)
                schedule.step()
        state = learner.state(), copy.deepcopy(schedule.state_dict())
        found = []
        for _ in range(4):
            found += train(learner, 1)
            group = learner.optimizer.param_groups[0]
            found += [group["lr"], group["momentum"]]
            schedule.step()
        return state, found

    state, whole = trained()
    assert trained(state)[1] == whole
    assert whole[2] != 0.9  # the schedule moves the momentum


def test_settings_may_stay_as_they_are():
    """So the trainer resumes: the configuration decides, not the checkpoint."""
    learner = make_learner(optimizer=KINDS["momentum"])
    train(learner, 2)
    other = make_learner(optimizer=lambda p: optim.SGD(p, lr=0.3, momentum=0.5))
    other.load_state(learner.state(), settings=False)
    assert (other.lr, other.optimizer.param_groups[0]["momentum"]) == (0.3, 0.5)
    moments = other.moments()["momentum_buffer"]
    assert torch.equal(moments, learner.moments()["momentum_buffer"])


# one vector, or the model's own parameters
def test_groups_by_shape_get_the_models_own_parameters():
    learner = make_learner(optimizer=two_groups)
    sizes = [len(group["params"]) for group in learner.optimizer.param_groups]
    assert min(sizes) > 0
    assert sum(sizes) == len(learner.layout.segments)


@pytest.mark.parametrize("kind", KINDS)
def test_elementwise_optimisers_get_one_vector_and_others_do_not(kind):
    learner = make_learner(optimizer=KINDS[kind])
    (group,) = learner.optimizer.param_groups
    shapes = [tuple(parameter.shape) for parameter in group["params"]]
    if kind in BY_SHAPE:
        assert len(shapes) == len(learner.layout.segments)
    else:
        assert shapes == [(learner.layout.size,)]


def test_a_kind_that_is_not_torchs_gets_the_models_own_parameters():
    class Lars(optim.SGD):
        pass

    (group,) = make_learner(optimizer=lambda p: Lars(p, lr=0.1)).optimizer.param_groups
    assert len(group["params"]) > 1


def test_a_function_that_knows_the_model_is_taken_at_its_word():
    model = make_model()
    knowing = make_learner(model, lambda _: optim.SGD(model.parameters(), lr=0.5))
    plain = make_learner(optimizer=lambda p: optim.SGD(p, lr=0.5))
    assert train(knowing, 3) == train(plain, 3)
    assert torch.allclose(knowing.theta, plain.theta, atol=1e-6)


def test_parameters_that_the_optimiser_leaves_out_stay():
    learner = make_learner(optimizer=lambda p: optim.SGD(p[:1], lr=0.5))
    assert not learner.is_plain_sgd
    before = learner.theta.clone()
    train(learner, 2)
    first = learner.layout.segments[0]
    assert not torch.equal(learner.theta[first.slice], before[first.slice])
    assert torch.equal(learner.theta[first.stop :], before[first.stop :])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (optim.LBFGS, "optimiser LBFGS computes gradients itself"),
        (optim.SparseAdam, "optimiser SparseAdam: the gradient here"),
        (lambda p: None, "returned no optimiser but NoneType"),
        (optim.SGD([nn.Parameter(torch.ones(2))], lr=1), "optimizer: of type SGD: giv"),
        (
            lambda p: optim.SGD([*p, nn.Parameter(torch.ones(2))], lr=0.1),
            "1 of its parameters are not among",
        ),
    ],
)
def test_optimisers_that_cannot_be_used_are_refused_at_once(make, line):
    for flat in (None, True, False):
        with pytest.raises(ModelError, match=line):
            make_learner(optimizer=make, flat=flat)


def test_groups_and_flat_contradict_each_other():
    with pytest.raises(ModelError, match="it has groups, but with flat = True"):
        make_learner(optimizer=two_groups, flat=True)


def test_groups_that_come_later_are_refused():
    learner = make_learner(optimizer=two_groups)
    train(learner, 1)
    learner.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    learner.gradient()
    for act in (learner.update, learner.state, lambda: setattr(learner, "lr", 0.1)):
        with pytest.raises(ModelError, match="groups were changed under the Learner"):
            act()


def test_moments_are_vectors_of_real_numbers_only():
    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def loss(self, batch):
            return self.scale.square() * batch.inputs.square().mean()

    learner = Learner(Scalar(), Points(), lambda p: optim.Adam(p, lr=0.1), flat=False)
    train(learner, 1)
    assert sorted(learner.moments()) == ["exp_avg/scale", "exp_avg_sq/scale"]


# states that do not fit
@pytest.mark.parametrize(
    ("saved", "here", "line"),
    [
        ("momentum", "adamw", 'optimizer "SGD" in the checkpoint, here "AdamW"'),
        ("adamw", "momentum", 'optimizer "AdamW" in the checkpoint, here "SGD"'),
        ("adafactor", "adamw", 'optimizer "Adafactor"'),
    ],
)
def test_the_state_of_another_optimiser_is_refused(saved, here, line):
    learner = make_learner(optimizer=KINDS[saved])
    train(learner, 2)
    with pytest.raises(CheckpointError, match=line):
        make_learner(optimizer=KINDS[here]).load_state(learner.state())


@pytest.mark.parametrize("flat", [None, False])
def test_the_state_of_other_groups_or_another_view_is_refused(flat):
    learner = make_learner(optimizer=KINDS["momentum"], flat=flat)
    train(learner, 2)
    state = learner.state()
    other = make_learner(
        optimizer=KINDS["momentum"], flat=False if flat is None else None
    )
    with pytest.raises(CheckpointError, match="optimiser: parameters"):
        other.load_state(state)
    grouped = make_learner(optimizer=two_groups)
    with pytest.raises(CheckpointError, match=r"optimiser: (members|parameters)"):
        grouped.load_state(state)


@pytest.mark.parametrize("name", ["theta", "samples", "optimizer/settings"])
def test_a_state_without_an_entry_is_refused(name):
    learner = Learner(Partly(), Points(), KINDS["momentum"])
    state = learner.state()
    del state[name]
    with pytest.raises(CheckpointError, match=name.split("/")[-1]):
        learner.load_state(state)


def test_a_setting_that_is_no_number_is_refused_by_name():
    learner = make_learner(optimizer=KINDS["momentum"])
    learner.optimizer.param_groups[0]["hook"] = print
    with pytest.raises(CheckpointError, match=r"optimiser: hook = .* cannot be stored"):
        learner.state()
    learner.optimizer.param_groups[0]["hook"] = np.float32(0.5)
    assert json.loads(learner.state()["optimizer/settings"])["groups"][0]["hook"] == 0.5


def test_groups_in_another_order_than_the_parameters_are_resumed_to_the_bit():
    """Torch counts parameters through the groups, the learner through the model."""

    def by_shape(parameters):
        groups = [[p for p in parameters if p.ndim == n] for n in (1, 2)]
        return optim.AdamW([{"params": group} for group in groups], lr=0.1)

    def square():  # all parameters of one size would fit anywhere
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def loss(model, batch):
        return model(batch.inputs).square().mean()

    whole = Learner(square(), Points(), by_shape, loss=loss)
    for _ in range(3):
        whole.gradient(), whole.update()
    resumed = Learner(square(), Points(), by_shape, loss=loss)
    resumed.load_state(whole.state())
    for learner in (whole, resumed):
        for _ in range(3):
            learner.gradient(), learner.update()
    assert torch.equal(whole.theta, resumed.theta)
