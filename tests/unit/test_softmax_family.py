"""Sampled and adaptive softmax against the full one; what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mpilm.config import resolve
from mpilm.convert import Choice
from mpilm.data.batch import Batch
from mpilm.errors import ConfigError
from mpilm.learner.learner import Learner
from mpilm.models.adaptive_softmax import AdaptiveSoftmax
from mpilm.models.build import build_model, require_sample
from mpilm.models.configs import LstmLmConfig
from mpilm.models.sampled_softmax import LogUniform, SampledSoftmax
from mpilm.models.softmax import Softmax
from mpilm.train.run import make_learner

CPU = torch.device("cpu")
V, H, N = 60, 8, 40


def draw_problem(num_words=V, *, padding=5):
    generator = torch.Generator().manual_seed(num_words)
    x = torch.randn(N, H, generator=generator)
    targets = (num_words * torch.rand(N, generator=generator) ** 3).long()
    targets[torch.randperm(N, generator=generator)[:padding]] = -1
    return x.requires_grad_(), targets


def filled(layer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return layer


def gradients(layer, x, targets):
    for leaf in (x, *layer.parameters()):
        leaf.grad = None
    loss = layer(x, targets)
    loss.backward()
    leaves = (x, *layer.parameters())
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    return loss.item(), [g.to_dense() if g.is_sparse else g for g in found]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("frequent", "random"), [(V, 0), (0, V), (7, V - 7), (7, V)])
def test_the_whole_vocabulary_as_sample_is_the_full_softmax(frequent, random, sparse):
    x, targets = draw_problem()
    expected, full = gradients(filled(Softmax(H, V)), x, targets)
    layer = filled(
        SampledSoftmax(H, V, num_frequent=frequent, num_random=random, sparse=sparse)
    )
    loss, found = gradients(layer, x, targets)
    assert loss == pytest.approx(expected, rel=1e-6)
    for got, exact in zip(found, full, strict=True):
        assert (got - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_recent_targets_are_certain_until_others_took_their_place():
    layer = SampledSoftmax(H, V, num_frequent=2, num_random=0, num_recent=3)
    certain = []
    for targets in ([9, -1], [8, 7], [9, 6], [5, 5, 5, 4]):
        ids, log_pi, places = layer.sample(torch.tensor(targets))
        assert not log_pi.any()
        kept = torch.tensor(targets) != -1
        assert ids[places[kept]].tolist() == [t for t in targets if t != -1]
        certain.append(ids.tolist())
    assert certain == [
        [0, 1, 9],
        [0, 1, 7, 8, 9],
        [0, 1, 6, 7, 8, 9],
        [0, 1, 4, 5, 6, 7, 9],
    ]
    assert layer.recent.tolist() == [5, 5, 4]


@pytest.mark.long
@pytest.mark.parametrize(("frequent", "random"), [(0, 30), (5, 12), (5, 40), (50, 3)])
def test_words_are_drawn_as_often_as_is_said(frequent, random):
    sampler = LogUniform(V, num_frequent=frequent, num_random=random)
    torch.manual_seed(0)
    num_draws, seen = 4000, torch.zeros(V)
    for _ in range(num_draws):
        ids = sampler.draw(CPU)
        assert (ids[1:] >= ids[:-1]).all()
        seen[ids.unique()] += 1
    words = torch.arange(frequent, V)
    p = sampler.log_probability(words).exp()
    error = (seen[frequent:] / num_draws - p).abs()
    assert (error <= 5 * (p * (1 - p) / num_draws).sqrt() + 1e-6).all()
    assert seen[:frequent].sum() == 0
    assert 0.5 * random < p.sum() <= random * (1 + 1e-9)
    assert sampler.log_probabilities(CPU).exp()[frequent:].allclose(p.float())
    assert (sampler.log_probabilities(CPU)[:frequent] == 0.0).all()


def test_no_word_stands_twice_and_every_target_stands_in_the_sample():
    _, targets = draw_problem()
    layer = filled(SampledSoftmax(H, V, num_frequent=4, num_random=20))
    for seed in range(50):
        torch.manual_seed(seed)
        ids, log_pi, places = layer.sample(targets)
        assert (ids[1:] > ids[:-1]).all()
        is_target = targets != -1
        assert torch.equal(ids[places[is_target]], targets[is_target])
        assert (places[~is_target] == -1).all()
        certain = torch.cat([torch.arange(4), targets[is_target]]).unique()
        assert (log_pi[torch.isin(ids, certain)] == 0.0).all()
        assert (log_pi[~torch.isin(ids, certain)] <= 0.0).all()
        assert (log_pi < 0.0).any()
        assert torch.isin(certain, ids).all()


@pytest.mark.long
def test_the_estimate_of_the_sum_over_all_words_has_its_mean():
    x, targets = draw_problem()
    layer = filled(SampledSoftmax(H, V, num_frequent=4, num_random=15))
    logits = layer.logits(x).double()
    torch.manual_seed(0)
    estimates = []
    for _ in range(2000):
        ids, log_pi, _ = layer.sample(targets)
        estimates.append((logits[:, ids] - log_pi).exp().sum(1))
    found = torch.stack(estimates)
    error = (found.mean(0) - logits.exp().sum(1)).abs()
    assert (error <= 5 * found.std(0) / math.sqrt(len(found)) + 1e-9).all()


@pytest.mark.long
@pytest.mark.parametrize(("random", "bound"), [(50, 0.08), (400, 0.03)])
def test_the_mean_gradient_approaches_the_full_one(random, bound):
    """What is left is the bias of a ratio, which falls with the sample's size.

    Measured here, of V = 1000: 5.8% of the gradient's norm at 50, 2.0% at 400 words.
    """
    num_draws, num_words = 300, 1000
    x, targets = draw_problem(num_words)
    layer = filled(SampledSoftmax(H, num_words, num_frequent=10, num_random=random))
    full = Softmax(H, num_words)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= 0.5
    full.load_state_dict(layer.state_dict())
    _, exact = gradients(full, x, targets)
    torch.manual_seed(0)
    means, single = [torch.zeros_like(g) for g in exact], 0.0
    for _ in range(num_draws):
        _, found = gradients(layer, x, targets)
        for mean, got in zip(means, found, strict=True):
            mean += got / num_draws
        single += relative(found[1], exact[1]) / num_draws
    assert max(map(relative, means, exact)) < bound
    assert relative(means[1], exact[1]) < 0.1 * single  # the mean, not any one


def relative(got, exact):
    return float((got - exact).norm() / exact.norm())


def test_without_a_gradient_or_in_evaluation_it_is_the_full_softmax():
    x, targets = draw_problem()
    full = filled(Softmax(H, V))
    layer = filled(SampledSoftmax(H, V, num_frequent=4, num_random=10))
    expected = full(x, targets).item()
    with torch.no_grad():
        assert layer(x, targets).item() == pytest.approx(expected, rel=1e-6)
    assert layer.eval()(x, targets).item() == expected
    assert layer.nll(x, targets) == full.nll(x, targets)


def test_a_minibatch_without_targets_costs_nothing():
    x, _ = draw_problem()
    targets = torch.full((N,), -1)
    adaptive = AdaptiveSoftmax(H, V, cutoffs=(10, 30), div=2.0)
    for layer in (SampledSoftmax(H, V, num_frequent=0, num_random=10), adaptive):
        loss, found = gradients(filled(layer), x, targets)
        assert loss == 0.0
        assert all(g.abs().max() == 0.0 for g in found)
        assert layer.nll(x, targets) == 0.0


def test_adaptive_is_torchs_without_the_rows_that_have_no_target(monkeypatch):
    monkeypatch.setattr("mpilm.models.softmax.MIN_CHUNK_ROWS", 7)
    x, targets = draw_problem()
    layer = filled(AdaptiveSoftmax(H, V, cutoffs=(10, 30), div=2.0))
    log_p = layer.log_prob(x)
    assert log_p.exp().sum(1).allclose(torch.ones(N))
    expected = F.nll_loss(log_p, targets, ignore_index=-1, reduction="sum")
    count = int((targets != -1).sum())
    assert layer(x, targets).item() * count == pytest.approx(expected.item(), rel=1e-6)
    assert layer.nll(x, targets).item() == pytest.approx(expected.item(), rel=1e-6)
    assert layer.logits(x).equal(log_p)


# in the model
def lm(**settings):
    settings = {"embed": 6, "hidden": 8, "dropout": 0.3, **settings}
    return build_model(Choice("lstm_lm", LstmLmConfig(**settings)), V, V, seed=2)


class Repeating:
    """Minibatches of random words, each made from its number."""

    def __init__(self):
        self.number = 0

    def next(self):
        generator = torch.Generator().manual_seed(self.number)
        self.number += 1
        words = torch.randint(V, (2, 7, 4), generator=generator)
        return Batch(words[0].numpy(), words[1].numpy(), 28, self.number % 5 == 1)

    def state(self):
        return {"number": self.number}

    def load_state(self, state):
        self.number = int(state["number"])


def make(seed=5, **settings):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.5)

    return Learner(lm(**settings), Repeating(), sgd, seed=seed)


SAMPLED = {"softmax": "sampled", "sampled_frequent": 4, "sampled_random": 30}
ADAPTIVE = {"softmax": "adaptive", "adaptive_cutoffs": (10, 30), "adaptive_div": 2.0}


def train(learner, steps):
    losses = []
    for _ in range(steps):
        losses.append(learner.gradient())
        learner.update()
    return losses


@pytest.mark.parametrize(
    "settings",
    [SAMPLED, {**SAMPLED, "tied": True}, {**SAMPLED, "sampled_recent": 50}, ADAPTIVE],
    ids=["sampled", "tied", "recent", "adaptive"],
)
def test_resumed_to_the_bit_and_learns(settings):
    learner = make(**settings)
    train(learner, 3)
    state = learner.state()
    expected = train(learner, 4)
    again = make(seed=6, **settings)
    again.load_state(state)
    assert train(again, 4) == expected
    assert torch.equal(again.theta, learner.theta)
    other = make(seed=6, **settings)  # other words are drawn, other units dropped
    assert train(other, 7)[3:] != expected


@pytest.mark.long
@pytest.mark.parametrize("settings", [SAMPLED, ADAPTIVE], ids=["sampled", "adaptive"])
def test_it_learns_and_generates(settings):
    model = lm(dropout=0.0, **settings)
    words = torch.arange(1, 29).view(7, 4)
    batch = Batch(words, words + 1, 28, True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    before = model.nll(batch).item() / 28
    torch.manual_seed(0)
    for _ in range(100):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    assert model.nll(batch).item() / 28 < 0.3 * before
    assert model.generate([1], 1, temperature=0.0) == [2]


# what is refused
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"softmax": "sampled", "sampled_frequent": V + 1},
            f"model.sampled_frequent = {V + 1}: the vocabulary has {V} words",
        ),
        (
            {"softmax": "sampled", "sampled_frequent": 0, "sampled_random": V + 1},
            f"model.sampled_random = {V + 1}: the vocabulary has {V} words",
        ),
        (
            {"softmax": "adaptive", "adaptive_cutoffs": (10, V)},
            f"model.adaptive_cutoffs: {V} is not below the {V} words",
        ),
        (
            {**ADAPTIVE, "adaptive_div": 4.0},
            "model.adaptive_div = 4: 8 inputs over it, 2 times, are less than 1",
        ),
        (
            {**ADAPTIVE, "tied": True},
            "model.tied = true: an adaptive softmax has no matrix",
        ),
    ],
)
def test_a_softmax_that_does_not_go_with_the_vocabulary(settings, message):
    with pytest.raises(ConfigError) as caught:
        lm(**settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("softmax", "hierarchical"),
        ("sampled_frequent", -1),
        ("sampled_random", 0.5),
        ("adaptive_cutoffs", [20, 10]),
        ("adaptive_cutoffs", []),
        ("adaptive_cutoffs", [0, 10]),
        ("adaptive_div", 0.5),
    ],
)
def test_settings_out_of_range_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key):
        resolve({"model": {key: value}})


def test_a_sample_smaller_than_the_targets_is_refused():
    choice = Choice("lstm_lm", LstmLmConfig(**SAMPLED))
    require_sample(choice, 10_000, 34)
    require_sample(choice, 34, 1000)
    with pytest.raises(ConfigError, match=r"= 34 words, and 35 targets"):
        require_sample(choice, 10_000, 35)
    require_sample(Choice("lstm_lm", LstmLmConfig()), 10_000, 35)


def test_natural_gradient_is_refused():
    config = resolve(
        {
            "model": {"softmax": "sampled", "sampled_frequent": 20},
            "optim": {"name": "ng_sgd"},
            "train": {"batch": 4, "unroll": 7},
        }
    )
    with pytest.raises(ConfigError, match="ng_sgd"):
        make_learner(config, 2000, 2000, Repeating(), device="cpu", seed=1)
