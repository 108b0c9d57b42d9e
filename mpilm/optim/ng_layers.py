"""How layers give up their rows: forwards whose backward is preconditioned.

    nn.Linear      its inputs and output derivatives
    nn.Embedding   its output derivatives; the inputs are one-hot
    nn.LSTM        per layer and direction: inputs [x_t, h_(t-1)], outputs the four
                   gates' derivatives, rows = time x batch (models/lstm.py)
    Softmax        its inputs, and the derivatives of the logits. On a CPU these are
                   never all in memory: `natural_cross_entropy`

Each replaces the forward of its module by one that ends in an autograd function whose
backward returns the input's gradient as always and `AffineMap.gradient` for the
weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pad_packed_sequence,
)

from mpilm.models.lstm import lstm_layer
from mpilm.models.softmax import (
    Softmax,
    errors,
    joined,
    mean_cross_entropy,
    plus_product,
    times_transposed,
    weights_of,
)
from mpilm.optim.affine import AffineMap, gram, precondition, squares_left
from mpilm.optim.configs import NgSgdConfig
from mpilm.optim.natural_gradient import norm_ratio, statistics

State = tuple[Tensor, Tensor]  # h and c


def maps_of(name: str, module: Any, config: NgSgdConfig) -> list[AffineMap]:
    """Return the affine maps of one module, which it uses from now on; [] if none.

    Exactly these types: what is derived from them may do something else. No maps have
    an embedding that renormalises or counts, and an LSTM with projections, without
    biases or with the batch first: their plain gradient stays.
    """
    kind = type(module)
    if kind in (nn.Linear, Softmax):
        owned = list(module.parameters(recurse=False))
        O, I = module.weight.shape  # noqa: E741
        sizes = {"num_inputs": I, "num_outputs": O, "config": config}
        layer = AffineMap(name, owned, has_bias=module.bias is not None, **sizes)
        use = _softmax if kind is Softmax else _linear
        module.forward = partial(use, layer, module)
        return [layer]
    if kind is nn.Embedding and _is_plain(module):
        sizes = {"num_inputs": 0, "num_outputs": module.embedding_dim}
        layer = AffineMap(name, [module.weight], has_bias=False, config=config, **sizes)
        module.forward = partial(_embedding, layer, module)
        return [layer]
    usual = kind is nn.LSTM and module.bias and not module.batch_first
    if usual and not module.proj_size:
        directions = [_gates(name, module, end, config) for end in _ends(module)]
        module.forward = partial(_lstm, directions, module)
        return directions
    return []


def _is_plain(module: nn.Embedding) -> bool:
    special = (module.padding_idx, module.max_norm)
    counts = module.sparse or module.scale_grad_by_freq
    return special == (None, None) and not counts


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: AffineMap
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        rows = (x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]))
        return dx, *ctx.layer.gradient(*rows), None


def _linear(layer: AffineMap, module: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = _Affine.apply(x, module.weight, module.bias, layer)
    return y


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, layer: AffineMap) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.layer = len(weight), layer
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        rows = ids.flatten(), dy.reshape(-1, dy.shape[-1])
        return None, ctx.layer.row_gradient(*rows, ctx.num_rows), None


def _embedding(layer: AffineMap, module: nn.Embedding, ids: Tensor) -> Tensor:
    y: Tensor = _Embedding.apply(ids, module.weight, layer)
    return y


def _ends(module: nn.LSTM) -> list[str]:
    """Return how the names of each direction's weights end, in torch's order."""
    sides = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{layer}{side}" for layer in range(module.num_layers) for side in sides]


def _weights(module: nn.LSTM, end: str) -> tuple[nn.Parameter, ...]:
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return tuple(getattr(module, kind + end) for kind in kinds)


def _gates(name: str, module: nn.LSTM, end: str, config: NgSgdConfig) -> AffineMap:
    owned = _weights(module, end)
    return AffineMap(
        f"{name}.{end[1:]}" if name else end[1:],
        owned,
        num_inputs=owned[0].shape[1] + owned[1].shape[1],
        num_outputs=owned[0].shape[0],
        has_bias=True,
        config=config,
    )


def _lstm(
    gates: list[AffineMap], module: nn.LSTM, x: Any, state: State | None = None
) -> tuple[Any, Any]:
    """Return what nn.LSTM does: the outputs and the last state.

    Of packed sequences the last state is not returned: it is None.
    """
    if not torch.is_grad_enabled():
        return nn.LSTM.forward(module, x, state)
    if isinstance(x, PackedSequence):
        padded, lengths = pad_packed_sequence(x)
        y, _ = _layers(gates, module, padded, state, lengths.to(padded.device))
        return pack_padded_sequence(y, lengths, enforce_sorted=False), None
    if x.dim() == 3:
        return _layers(gates, module, x, state, None)
    wide = None if state is None else (state[0][:, None], state[1][:, None])
    y, (h, c) = _layers(gates, module, x[:, None], wide, None)
    return y[:, 0], (h[:, 0], c[:, 0])


def _layers(
    gates: list[AffineMap],
    module: nn.LSTM,
    x: Tensor,
    state: State | None,
    lengths: Tensor | None,
) -> tuple[Tensor, State]:
    T, B, _ = x.shape
    num_directions = 2 if module.bidirectional else 1
    if state is None:
        zeros = x.new_zeros(len(gates), B, module.hidden_size)
        state = (zeros, zeros)
    real = back = None
    if lengths is not None:
        t = torch.arange(T, device=x.device)[:, None]
        real = (t < lengths).flatten().nonzero()[:, 0]
        # of each sequence, the steps from its end to its start; then the padding
        back = torch.where(t < lengths, lengths - 1 - t, t)[..., None]
    lasts: list[tuple[Tensor, Tensor]] = []
    for layer in range(module.num_layers):
        outputs = []
        for side in range(num_directions):
            index = layer * num_directions + side
            rule = _rule(gates[index], real)
            first = (state[0][index], state[1][index])
            weights = _weights(module, _ends(module)[index])
            reverse = side == 1 and back is None
            turn = back if side == 1 else None
            into = x if turn is None else _turn(x, turn)
            h, c = lstm_layer(into, first, weights, reverse=reverse, rule=rule)
            lasts.append((h[0] if reverse else h[-1], c))
            outputs.append(h if turn is None else _turn(h, turn))
        x = outputs[0] if num_directions == 1 else torch.cat(outputs, dim=-1)
        if layer + 1 < module.num_layers:
            x = F.dropout(x, module.dropout, module.training)
    h_LBH, c_LBH = (torch.stack(parts) for parts in zip(*lasts, strict=True))
    return x, (h_LBH, c_LBH)


def _turn(x_TBD: Tensor, back_TB1: Tensor) -> Tensor:
    """Return every sequence back to front; twice is the identity."""
    return x_TBD.gather(0, back_TB1.expand(-1, -1, x_TBD.shape[-1]))


def _rule(gates: AffineMap, real: Tensor | None) -> Callable[..., Any]:
    """Return the weights' gradients as a rule of `lstm_layer`.

    Args:
        real: indices of the rows that are no padding; None: all.
    """

    def rule(x_TBI: Tensor, h_TBH: Tensor, dz_TBG: Tensor) -> tuple[Tensor, ...]:
        in_N = torch.cat([x_TBI, h_TBH], dim=-1).flatten(0, 1)
        dz_N = dz_TBG.flatten(0, 1)
        if real is not None:
            in_N, dz_N = in_N[real], dz_N[real]
        g_W, g_b = gates.gradient(in_N, dz_N)
        I = x_TBI.shape[-1]  # noqa: E741
        assert g_b is not None
        return g_W[:, :I], g_W[:, I:], g_b

    return rule


def _softmax(
    layer: AffineMap, module: Softmax, x_NH: Tensor, targets_N: Tensor
) -> Tensor:
    """Return the mean cross-entropy, as Softmax.forward does, through `layer`."""
    if not torch.is_grad_enabled():
        return Softmax.forward(module, x_NH, targets_N)
    parameters = module.weight, module.bias
    if x_NH.is_cuda or layer.sides["out"][0].fisher is None:
        y = _Affine.apply(x_NH, *parameters, layer)
        return mean_cross_entropy(y, targets_N)
    loss: Tensor = _NaturalCrossEntropy.apply(x_NH, *parameters, targets_N, layer)
    return loss


class _NaturalCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk, as models/softmax.py has them: its (1) to (5).

    With D = diag(s) e for dy, W and H for the output side's,

        g = D_hat^T x1_hat = D^T x1_hat - W^T (H^T x1_hat),   H = D W^T

    so that neither D nor D_hat is ever whole.
    """

    @staticmethod
    def forward(  # noqa: PLR0917, torch passes arguments by position only
        ctx: Any,
        x_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        layer: AffineMap,
    ) -> Tensor:
        N, V = len(x_NH), len(weight_VH)
        ng = layer.sides["out"][0]
        state = ng.fisher
        assert state is not None
        W, due = state.W_RD, ng.is_due(state)
        hat = precondition(layer.sides["in"][0], x_NH, ones=True)
        ones_hat_N = hat.ones
        assert ones_hat_N is not None
        s_N1 = weights_of(targets_N, x_NH)
        xs_NH, ones_N = hat.rows * s_N1, ones_hat_N * s_N1[:, 0]
        H, norms_N = x_NH.new_empty(N, len(W)), x_NH.new_empty(N)
        nll_chunks: list[Tensor] = []
        dx_chunks: list[Tensor] = []
        g_b = torch.zeros_like(bias_V)
        g_HV: Tensor | None = None
        J: Tensor | None = None
        for rows, e, nll in errors(x_NH, weight_VH, bias_V, targets_N):
            s = s_N1[rows]
            nll_chunks.append(nll)
            dx_chunks.append(times_transposed(e, weight_VH.t()).mul_(s))
            H[rows] = times_transposed(e, W).mul_(s)
            norms_N[rows] = torch.linalg.vector_norm(e, dim=1).mul_(s[:, 0])
            g_HV = plus_product(g_HV, xs_NH[rows].t().contiguous(), e)
            g_b.addmv_(e.t(), ones_N[rows])
            if due:
                J = plus_product(J, (H[rows] * s).t().contiguous(), e)
        assert g_HV is not None
        L, squares = H.t() @ H, norms_N.square().sum()
        S = gram(ng, W)
        left = squares_left(squares, L, S).clamp(min=1e-4 * squares.item())
        scale = hat.scale * norm_ratio(squares.sqrt(), left.sqrt())

        def dy_norms() -> Tensor:  # (b) of affine.py, row by row
            taken = 2 * H.square().sum(1) - ((H @ S) * H).sum(1)
            return (norms_N.square() - taken).clamp(min=0.0).sqrt()

        def x_norms() -> Tensor:
            return torch.hypot(torch.linalg.vector_norm(hat.rows, dim=1), ones_hat_N)

        a = layer.factor(N, scale, x_norms, dy_norms).item()
        g_HV.addmm_(hat.rows.t() @ H, W, beta=a, alpha=-a)
        g_b.addmv_(W.t(), H.t() @ ones_hat_N, beta=a, alpha=-a)
        found = None
        if J is not None:
            found = statistics(J * N**2, L * N**2, squares * N**2, N)
        ng.learn(state, found)
        ctx.save_for_backward(joined(dx_chunks), g_HV, g_b)
        assert g_HV.shape[1] == V
        return (joined(nll_chunks) * s_N1).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        dx_NH, g_HV, g_b = ctx.saved_tensors
        gradients = (dx_NH, g_HV.t(), g_b)
        if grad_loss.item() != 1.0:
            gradients = tuple(gradient * grad_loss for gradient in gradients)
        return (*gradients, None, None)
