"""One direction of an LSTM layer whose backward pass has the gate derivatives in hand.

Source      S. Hochreiter and J. Schmidhuber, 1997, with the forget gate of F. Gers et
            al., 2000: the equations, the names and the order of gates of nn.LSTM.
Notation    x_TBI, h_TBH, c_TBH; ' means the step before (for the way back: after)
            z -> the gates' pre-activations, a -> i, f, g, o: 4 blocks of H
            dv -> derivative of the loss by v;  * elementwise
Forward     z = x W_ih^T + b_ih + b_hh: one product for all steps               (1)
            z_t += h' W_hh^T                                   step by step     (2)
            i, f, g, o = sigmoid, sigmoid, tanh, sigmoid of z_t                 (3)
            c_t = f c' + i g,   h_t = o tanh(c_t)                               (4)
Backward    for all steps at once, from what (3) and (4) left:
            A = o (1 - tanh(c)^2),   Q = tanh(c) o (1 - o)
            P_i, P_f, P_g = g i (1 - i),  c' f (1 - f),  i (1 - g^2)            (5)
            step by step, the other way:
            dh = dy_t + dz_next W_hh                                            (6)
            dc = (dc f)_next + dh A                                             (7)
            dz_t = dc P_i, dc P_f, dc P_g, dh Q                                 (8)
            then, for all steps at once:
            dx = dz W_ih                                                        (9)
            dW_ih = dz^T x,  dW_hh = dz^T h',  db = sum dz                     (10)
Departs     nowhere: the numbers are nn.LSTM's to rounding.

Only (2) to (4) and (6) to (8) are left in the loops: a product of B rows, as in any
LSTM, and 7 and 4 elementwise operations that write into memory laid out beforehand.
Natural gradient puts its own rule in place of (10): `Rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# From x (T, B, I), h' (T, B, H), dz (T, B, 4H) to dW_ih, dW_hh, db.
Rule = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def plain_rule(
    x_TBI: Tensor, h_TBH: Tensor, dz_TBG: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight_ih, weight_hh and of either bias (10)."""
    dz_NG = dz_TBG.flatten(0, 1)
    dW_ih = dz_NG.t() @ x_TBI.flatten(0, 1)
    return dW_ih, dz_NG.t() @ h_TBH.flatten(0, 1), dz_NG.sum(0)


def lstm_layer(
    x_TBI: Tensor,
    state: tuple[Tensor, Tensor],
    weights: tuple[Tensor, ...],
    *,
    reverse: bool = False,
    rule: Rule = plain_rule,
) -> tuple[Tensor, Tensor]:
    """Return h (T, B, H) and the last c (B, H).

    Args:
        x_TBI: inputs, T >= 1.
        state: h and c (B, H) before the first step.
        weights: weight_ih (4H, I), weight_hh (4H, H), bias_ih, bias_hh (4H,).
        reverse: whether it runs from the last step to the first.
        rule: gives the weights' gradients.
    """
    h_TBH, c_BH = _LstmLayer.apply(x_TBI, *state, *weights, reverse, rule)
    return h_TBH, c_BH


class _LstmLayer(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917, torch passes arguments by position only
        ctx: Any,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        reverse: bool,
        rule: Rule,
    ) -> tuple[Tensor, Tensor]:
        T, B, _ = x.shape
        H = w_hh.shape[1]
        a = F.linear(x, w_ih, b_ih + b_hh)  # (1)
        h, c = x.new_empty(T + 1, B, H), x.new_empty(T + 1, B, H)
        tanh_c = x.new_empty(T, B, H)
        start = T if reverse else 0
        h[start], c[start] = h_0, c_0
        w_t = w_hh.t().contiguous()  # a third off the time of (2), MKL, H = 256
        sigmoids, squash, out = a[..., : 2 * H], a[..., 2 * H : 3 * H], a[..., 3 * H :]
        parts = (a, sigmoids, sigmoids[..., :H], sigmoids[..., H:], squash, out, tanh_c)
        steps = list(zip(*(part.unbind(0) for part in parts), strict=True))
        hs, cs = h.unbind(0), c.unbind(0)
        for t in _order(T, reverse):
            z, i_f, i, f, g, o, tanh = steps[t]
            before, now = (t + 1, t) if reverse else (t, t + 1)
            torch.addmm(z, hs[before], w_t, out=z)  # (2)
            i_f.sigmoid_()  # (3)
            g.tanh_()
            o.sigmoid_()
            torch.mul(f, cs[before], out=cs[now]).addcmul_(i, g)  # (4)
            torch.mul(o, torch.tanh(cs[now], out=tanh), out=hs[now])
        ctx.save_for_backward(x, w_ih, w_hh, a, h, c, tanh_c)
        ctx.reverse, ctx.rule = reverse, rule
        ctx.set_materialize_grads(False)
        y = h[:-1] if reverse else h[1:]
        return y, c[T - start].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dc_last: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, w_ih, w_hh, a, h, c, tanh_c = ctx.saved_tensors
        reverse = ctx.reverse
        T, B, H = tanh_c.shape
        before = slice(1, None) if reverse else slice(0, -1)
        i, f, g, o = a.view(T, B, 4, H).unbind(2)
        A = torch.addcmul(o, o * tanh_c, tanh_c, value=-1.0)  # (5)
        dz = torch.empty_like(a).view(T, B, 4, H)
        p_i, p_f, p_g, q = dz.unbind(2)
        torch.addcmul(i, i, i, value=-1.0, out=p_i).mul_(g)
        torch.addcmul(f, f, f, value=-1.0, out=p_f).mul_(c[before])
        torch.addcmul(i, i * g, g, value=-1.0, out=p_g)
        torch.addcmul(o, o, o, value=-1.0, out=q).mul_(tanh_c)
        dys = torch.zeros_like(tanh_c) if dy is None else dy
        dc = x.new_empty(B, H)
        carry = torch.zeros_like(dc) if dc_last is None else dc_last.clone()
        dc_3 = dc[:, None].expand(B, 3, H)
        flat = dz.view(T, B, 4 * H)
        parts = (flat, dz[:, :, :3], q, A, f, dys)
        steps = list(zip(*(part.unbind(0) for part in parts), strict=True))
        dz_next: Tensor | None = None
        for t in _order(T, not reverse):
            dz_t, dz_ifg, dz_o, A_t, f_t, dh = steps[t]
            if dz_next is not None:
                dh = torch.addmm(dh, dz_next, w_hh)  # (6)
            torch.addcmul(carry, dh, A_t, out=dc)  # (7)
            torch.mul(dc, f_t, out=carry)
            dz_ifg.mul_(dc_3)  # (8)
            dz_o.mul_(dh)
            dz_next = dz_t
        assert dz_next is not None
        needs = ctx.needs_input_grad
        dx = (flat.view(T * B, -1) @ w_ih).view(x.shape) if needs[0] else None  # (9)
        dh_0 = dz_next @ w_hh if needs[1] else None
        dc_0 = carry if needs[2] else None
        dW_ih, dW_hh, db = ctx.rule(x, h[before], flat)
        return dx, dh_0, dc_0, dW_ih, dW_hh, db, db, None, None


def _order(T: int, falling: bool) -> range:
    return range(T - 1, -1, -1) if falling else range(T)
