"""The LSTM language model against the float64 reference, and its own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mpilm.data.batch import Batch
from mpilm.models.lstm_lm import LstmLm, draw
from tests.reference import lstm_lm as reference

VOCAB, STEPS, SEQUENCES = 23, 6, 4


def make_batch(seed, *, start=True, padding=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (STEPS, SEQUENCES)
    inputs = torch.randint(VOCAB, shape, generator=generator)
    targets = torch.randint(VOCAB, shape, generator=generator)
    targets[STEPS - padding :, -1] = -1
    return Batch(inputs, targets, STEPS * SEQUENCES - padding, start)


def make_model(**settings):
    torch.manual_seed(3)
    settings = {"embed": 5, "hidden": 8, "layers": 2, **settings}
    return LstmLm(VOCAB, **settings)


def as_float64(model):
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


MODELS = [
    {"layers": 1},
    {"layers": 2},
    {"tied": True},
    {"tied": True, "embed": 8},
]


@pytest.mark.parametrize("settings", MODELS)
def test_loss_and_gradient_match_the_reference(settings):
    model = make_model(**settings)
    parameters = as_float64(model)
    state = reference.zero_state(parameters, SEQUENCES)
    for seed, start in [(0, True), (1, False), (2, False), (3, True)]:
        batch = make_batch(seed, start=start, padding=2)
        if start:
            state = reference.zero_state(parameters, SEQUENCES)
        expected, gradient, state = reference.loss_and_gradient(
            parameters, batch.inputs.numpy(), batch.targets.numpy(), state
        )
        model.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        for name, parameter in model.named_parameters():
            got = parameter.grad.double().numpy()
            scale = np.abs(gradient[name]).max()
            error = np.abs(got - gradient[name]).max()
            assert error <= 1e-5 * scale, name


@pytest.mark.parametrize("settings", MODELS)
def test_nll_matches_the_reference_over_carried_state(settings):
    model = make_model(dropout=0.5, **settings).eval()
    parameters = as_float64(model)
    state = reference.zero_state(parameters, SEQUENCES)
    total, expected = 0.0, []
    for seed in range(3):
        batch = make_batch(seed, start=seed == 0, padding=3)
        total += model.nll(batch).item()
        found, state = reference.nll(
            parameters, batch.inputs.numpy(), batch.targets.numpy(), state
        )
        expected += found
    perplexity = math.exp(total / len(expected))
    assert perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)


def test_loss_without_gradient_is_the_mean_nll():
    model = make_model()
    batch = make_batch(0, padding=2)
    with torch.no_grad():
        loss = model.loss(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model.nll(batch).item() / batch.num_samples)


def test_state_is_carried_until_a_start():
    model = make_model()
    first, second = make_batch(0), make_batch(1, start=False)
    model.loss(first)
    carried = model.carried()
    after_carry = model.loss(second).item()
    model.load_carried(())
    after_zeros = model.loss(second).item()
    after_start = model.loss(second._replace(start=True)).item()
    assert after_zeros == after_start != after_carry
    model.load_carried(carried)
    assert model.loss(second).item() == after_carry
    assert not any(part.requires_grad for part in model.carried())


def test_tied_weights_are_one_parameter():
    model = make_model(tied=True)
    assert model.softmax.weight is model.embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "softmax.weight" not in names
    assert model.projection.weight.shape == (5, 8)
    assert make_model(tied=True, embed=8).projection is None


def test_the_same_seed_gives_the_same_first_model():
    first, again = make_model(), make_model()
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    torch.manual_seed(4)
    other = LstmLm(VOCAB, embed=5, hidden=8)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_first_model_has_forget_bias_one_and_bounded_weights():
    model = make_model()
    bias = model.lstm.bias_ih_l1 + model.lstm.bias_hh_l1
    assert torch.equal(bias[8:16], torch.ones(8))
    assert 0.05 < model.embedding.weight.abs().max() <= 0.1
    assert 0.05 < model.softmax.weight.abs().max() <= 0.1
    assert model.softmax.bias.abs().max() == 0.0


def test_dropout_only_while_training():
    model = make_model(dropout=0.5)
    batch = make_batch(0)
    torch.manual_seed(0)
    first, second = model.loss(batch).item(), model.loss(batch).item()
    assert first != second
    torch.manual_seed(0)
    assert model.loss(batch).item() == first
    model.eval()
    assert model.loss(batch).item() == model.loss(batch).item()


def test_greedy_generation_takes_the_likeliest_word_each_time():
    model = make_model().train()
    batch = make_batch(0)
    model.loss(batch)
    carried = model.carried()
    drawn = model.generate([1, 2], 5, temperature=0.0)
    parameters = as_float64(model)
    words = [1, 2]
    for _ in range(5):
        state = reference.zero_state(parameters, 1)
        outputs, _, _ = reference.forward(parameters, np.array(words)[:, None], state)
        weight = reference.softmax_weight(parameters)
        logits = weight @ outputs[-1][1][0] + parameters["softmax.bias"]
        words.append(int(np.argmax(logits)))
    assert drawn == words[2:]
    assert model.training
    assert model.carried() is carried


def test_drawing_follows_temperature_and_top_k():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def shares(temperature, top_k, draws=4000):
        counts = np.zeros(4)
        for _ in range(draws):
            counts[draw(logits, temperature, top_k, generator)] += 1
        return counts / draws

    p = torch.softmax(logits / 2.0, 0).numpy()
    assert shares(2.0, 0) == pytest.approx(p, abs=0.03)
    p = np.array([0.0, 1.0, math.e, 0.0])
    assert shares(1.0, 2) == pytest.approx(p / p.sum(), abs=0.03)


def test_generation_repeats_with_its_generator():
    model = make_model()
    draws = [
        model.generate([0], 20, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert all(0 <= word < VOCAB for word in draws[0])


def test_generation_never_draws_what_it_must_not():
    model = make_model()
    with torch.no_grad():
        model.softmax.bias[3] = 50.0
    seed = torch.Generator().manual_seed(1)
    assert set(model.generate([0], 20, generator=seed)) == {3}
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {}):
        assert 3 not in model.generate([0], 20, never=[3], **settings)
