"""A slow LSTM language model with options, in float64, one time step at a time.

Written from the equations in the docstrings of mpilm/models/lstm_lm.py and
lstm_layers.py and without their code. Parameters are a dict of float64 tensors by the
names in LstmLayers; masks are given. torch's autograd gives the gradient.
"""

from __future__ import annotations

import torch


def norm(h_BO, gain, bias):
    mean = h_BO.mean(1, keepdim=True)
    variance = ((h_BO - mean) ** 2).mean(1, keepdim=True)
    return gain * (h_BO - mean) / torch.sqrt(variance + 1e-5) + bias


def mean_loss(parameters, inputs_TB, targets_TB, *, layers, masks, state=None):
    """Return the mean cross-entropy in nats, and (h_BO, c_BH) of every layer.

    Args:
        masks: what is multiplied, all optional: "words" (V,), "input" (T, B, E),
            "between" layer -> (T, B, O), "output" (T, B, O), "weights" layer -> (4H, O)
    """
    p = parameters
    T, B = inputs_TB.shape
    H = p["lstm.layers.0.weight_hh_l0"].shape[0] // 4
    O = p["lstm.layers.0.weight_hh_l0"].shape[1]  # noqa: E741
    zero = [
        (torch.zeros(B, O, dtype=torch.float64), torch.zeros(B, H, dtype=torch.float64))
        for _ in range(layers)
    ]
    state = list(state or zero)
    total, count = 0.0, 0
    for t in range(T):
        y = p["embedding.weight"][inputs_TB[t]]
        if "words" in masks:
            y = y * masks["words"][inputs_TB[t]][:, None]
        if "input" in masks:
            y = y * masks["input"][t]
        for k in range(layers):
            name = f"lstm.layers.{k}."
            if k and "between" in masks:
                y = y * masks["between"][k][t]
            h, c = state[k]
            recurrent = p[name + "weight_hh_l0"]
            if "weights" in masks:
                recurrent = recurrent * masks["weights"][k]
            z = y @ p[name + "weight_ih_l0"].T + p[name + "bias_ih_l0"]
            z = z + h @ recurrent.T + p[name + "bias_hh_l0"]
            i, f, g, o = z[:, :H], z[:, H : 2 * H], z[:, 2 * H : 3 * H], z[:, 3 * H :]
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if name + "weight_hr_l0" in p:
                h = h @ p[name + "weight_hr_l0"].T
            state[k] = h, c
            y = h
            if f"lstm.norms.{k}.weight" in p:
                y = norm(h, p[f"lstm.norms.{k}.weight"], p[f"lstm.norms.{k}.bias"])
        if "output" in masks:
            y = y * masks["output"][t]
        if "projection.weight" in p:
            y = y @ p["projection.weight"].T
        W = p.get("softmax.weight", p["embedding.weight"])
        logits = y @ W.T + p["softmax.bias"]
        has_target_B = targets_TB[t] >= 0
        log_z_B = torch.logsumexp(logits, 1)
        right_B = logits[torch.arange(B), targets_TB[t].clamp(min=0)]
        total = total + ((log_z_B - right_B) * has_target_B).sum()
        count += int(has_target_B.sum())
    return total / count, state
