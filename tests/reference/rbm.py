"""Slow restricted Boltzmann machines in float64 numpy: sums over all hidden states."""

from __future__ import annotations

from itertools import product

import numpy as np


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def energy(v, h, parameters, *, gaussian):
    W, a, b = parameters
    visible = ((v - a) ** 2).sum() / 2 if gaussian else -(a @ v)
    return visible - b @ h - h @ W @ v


def free_energy(v, W, a, b, gaussian):
    """Return -ln sum_h exp(-E(v, h)), over all 2^H hidden states."""
    states = product([0.0, 1.0], repeat=len(b))
    terms = [-energy(v, np.array(h), (W, a, b), gaussian=gaussian) for h in states]
    return -np.logaddexp.reduce(terms)


def hidden(v, W, b):
    """Return p(h_j = 1 | v) by enumeration: shares of states with h_j = 1."""
    states = [np.array(h) for h in product([0.0, 1.0], repeat=len(b))]
    weights = np.exp([b @ h + h @ W @ v for h in states])
    return (
        np.array(
            [
                sum(w * h[j] for w, h in zip(weights, states, strict=True))
                for j in range(len(b))
            ]
        )
        / weights.sum()
    )


def statistics(v0, v1, W, b):
    """Return the CD-1 gradients of W, a and b: what learning subtracts."""
    dW, da, db = np.zeros_like(W), np.zeros(W.shape[1]), np.zeros(len(b))
    for data, reconstruction in zip(v0, v1, strict=True):
        for v, sign in ((data, -1.0), (reconstruction, 1.0)):
            h = hidden(v, W, b)
            dW += sign * np.outer(h, v)
            da += sign * v
            db += sign * h
    n = len(v0)
    return dW / n, da / n, db / n
