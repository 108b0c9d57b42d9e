"""SGD with Kaldi's natural gradient: both sides of every affine map preconditioned.

Source      D. Povey, X. Zhang, S. Khudanpur, ICLR workshop 2015; Kaldi's
            NaturalGradientAffineComponent; max-change as in Kaldi's nnet2 and nnet3,
            and as in the code of H. Su and H. Chen, arXiv 1507.01239, 2015.
Notation    y = x W^T + b, rows = samples        x_NI, dy_NO -> inputs; derivatives of
            the *sum* over the minibatch of the loss by y: N times those of the mean
            x1_N,I+1 -> [x, 1]: the ones column of the bias is the last
            P -> preconditioning (natural_gradient.py): P(X) = (X_hat, scale)
            m -> max_change_per_sample
Gradient    x1_hat, s_in = P_in(x1);   dy_hat, s_out = P_out(dy)                 (1)
            [g_W, g_b] = s_in s_out dy_hat^T x1_hat                              (2)
            divided by N, unless `summed`                                        (3)
Max-change  bound = s_in s_out sum_n ||x1_hat_n|| ||dy_hat_n||, >= ||(2)||       (4)
            nnet2    g *= min(1, m N / (lr' bound)), lr' = lr or lr/N: (3)       (5)
            su_chen  g *= min(1, m N / bound): without the learning rate         (6)
            nnet3    map c: g_c *= min(1, m_c / (lr ||g_c||)), then all of them:
                     g *= min(1, m_all / (lr ||g||)); g = 0 if not finite        (7)
Update      theta <- theta - lr g                                                (8)
Messages    none: the preconditioners' states are this rank's own.
Invariants  alpha -> infinity or D = 1: plain SGD. (5) and (6): a step's norm is at most
            m N, and lr' m N.
Departs     from Kaldi: the mean convention (3); (5) to (7) act on the gradient that the
            strategies see, so under allreduce (5) and (6) are each rank's own and (7)
            that of the average.

How torch gives x and dy. The map's forward is replaced by an autograd function whose
backward returns dx as always and (2) as the gradient of W and b. So nothing is computed
twice (hooks would leave torch's own weight gradient to be computed and thrown away),
nothing is kept that torch would not keep (x), and what arrives in `learner.grad`, and
what strategies average, *is* the preconditioned gradient. A map that is used twice in a
minibatch is preconditioned at each use; a tied embedding adds its plain gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import Optimizer

from mpilm.errors import CheckpointError, ConfigError
from mpilm.models.softmax import PADDING, Softmax
from mpilm.optim.natural_gradient import (
    NaturalGradient,
    NaturalGradientConfig,
    effective_rank,
)

Positive = Annotated[float, Meta(gt=0.0)]
MaxChange = Literal["none", "nnet2", "su_chen", "nnet3"]


@dataclass(frozen=True, kw_only=True)
class NgSgdConfig:
    """SGD with natural gradient; ranks and rates as in Kaldi's recipes."""

    lr: Positive = 0.1
    """learning rate before the schedule"""
    rank_in: Annotated[int, Meta(ge=1)] = 20
    """rank for the inputs; at most half their number (rounded up)"""
    rank_out: Annotated[int, Meta(ge=1)] = 80
    """rank for the output derivatives; at most half their number (rounded up)"""
    alpha: Annotated[float, Meta(ge=0.0)] = 4.0
    """smoothing: how much of the mean eigenvalue is added to all"""
    num_samples_history: Positive = 2000.0
    """rows after which an old minibatch counts 1/e"""
    update_period: Annotated[int, Meta(ge=1)] = 4
    """minibatches per update of the estimates"""
    summed: bool = False
    """whether the gradient is the sum over the minibatch, as in Kaldi, or the mean"""
    max_change: MaxChange = "nnet3"
    """which published limit of a step holds"""
    max_change_per_sample: Positive = 0.075
    """limit per row of nnet2 and su_chen"""
    max_change_map: Positive = 0.75
    """nnet3: largest norm of a step of one affine map"""
    max_change_all: Positive = 2.0
    """nnet3: largest norm of a step of the whole model"""

    def preconditioner(self, rank: int, D: int) -> NaturalGradient:
        """Return one for rows of D values (for inputs: without the ones column)."""
        config = NaturalGradientConfig(
            rank=min(rank, (D + 1) // 2),
            alpha=self.alpha,
            num_samples_history=self.num_samples_history,
            update_period=self.update_period,
        )
        return NaturalGradient(config)


class AffineMap:
    """One layer y = x W^T + b and its two preconditioners.

    name     of the module in the model
    module   has `weight` (O, I) and `bias` (O,) or None
    sides    "in", "out" -> preconditioner and the dimension of its rows
    rate     returns the learning rate; the optimiser sets it
    """

    def __init__(self, name: str, module: nn.Module, config: NgSgdConfig) -> None:
        self.name, self.module, self.config = name, module, config
        weight: Any = module.weight
        O, I = weight.shape  # noqa: E741
        self.sides = {
            "in": (config.preconditioner(config.rank_in, I), I + self.has_bias),
            "out": (config.preconditioner(config.rank_out, O), O),
        }
        self.rate: Callable[[], float] = lambda: config.lr

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias, thus a ones column."""
        return self.module.bias is not None

    def __call__(self, x: Tensor) -> Tensor:
        """Return y, (..., O), for x of (..., I)."""
        y: Tensor = _Affine.apply(x, self.module.weight, self.module.bias, self)
        return y

    def gradient(self, x_NI: Tensor, dy_NO: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return g_W (O, I) and g_b (O,) or None: (1) to (6).

        Args:
            x_NI: inputs.
            dy_NO: derivatives of the mean loss.
        """
        N, I = x_NI.shape  # noqa: E741
        if self.has_bias:
            x_NI = torch.cat([x_NI, x_NI.new_ones(N, 1)], dim=1)
        x_hat, s_in = self.sides["in"][0](x_NI)  # (1)
        dy_hat, s_out = self.sides["out"][0](dy_NO * N)
        scale = s_in * s_out * self._limit(x_hat, dy_hat, s_in * s_out)
        if not self.config.summed:
            scale = scale / N  # (3)
        gradient = (dy_hat.t() @ x_hat).mul_(scale)  # (2)
        return gradient[:, :I], gradient[:, I] if self.has_bias else None

    def _limit(self, x_hat: Tensor, dy_hat: Tensor, scale: Tensor) -> Tensor | float:
        """Return the factor of (5) or (6); 1 where another form holds."""
        form, N = self.config.max_change, len(x_hat)
        if form not in ("nnet2", "su_chen"):
            return 1.0
        norms = torch.linalg.vector_norm(x_hat, dim=1)
        bound = scale * (norms @ torch.linalg.vector_norm(dy_hat, dim=1))  # (4)
        if form == "nnet2":
            bound = bound * self.rate() / (1 if self.config.summed else N)
        limit = self.config.max_change_per_sample * N
        return (limit / bound).clamp(max=1.0)  # a bound of 0 gives 1

    def parameters(self) -> Iterator[Tensor]:
        """Yield W, and b if there is one."""
        return self.module.parameters(recurse=False)


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


def precondition_(model: nn.Module, config: NgSgdConfig) -> list[AffineMap]:
    """Let every nn.Linear and Softmax of `model` give preconditioned gradients.

    Other layers, and maps with frozen parameters, keep their plain mean gradient.

    Raises:
        ConfigError: no affine map; or `summed` while other layers have parameters,
            whose gradient is a mean.
    """
    maps: list[AffineMap] = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        trained = [parameter for parameter in own if parameter.requires_grad]
        # exactly these types: subclasses of nn.Linear may not call forward
        if type(module) in (nn.Linear, Softmax) and len(trained) == len(own):
            layer = AffineMap(name, module, config)
            forward = partial(_softmax, layer) if type(module) is Softmax else layer
            module.forward = forward
            maps.append(layer)
        elif trained and config.summed:
            raise ConfigError(f"optim.summed: {name or 'model'} is no affine map")
    if not maps:
        raise ConfigError("optim: the model has no affine maps to precondition")
    return maps


def _softmax(layer: AffineMap, x_NH: Tensor, targets_N: Tensor) -> Tensor:
    """Return the mean cross-entropy, as Softmax.forward does, through `layer`."""
    nll = F.cross_entropy(layer(x_NH), targets_N, ignore_index=PADDING, reduction="sum")
    return nll / (targets_N != PADDING).sum().clamp(min=1)


class NgSgd(Optimizer):
    """theta <- theta - lr g (8), with nnet3's max-change (7); no momentum.

        maps = precondition_(model, config)
        learner = Learner(model, batches, partial(NgSgd, maps=maps, config=config))

    Args:
        parameters: to train: the model's own, or one vector that they are views of.
        maps: what `precondition_` returned.
        config: the same as there.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        *,
        maps: Sequence[AffineMap],
        config: NgSgdConfig,
    ) -> None:
        super().__init__(parameters, {"lr": config.lr})
        self.maps, self.config = maps, config
        self._expose()
        for layer in maps:
            layer.rate = self._rate

    def _rate(self) -> float:
        return float(self.param_groups[0]["lr"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step (8). There is no closure: it would learn twice."""
        pairs = [(p, p.grad) for p in self._parameters() if p.grad is not None]
        if self.config.max_change == "nnet3":
            self._limit_([gradient for _, gradient in pairs])
        for parameter, gradient in pairs:
            parameter.add_(gradient, alpha=-self._rate())

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _limit_(self, gradients: list[Tensor]) -> None:
        """Scale the gradient as (7) has it. Nothing waits for a GPU."""
        lr = self._rate()
        for layer in self.maps:
            own = [p.grad for p in layer.parameters() if p.grad is not None]
            if own:
                factor = self.config.max_change_map / (lr * _joint_norm(own))
                torch._foreach_mul_(own, factor.clamp(max=1.0))
        norm = _joint_norm(gradients)
        factor = (self.config.max_change_all / (lr * norm)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor).masked_fill_(~norm.isfinite(), 0.0)

    def _expose(self) -> None:
        """Show the preconditioners' states as the first parameter's."""
        self.state[self._parameters()[0]] = _LiveState(self.maps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; numbers keep their types (torch would convert them).

        Raises:
            CheckpointError: it is the state of other layers or ranks.
        """
        saved = state_dict["state"].get(0, {})
        super().load_state_dict({**state_dict, "state": {}})
        self._expose()
        for layer in self.maps:
            for side, (preconditioner, D) in layer.sides.items():
                prefix = f"{layer.name}/{side}/"
                own = {
                    k.removeprefix(prefix): saved[k]
                    for k in saved
                    if k.startswith(prefix)
                }
                R = effective_rank(preconditioner.config.rank, D)
                if own and tuple(own["W"].shape) != (R, D):
                    raise CheckpointError(
                        f"natural gradient of {prefix[:-1]}: the checkpoint has"
                        f" {tuple(own['W'].shape)}, this model {(R, D)}"
                    )
                device = next(layer.parameters()).device
                preconditioner.load_state(own, device)


class _LiveState(Mapping[str, Any]):
    """The states of all preconditioners, "MAP/SIDE/KEY" -> value, read when asked."""

    def __init__(self, maps: Sequence[AffineMap]) -> None:
        self._maps = maps

    def _read(self) -> dict[str, Any]:
        return {
            f"{layer.name}/{side}/{key}": value
            for layer in self._maps
            for side, (preconditioner, _) in layer.sides.items()
            for key, value in preconditioner.state().items()
        }

    def __getitem__(self, key: str) -> Any:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def items(self) -> Any:
        """Return (key, value) pairs; one read, where Mapping's own takes one each."""
        return self._read().items()


def _joint_norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
