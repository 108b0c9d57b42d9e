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
Departs     from Kaldi: the mean convention (3); both biases of an LSTM get g_b, as in
            plain torch, so that their sum moves twice as far as one bias would; the
            rows of an embedding are the output derivatives of the minibatch's tokens
            (Kaldi's rnnlm: the rows of the summed derivative, one per word), and its
            one-hot inputs are not preconditioned. (5) to (7) act on the gradient that
            the strategies see, so under allreduce (5) and (6) are each rank's own and
            (7) that of the average.

How torch gives x and dy. The map's forward is replaced by an autograd function whose
backward returns dx as always and (2) as the gradient of W and b (ng_layers.py). So
nothing is computed twice (hooks would leave torch's own weight gradient to be computed
and thrown away), nothing is kept that torch would not keep (x), and what arrives in
`learner.grad`, and what strategies average, *is* the preconditioned gradient. A map
that is used twice in a minibatch is preconditioned at each use; weights tied to an
embedding get the sum of both preconditioned gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mpilm.errors import CheckpointError, ConfigError
from mpilm.optim.affine import AffineMap
from mpilm.optim.configs import NgSgdConfig
from mpilm.optim.natural_gradient import effective_rank
from mpilm.optim.ng_layers import maps_of
from mpilm.storage.saved import nested, under


def precondition_(model: nn.Module, config: NgSgdConfig) -> list[AffineMap]:
    """Let the affine maps of `model` give preconditioned gradients; return them.

    Which layers that are: `ng_layers.maps_of`. Other layers, and those with frozen
    parameters, keep their plain mean gradient.

    Raises:
        ConfigError: no affine map; or `summed` while other layers have parameters,
            whose gradient is a mean.
    """
    maps: list[AffineMap] = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        trained = [parameter for parameter in own if parameter.requires_grad]
        found = []
        if trained and len(trained) == len(own):
            found = maps_of(name, module, config)
        if trained and not found and config.summed:
            raise ConfigError(f"optim.summed: {name or 'model'} is no affine map")
        maps += found
    if not maps:
        raise ConfigError("optim: the model has no affine maps to precondition")
    return maps


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
        own = {id(p): p.numel() for layer in maps for p in layer.owned}
        self._maps_are_all = sum(own.values()) == sum(p.numel() for p in parameters)
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
        factor: float | None = 1.0
        if self.config.max_change == "nnet3" and pairs:
            gradients = [gradient for _, gradient in pairs]
            factor = self._limit_(gradients, looks=not gradients[0].is_cuda)
        if factor is None:  # not finite
            return
        alpha = -self._rate() * factor
        if pairs and pairs[0][0].is_cuda:  # a kernel for all
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=alpha)
            return
        for parameter, gradient in pairs:
            parameter.add_(gradient, alpha=alpha)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _gradients_of_maps(self) -> list[list[Tensor]]:
        """Return the gradients of each map that has any; tied ones with the first."""
        seen: set[int] = set()
        found = []
        for layer in self.maps:
            own = [p.grad for p in layer.owned if p.grad is not None]
            own = [g for g in own if g.data_ptr() not in seen]
            seen.update(g.data_ptr() for g in own)
            if own:
                found.append(own)
        return found

    def _limit_(self, gradients: list[Tensor], *, looks: bool) -> float | None:
        """Limit every map by (7); return the factor of the whole, None for g = 0.

        All norms are taken at once, for on a GPU kernels are what costs.

        Args:
            looks: whether factors may be looked at, which on a GPU would wait: then the
                gradients are read once, and written only where a map is over its limit;
                else all of them are scaled here.
        """
        lr, config = self._rate(), self.config
        maps = self._gradients_of_maps()
        if maps:
            norms_P = torch.stack(torch._foreach_norm([g for own in maps for g in own]))
            parts = norms_P.split([len(own) for own in maps])
            norms_M = torch.stack(torch._foreach_norm(list(parts)))
            factors_M = (config.max_change_map / (lr * norms_M)).clamp(max=1.0)
            for own, factor in zip(maps, factors_M.unbind(), strict=True):
                if not looks or factor < 1.0:
                    torch._foreach_mul_(own, factor)
        if maps and self._maps_are_all:
            norm = torch.linalg.vector_norm(norms_M * factors_M)
        else:
            norm = _joint_norm(gradients)
        factor = (config.max_change_all / (lr * norm)).clamp(max=1.0)
        if looks:
            return factor.item() if norm.isfinite() else None
        torch._foreach_mul_(gradients, factor)
        is_bad = ~norm.isfinite()
        for gradient in gradients:
            gradient.masked_fill_(is_bad, 0.0)
        return 1.0

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
                place = f"{layer.name}/{side}"
                own = under(place, saved)
                R = effective_rank(preconditioner.config.rank, D)
                if own and tuple(own["W"].shape) != (R, D):
                    raise CheckpointError(
                        f"natural gradient of {place}: the checkpoint has"
                        f" {tuple(own['W'].shape)}, this model {(R, D)}"
                    )
                device = layer.owned[0].device
                preconditioner.load_state(own, device)


class _LiveState(Mapping[str, Any]):
    """The states of all preconditioners, "MAP/SIDE/KEY" -> value, read when asked."""

    def __init__(self, maps: Sequence[AffineMap]) -> None:
        self._maps = maps

    def _read(self) -> dict[str, Any]:
        return {
            name: value
            for layer in self._maps
            for side, (preconditioner, _) in layer.sides.items()
            for name, value in nested(
                f"{layer.name}/{side}", preconditioner.state()
            ).items()
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
