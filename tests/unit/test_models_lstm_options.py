"""Options of the LSTM language model: against a slow reference, and their promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpilm.config import resolve
from mpilm.convert import Choice
from mpilm.data.batch import Batch
from mpilm.errors import ConfigError
from mpilm.learner.learner import Learner
from mpilm.models.base import computing, has_bfloat16
from mpilm.models.build import build_model
from mpilm.models.configs import LstmLmConfig
from mpilm.models.lstm_layers import Dropout, LstmLayers, drop_words
from mpilm.models.lstm_lm import LstmLm
from mpilm.train.run import make_learner
from tests.reference.lstm_options import mean_loss

V, T, B, E, H, L = 19, 4, 3, 6, 8, 2
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    ),
]


def make_batch(seed, *, start=True):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(V, (2, T, B), generator=generator)
    words[1, T - 2 :, -1] = -1
    return Batch(words[0], words[1], T * B - 2, start)


def make_model(**settings):
    torch.manual_seed(3)
    model = LstmLm(V, **{"embed": E, "hidden": H, "layers": L, **settings})
    for name, parameter in model.named_parameters():
        if "norm" in name:  # away from gain 1 and bias 0
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def keep(*shape, p):
    return (torch.rand(shape).bernoulli_(1 - p) / (1 - p)).double()


def masks_of(model, settings, batch):
    """Return the masks that the next loss draws, in the order of the equations."""
    state, masks = torch.get_rng_state(), {}
    O = settings.get("projected") or H  # noqa: E741

    def units(size, p):
        if settings.get("locked"):
            return torch.empty(1, B, size).bernoulli_(1 - p).double() / (1 - p)
        return nn.functional.dropout(torch.ones(T, B, size), p).double()

    rate = settings.get("embed_dropout", 0.0)
    if rate:
        words = batch.inputs.unique()
        drawn = torch.empty(len(words), 1).bernoulli_(1 - rate).double() / (1 - rate)
        masks["words"] = torch.zeros(V, dtype=torch.float64)
        masks["words"][words] = drawn[:, 0]
    p = settings.get("dropout", 0.0)
    if p:
        masks["input"] = units(E, p).expand(T, B, E)
    if settings.get("weight_dropout"):
        masks["weights"] = {}
    for k in range(L):
        if k and p:
            masks["between"] = {k: units(O, p).expand(T, B, O)}
        if "weights" in masks:
            ones = torch.ones(4 * H, O)
            dropped = nn.functional.dropout(ones, settings["weight_dropout"])
            masks["weights"][k] = dropped.double()
    if p:
        masks["output"] = units(O, p).expand(T, B, O)
    torch.set_rng_state(state)
    return masks


OPTIONS = {
    "locked": {"locked": True, "dropout": 0.4},
    "weights": {"weight_dropout": 0.5, "dropout": 0.3},
    "norm": {"layer_norm": True},
    "projected": {"layer_norm": True, "projected": 4},
    "words": {"embed_dropout": 0.5, "layer_norm": True},
    "tied": {"tied": True, "locked": True, "dropout": 0.2, "projected": E},
    "all": {
        "locked": True,
        "dropout": 0.3,
        "weight_dropout": 0.4,
        "embed_dropout": 0.2,
        "layer_norm": True,
        "projected": 5,
        "tied": True,
    },
}


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradient_match_the_reference(settings):
    model = make_model(**settings)
    exact = {
        name: p.detach().double().requires_grad_()
        for name, p in model.named_parameters()
    }
    state = None
    torch.manual_seed(11)
    for seed, start in [(0, True), (1, False), (2, True)]:
        batch = make_batch(seed, start=start)
        masks = masks_of(model, settings, batch)
        model.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        before = None if start else [(h.detach(), c.detach()) for h, c in state]
        inputs = (batch.inputs, batch.targets)
        expected, state = mean_loss(exact, *inputs, layers=L, masks=masks, state=before)
        assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
        gradient = torch.autograd.grad(expected, list(exact.values()))
        for (name, parameter), right in zip(
            model.named_parameters(), gradient, strict=True
        ):
            error = (parameter.grad.double() - right).abs().max()
            assert error <= 2e-5 * right.abs().max(), name


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_dropped_in_evaluation(settings):
    model = make_model(**settings).eval()
    exact = {name: p.detach().double() for name, p in model.named_parameters()}
    batch = make_batch(0)
    inputs = (batch.inputs, batch.targets)
    expected, _ = mean_loss(exact, *inputs, layers=L, masks={})
    nll = model.nll(batch).item() / batch.num_samples
    assert nll == pytest.approx(expected.item(), rel=2e-6)
    assert len(model.generate([1], 4)) == 4


@pytest.mark.parametrize("projected", [0, 3])
def test_without_options_the_layers_are_torchs(projected):
    """The same first model to the bit, outputs and state to rounding."""
    torch.manual_seed(0)
    torchs = nn.LSTM(E, H, L, proj_size=projected)
    torch.manual_seed(0)
    ours = LstmLayers(E, H, L, projected=projected)
    for k in range(L):
        for name, parameter in ours.layers[k].named_parameters():
            assert parameter.equal(getattr(torchs, name.replace("l0", f"l{k}")))
    x = torch.randn(T, B, E)
    state = None
    for _ in range(2):
        y, state_of_ours = ours(x, state)
        expected, state = torchs(x, state)
        assert torch.allclose(y, expected, atol=1e-6)
        for own, right in zip(state_of_ours, state, strict=True):
            assert own.shape == right.shape
            assert torch.allclose(own, right, atol=1e-6)


def test_locked_dropout_drops_the_same_units_in_all_steps():
    drop = Dropout(0.25, locked=True)
    y = drop(torch.ones(50, 40, 30))
    assert y.eq(y[:1]).all()
    assert y.unique().allclose(torch.tensor([0.0, 1.0 / 0.75]))
    share = y[0].eq(0).float().mean().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 1200) ** 0.5
    assert not y[0].eq(y[0, :1]).all()  # but not of all sequences
    assert not drop(torch.ones(50, 40, 30)).equal(y)


def test_dropped_words_are_dropped_wherever_they_stand():
    ids = torch.randint(400, (70, 60))
    found = drop_words(torch.ones(70, 60, 2), ids, 0.1)
    flat = ids.view(-1), found[..., 0].view(-1)
    of_word = {int(i): float(x) for i, x in zip(*flat, strict=True)}
    assert found[..., 0].equal(
        torch.tensor([[of_word[int(i)] for i in r] for r in ids])
    )
    dropped = sum(x == 0.0 for x in of_word.values()) / len(of_word)
    assert abs(dropped - 0.1) < 5 * (0.1 * 0.9 / len(of_word)) ** 0.5


def test_its_own_rates_before_and_after_the_layers():
    config = LstmLmConfig(dropout=0.3, input_dropout=0.6, output_dropout=0.0, layers=2)
    model = build_model(Choice("lstm_lm", config), V, V, seed=1)
    assert (model.input_dropout.p, model.lstm.dropout, model.dropout.p) == (0.6, 0.3, 0)
    same = build_model(Choice("lstm_lm", LstmLmConfig(dropout=0.3)), V, V, seed=1)
    assert (same.input_dropout.p, same.dropout.p) == (0.3, 0.3)


class Repeating:
    """Minibatches of random words, each made from its number."""

    def __init__(self):
        self.number = 0

    def next(self):
        self.number += 1
        return make_batch(self.number, start=self.number % 5 == 1)

    def state(self):
        return {"number": self.number}

    def load_state(self, state):
        self.number = int(state["number"])


def train(learner, steps):
    losses = []
    for _ in range(steps):
        losses.append(float(learner.gradient()))
        learner.update()
    return losses


SPARSE = {"softmax": "sampled", "sampled_frequent": 4, "sampled_random": 8}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sparse", [False, True])
def test_resumed_to_the_bit_and_learns(sparse, device):
    settings = {**OPTIONS["all"], "compute": "bfloat16", "embed": E, "hidden": H}
    settings |= {"layers": L, **(SPARSE if sparse else {}), "sparse": sparse}

    def make(seed):
        config = Choice("lstm_lm", LstmLmConfig(**settings))
        model = build_model(config, V, V, seed=2)
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
        return Learner(model, Repeating(), sgd, seed=seed, sparse=sparse, device=device)

    learner = make(5)
    train(learner, 3)
    state = learner.state()
    expected = train(learner, 4)
    again = make(6)
    again.load_state(state)
    assert train(again, 4) == expected
    assert again.theta.equal(learner.theta)
    assert train(make(6), 7)[3:] != expected  # other units are dropped
    assert all(part.dtype == torch.float32 for part in learner.model.carried())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{}, OPTIONS["all"]], ids=["plain", "all"])
def test_bfloat16_is_the_same_loss_and_gradient_to_three_digits(settings, device):
    # bfloat16 has 8 bits: 0.4% of each number, less in sums
    exact, rounded = make_model(**settings), make_model(**settings, compute="bfloat16")
    batch = make_batch(0)
    batch = batch._replace(
        inputs=batch.inputs.to(device), targets=batch.targets.to(device)
    )
    found = []
    for model in (exact, rounded):
        model.to(device)
        torch.manual_seed(1)
        loss = model.loss(batch)
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters()]))
        assert model.nll(batch).dtype == torch.float64
    (right, exact_grad), (loss, grad) = found
    assert loss.item() == pytest.approx(right.item(), rel=3e-3)
    assert loss.item() != right.item()
    for own, expected in zip(grad, exact_grad, strict=True):
        assert own.dtype == torch.float32
        assert (own - expected).norm() <= 0.03 * expected.norm() + 1e-6


def test_evaluation_is_float32_whatever_computes_the_training():
    exact, rounded = make_model(), make_model(compute="bfloat16")
    batch = make_batch(0)
    assert exact.eval().nll(batch) == rounded.eval().nll(batch)


def test_auto_takes_bfloat16_where_it_pays():
    cpu = torch.device("cpu")

    def is_bfloat16(compute, hidden):
        with computing(compute, hidden, cpu):
            return torch.is_autocast_enabled("cpu")

    assert is_bfloat16("bfloat16", 2048)
    assert not is_bfloat16("float32", 64)
    assert is_bfloat16("auto", 512) == has_bfloat16(cpu)
    assert not is_bfloat16("auto", 513)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("embed_dropout", 1.0, "model.embed_dropout"),
        ("weight_dropout", -0.1, "model.weight_dropout"),
        ("input_dropout", -0.5, "input_dropout: -0.5 is neither a share nor -1"),
        ("output_dropout", 1.0, "model.output_dropout"),
        ("projected", 128, "projected: 128 is not below hidden = 128"),
        ("compute", "float16", "model.compute"),
        ("layer_norm", "yes", "model.layer_norm"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(key, value, message):
    with pytest.raises(ConfigError) as caught:
        resolve({"model": {key: value}})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["weight_dropout", "compute"])
def test_natural_gradient_is_refused(key):
    value = {"weight_dropout": 0.5, "compute": "bfloat16"}[key]
    config = resolve({"model": {key: value}, "optim": {"name": "ng_sgd"}})
    with pytest.raises(ConfigError, match=rf"ng_sgd.*model\.{key}"):
        make_learner(config, V, V, Repeating(), device="cpu", seed=1)
