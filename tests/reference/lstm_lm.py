"""A slow LSTM language model in float64 numpy: the equations, one time step at a time.

Written from the equations in the docstring of mpilm/models/lstm_lm.py and without its
code. Parameters are a dict by the names that torch gives them. No dropout.
"""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def log_softmax(logits_V):
    shifted = logits_V - logits_V.max()
    return shifted - np.log(np.exp(shifted).sum())


def num_layers(parameters):
    return sum(name.startswith("lstm.weight_hh_l") for name in parameters)


def zero_state(parameters, num_sequences):
    """Return a list of (h_BH, c_BH), one per layer."""
    hidden = parameters["lstm.weight_hh_l0"].shape[1]
    return [
        (np.zeros((num_sequences, hidden)), np.zeros((num_sequences, hidden)))
        for _ in range(num_layers(parameters))
    ]


def softmax_weight(parameters):
    tied = "softmax.weight" not in parameters
    return parameters["embedding.weight" if tied else "softmax.weight"]


def forward(parameters, inputs_TB, state):
    """Return softmax inputs per time step, what backward needs, and the last state."""
    outputs, tape = [], []
    for word_B in inputs_TB:
        x = parameters["embedding.weight"][word_B]
        step, next_state = [], []
        for layer in range(num_layers(parameters)):
            h_before, c_before = state[layer]
            gates = (
                x @ parameters[f"lstm.weight_ih_l{layer}"].T
                + parameters[f"lstm.bias_ih_l{layer}"]
                + h_before @ parameters[f"lstm.weight_hh_l{layer}"].T
                + parameters[f"lstm.bias_hh_l{layer}"]
            )
            i, f, g, o = np.split(gates, 4, axis=1)
            i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
            c = f * c_before + i * g
            h = o * np.tanh(c)
            step.append((x, h_before, c_before, i, f, g, o, c))
            next_state.append((h, c))
            x = h
        state = next_state
        tape.append(step)
        features = x
        if "projection.weight" in parameters:
            features = x @ parameters["projection.weight"].T
        outputs.append((x, features))
    return outputs, tape, state


def nll(parameters, inputs_TB, targets_TB, state):
    """Return the list of negative log-likelihoods of all targets but -1; last state."""
    outputs, _, last = forward(parameters, inputs_TB, state)
    found = []
    for (_, features), target_B in zip(outputs, targets_TB, strict=True):
        for feature, target in zip(features, target_B, strict=True):
            if target != -1:
                logits = softmax_weight(parameters) @ feature
                found.append(-log_softmax(logits + parameters["softmax.bias"])[target])
    return found, last


def loss_and_gradient(parameters, inputs_TB, targets_TB, state):
    """Return mean loss, gradients by parameter name, and the last state."""
    outputs, tape, last = forward(parameters, inputs_TB, state)
    count = int((targets_TB != -1).sum())
    grad = {name: np.zeros_like(value) for name, value in parameters.items()}
    softmax_grad = softmax_weight(grad)
    num_layers_ = num_layers(parameters)
    dh_next = [np.zeros_like(h) for h, _ in last]
    dc_next = [np.zeros_like(c) for _, c in last]
    loss = 0.0
    for t in reversed(range(len(inputs_TB))):
        top, features = outputs[t]
        d_features = np.zeros_like(features)
        for b, target in enumerate(targets_TB[t]):
            if target == -1:
                continue
            logits = softmax_weight(parameters) @ features[b]
            log_p = log_softmax(logits + parameters["softmax.bias"])
            loss -= log_p[target] / count
            d_logits = np.exp(log_p) / count
            d_logits[target] -= 1.0 / count
            grad["softmax.bias"] += d_logits
            softmax_grad += np.outer(d_logits, features[b])
            d_features[b] = d_logits @ softmax_weight(parameters)
        dx = d_features
        if "projection.weight" in parameters:
            grad["projection.weight"] += d_features.T @ top
            dx = d_features @ parameters["projection.weight"]
        for layer in reversed(range(num_layers_)):
            x, h_before, c_before, i, f, g, o, c = tape[t][layer]
            dh = dx + dh_next[layer]
            dc = dc_next[layer] + dh * o * (1.0 - np.tanh(c) ** 2)
            d_gates = np.concatenate(
                [
                    dc * g * i * (1.0 - i),
                    dc * c_before * f * (1.0 - f),
                    dc * i * (1.0 - g**2),
                    dh * np.tanh(c) * o * (1.0 - o),
                ],
                axis=1,
            )
            grad[f"lstm.weight_ih_l{layer}"] += d_gates.T @ x
            grad[f"lstm.weight_hh_l{layer}"] += d_gates.T @ h_before
            grad[f"lstm.bias_ih_l{layer}"] += d_gates.sum(0)
            grad[f"lstm.bias_hh_l{layer}"] += d_gates.sum(0)
            dh_next[layer] = d_gates @ parameters[f"lstm.weight_hh_l{layer}"]
            dc_next[layer] = dc * f
            dx = d_gates @ parameters[f"lstm.weight_ih_l{layer}"]
        for b, word in enumerate(inputs_TB[t]):
            grad["embedding.weight"][word] += dx[b]
    return loss, grad, last
