"""Slow acoustic models in float64 numpy: the equations, one frame at a time.

Written from the equations in the docstring of mpilm/models/acoustic.py and without its
code. Parameters are a dict by the names that torch gives them.
"""

from __future__ import annotations

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def log_softmax(logits):
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def dnn(parameters, x_TD, activation):
    """Return ln p(class | frame), (T, C)."""
    outputs = []
    for h in x_TD:
        for layer in range(sum(n.startswith("hidden") for n in parameters) // 2):
            weight = parameters[f"hidden.{layer}.weight"]
            h = weight @ h + parameters[f"hidden.{layer}.bias"]
            h = sigmoid(h) if activation == "sigmoid" else np.maximum(h, 0.0)
        logits = parameters["softmax.weight"] @ h + parameters["softmax.bias"]
        outputs.append(log_softmax(logits))
    return np.array(outputs)


def one_way(parameters, x_TD, suffix):
    """Return the outputs of one LSTM layer in one direction, (T, cells)."""
    w_ih, w_hh, b_ih, b_hh = (
        parameters[f"lstm.{name}_{suffix}"]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h, c = np.zeros(w_hh.shape[1]), np.zeros(w_hh.shape[1])
    outputs = []
    for x in x_TD:
        i, f, g, o = np.split(w_ih @ x + b_ih + w_hh @ h + b_hh, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.array(outputs)


def lstm(parameters, x_TD):
    """Return ln p(class | frames) of one utterance, (T, C)."""
    h_TH = x_TD
    layers = sum("weight_hh" in n and "reverse" not in n for n in parameters)
    for layer in range(layers):
        ways = [one_way(parameters, h_TH, f"l{layer}")]
        if f"lstm.weight_hh_l{layer}_reverse" in parameters:
            back = one_way(parameters, h_TH[::-1], f"l{layer}_reverse")
            ways.append(back[::-1])
        h_TH = np.concatenate(ways, axis=1)
    if "bottleneck.weight" in parameters:
        h_TH = h_TH @ parameters["bottleneck.weight"].T + parameters["bottleneck.bias"]
    logits = h_TH @ parameters["softmax.weight"].T + parameters["softmax.bias"]
    return np.array([log_softmax(row) for row in logits])


def loss_and_errors(log_p_TC, labels_T):
    """Return the summed negative log-likelihood and the wrong frames."""
    nll, errors = 0.0, 0
    for log_p, label in zip(log_p_TC, labels_T, strict=True):
        if label >= 0:
            nll -= log_p[label]
            errors += int(np.argmax(log_p) != label)
    return nll, errors
