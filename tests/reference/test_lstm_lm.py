"""The reference LSTM language model against finite differences of its own loss."""

from __future__ import annotations

import numpy as np
import pytest

from tests.reference import lstm_lm as reference


def draw_parameters(rng, *, vocab=7, embed=3, hidden=4, layers=2, tied=False):
    shapes = {"embedding.weight": (vocab, embed)}
    inputs = embed
    for layer in range(layers):
        shapes[f"lstm.weight_ih_l{layer}"] = (4 * hidden, inputs)
        shapes[f"lstm.weight_hh_l{layer}"] = (4 * hidden, hidden)
        shapes[f"lstm.bias_ih_l{layer}"] = (4 * hidden,)
        shapes[f"lstm.bias_hh_l{layer}"] = (4 * hidden,)
        inputs = hidden
    if tied:
        shapes["projection.weight"] = (embed, hidden)
    else:
        shapes["softmax.weight"] = (vocab, hidden)
    shapes["softmax.bias"] = (vocab,)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_equals_finite_differences(tied):
    rng = np.random.default_rng(0)
    parameters = draw_parameters(rng, tied=tied)
    inputs_TB, targets_TB = rng.integers(0, 7, (2, 5, 2))
    targets_TB[1, 0] = -1
    state = [
        (rng.normal(size=h.shape), rng.normal(size=c.shape))
        for h, c in reference.zero_state(parameters, 2)
    ]
    _, grad, _ = reference.loss_and_gradient(parameters, inputs_TB, targets_TB, state)
    step = 1e-5
    for name, value in parameters.items():
        for _ in range(4):
            at = tuple(rng.integers(0, value.shape))
            losses = []
            for sign in (1, -1):
                moved = {**parameters, name: value.copy()}
                moved[name][at] += sign * step
                found, _ = reference.nll(moved, inputs_TB, targets_TB, state)
                losses.append(np.mean(found))
            numerical = (losses[0] - losses[1]) / (2 * step)
            assert grad[name][at] == pytest.approx(numerical, rel=1e-5, abs=1e-8), name
