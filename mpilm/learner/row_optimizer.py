"""Row-sparse updates: an optimiser's step of the rows of a minibatch, the others later.

Notation    theta, g, lr, mu -> momentum, lambda -> weight_decay, beta1, beta2, eps: as
            in optim/build.py, of one row
            t -> count, steps so far    a -> age, steps since the row was last updated
Update      a row with a gradient: a dense step.
            Any other row has g = 0 in the dense step, and that is done later, when a
            minibatch reads the row, for all steps at once:
            sgd       (theta, v) <- M(a) (theta, v),  M a 2 x 2 matrix of numbers    (1)
                      M(a + 1) = [one dense step with g = 0 and this step's lr] M(a) (2)
            adamw     m <- beta1^a m,  s <- beta2^a s                                (3)
                      theta <- D(a) theta - C(a) m / (sqrt(s) + eps)                 (4)
                      D, C by the recursion of theta in a dense step with g = 0
Invariants  sgd, with momentum, nesterov and weight decay under any schedule of lr: the
            dense step, to rounding. adamw: to eps / sqrt(s) besides, see Departs.
Departs     in (4), eps is taken at the row's last step; in a dense step it stays as it
            is while s falls. There is no closed form with it.
Cost        M, D and C of the last HISTORY steps, one number each. After so many steps
            all rows are brought up to date, and whenever somebody looks at theta.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, optim

from mpilm.errors import CheckpointError, ModelError
from mpilm.learner.flat import Rows
from mpilm.learner.rest import restored, stored

# Steps that a row may lag behind. Chosen: the pass over all rows after so many costs
# less than 1% of them at V = 267,735.
HISTORY = 1024
CHUNK = 4096  # rows brought up to date together


class Table:
    """A segment of theta whose gradient is rows, with the optimiser's vectors of it.

    theta    (V, width), a view
    moments  (V, width) each, by name
    last     (V,) int64, the step that a row was brought to; -1: none so far
    """

    def __init__(self, theta: Tensor, keys: tuple[str, ...]) -> None:
        self.theta = theta
        self.moments = {key: torch.zeros_like(theta) for key in keys}
        self.last = torch.full((len(theta),), -1, device=theta.device)

    def read(self, ids: Tensor) -> list[Tensor]:
        """Return copies of rows of theta and of each moment."""
        vectors = (self.theta, *self.moments.values())
        return [vector.index_select(0, ids) for vector in vectors]

    def write(self, ids: Tensor, values: list[Tensor], count: int) -> None:
        """Set what `read` returned; the rows are at step `count`."""
        vectors = (self.theta, *self.moments.values())
        for vector, value in zip(vectors, values, strict=True):
            vector.index_copy_(0, ids, value)
        self.last.index_fill_(0, ids, count)


class RowOptimizer(ABC):
    """The tables' part of a torch optimiser's step, with its settings.

    Args:
        optimizer: of one group; its lr may change from step to step.
        tables: segments of theta by name, (V, width) each.
        keys: names of the moments.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        tables: Mapping[str, Tensor],
        keys: tuple[str, ...] = (),
    ) -> None:
        self.torch = optimizer
        self.tables = {name: Table(theta, keys) for name, theta in tables.items()}
        self.count = self.flushed = 0  # steps; at the last time that all rows were

    @property
    def group(self) -> dict[str, Any]:
        """The optimiser's settings."""
        return self.torch.param_groups[0]

    @property
    def rests(self) -> bool:
        """Whether a row without a gradient stays as it is."""
        return False

    @torch.no_grad()
    def step(self, rows: Mapping[str, Rows]) -> None:
        """Take one step; `rows` are the gradients, by segment."""
        if self.rests:
            for name, (ids, g) in rows.items():
                self.tables[name].theta.index_add_(0, ids, g, alpha=-self.group["lr"])
            return
        if self.count - self.flushed == HISTORY:
            self.catch_up()
        for name, (ids, g) in rows.items():
            values = self.brought_up(self.tables[name], ids)
            self.dense_(values, g)
            self.tables[name].write(ids, values, self.count + 1)
        self.go_on()
        self.count += 1

    @torch.no_grad()
    def bring_up(self, ids: Mapping[str, Tensor]) -> None:
        """Bring rows of some tables to the present step, before they are read."""
        for name, read in ids.items():
            table = self.tables[name]
            table.write(read, self.brought_up(table, read), self.count)

    def brought_up(self, table: Table, ids: Tensor) -> list[Tensor]:
        """Return rows of theta and moments as after `count` steps (1), (3), (4)."""
        last = table.last.index_select(0, ids)
        age = self.count - torch.where(last < 0, self.flushed, last)
        values = table.read(ids)
        if age.any():
            self.age_(values, age)
        return values

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring all rows to the present step."""
        if self.flushed == self.count:
            return
        for table in self.tables.values():
            late = table.last != self.count
            if not self.group["weight_decay"]:
                late &= table.last >= 0  # the others have no moments yet
            for ids in late.nonzero()[:, 0].split(CHUNK):
                is_new = table.last[ids] < 0
                table.write(ids, self.brought_up(table, ids), self.count)
                table.last[ids[is_new]] = -1
        self.flushed = self.count
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Set M, or D and C, to those of age 0."""

    @abstractmethod
    def go_on(self) -> None:
        """Let M, or D and C, be those of one step more (2)."""

    @abstractmethod
    def age_(self, values: list[Tensor], age: Tensor) -> None:
        """Do `age` steps without gradient to theta and moments, in place; age (n,)."""

    @abstractmethod
    def dense_(self, values: list[Tensor], g: Tensor) -> None:
        """Do one dense step to theta and moments, in place; g (n, width)."""

    def moments(self) -> dict[str, Tensor]:
        """Return the moments as vectors, by KEY/SEGMENT; all at the present step."""
        self.catch_up()
        return {
            f"{key}/{name}": vector.view(-1)
            for name, table in self.tables.items()
            for key, vector in table.moments.items()
        }

    def reset(self) -> None:
        """Let it begin anew: moments and the count of steps."""
        for vector in self.moments().values():
            vector.zero_()
        self._restart(0)

    def _restart(self, count: int) -> None:
        self.count = self.flushed = count
        for table in self.tables.values():
            moving = torch.zeros(len(table.theta), dtype=torch.bool)
            for vector in table.moments.values():
                moving |= (vector != 0.0).any(1).cpu()
            table.last.fill_(-1)
            table.last[moving.to(table.last.device)] = count
        self.begin()

    def state(self) -> dict[str, Any]:
        """Return moments and count; all rows are brought up to date for it."""
        found = {name: stored(vector) for name, vector in self.moments().items()}
        return {"count": self.count, **found}

    def read(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `load_state` takes up of what `state` returned.

        Raises:
            CheckpointError: it is of other tables, or there is none.
        """
        here = self.moments()
        if state.keys() != {"count", *here}:
            raise CheckpointError(
                "optimiser: the checkpoint has other row tables than this model"
            )
        found = {name: restored(state[name], here[name], name) for name in here}
        return {"count": int(state["count"]), "moments": found}

    def load_state(self, found: Mapping[str, Any]) -> None:
        """Take up what `read` returned; theta is set already."""
        for name, vector in self.moments().items():
            vector.copy_(found["moments"][name])
        self._restart(found["count"])


class RowSgd(RowOptimizer):
    """(1), (2)."""

    def __init__(self, optimizer: optim.SGD, tables: Mapping[str, Tensor]) -> None:
        momentum = optimizer.param_groups[0]["momentum"]
        super().__init__(optimizer, tables, ("momentum_buffer",) if momentum else ())
        self.begin()

    @property
    def rests(self) -> bool:
        return not self.group["momentum"] and not self.group["weight_decay"]

    def begin(self) -> None:
        device = next(iter(self.tables.values())).theta.device
        self.M = torch.eye(2, dtype=torch.float64, device=device)[None]

    def go_on(self) -> None:
        lr, mu, decay = (self.group[k] for k in ("lr", "momentum", "weight_decay"))
        theta, v = self.M[:, 0], self.M[:, 1]  # as multiples of what they were
        v = mu * v + decay * theta
        theta = theta - lr * (decay * theta + mu * v if self.group["nesterov"] else v)
        self.M = torch.cat([self.M[:1], torch.stack([theta, v], 1)])
        self.M[0] = torch.eye(2)

    def age_(self, values: list[Tensor], age: Tensor) -> None:
        M = self.M[age].float()[..., None]
        theta = values[0]
        if len(values) == 1:
            theta *= M[:, 0, 0]
            return
        v = values[1]
        kept = M[:, 0, 0] * theta + M[:, 0, 1] * v
        v.mul_(M[:, 1, 1]).addcmul_(M[:, 1, 0], theta)
        theta.copy_(kept)

    def dense_(self, values: list[Tensor], g: Tensor) -> None:
        lr, mu, decay = (self.group[k] for k in ("lr", "momentum", "weight_decay"))
        g = g.add(values[0], alpha=decay) if decay else g
        if mu:
            v = values[1].mul_(mu).add_(g)
            g = g.add(v, alpha=mu) if self.group["nesterov"] else v
        values[0].sub_(g, alpha=lr)


class RowAdamw(RowOptimizer):
    """(3), (4)."""

    def __init__(self, optimizer: optim.AdamW, tables: Mapping[str, Tensor]) -> None:
        super().__init__(optimizer, tables, ("exp_avg", "exp_avg_sq"))
        self.begin()

    def begin(self) -> None:
        device = next(iter(self.tables.values())).theta.device
        self.D = torch.ones(1, dtype=torch.float64, device=device)
        self.C = torch.zeros_like(self.D)

    def go_on(self) -> None:
        lr, shrunk = self.group["lr"], 1.0 - self.group["lr"] * self.decay
        beta1, beta2 = self.group["betas"]
        first, second = self.corrections()
        age = torch.arange(1, len(self.D) + 1, device=self.D.device)
        moved = lr / first * beta1**age / (beta2 ** (age / 2) / second)
        self.D = torch.cat([self.D.new_ones(1), shrunk * self.D])
        self.C = torch.cat([self.C.new_zeros(1), shrunk * self.C + moved])

    @property
    def decay(self) -> float:
        """lambda."""
        return float(self.group["weight_decay"])

    def corrections(self) -> tuple[float, float]:
        """Return 1 - beta1^n and sqrt(1 - beta2^n) of the step that is taken."""
        beta1, beta2 = self.group["betas"]
        n = self.count + 1
        return 1.0 - beta1**n, (1.0 - beta2**n) ** 0.5

    def age_(self, values: list[Tensor], age: Tensor) -> None:
        theta, m, s = values
        beta1, beta2 = self.group["betas"]
        C, D = self.C[age].float()[:, None], self.D[age].float()[:, None]
        theta.mul_(D).sub_(C * m / (s.sqrt() + self.group["eps"]))
        m *= (beta1 ** age.double()).float()[:, None]
        s *= (beta2 ** age.double()).float()[:, None]

    def dense_(self, values: list[Tensor], g: Tensor) -> None:
        theta, m, s = values
        lr, (beta1, beta2) = self.group["lr"], self.group["betas"]
        first, second = self.corrections()
        theta *= 1.0 - lr * self.decay
        m.lerp_(g, 1.0 - beta1)
        s.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
        theta.addcdiv_(
            m, (s.sqrt() / second).add_(self.group["eps"]), value=-lr / first
        )


def make_row_optimizer(
    optimizer: optim.Optimizer, tables: Mapping[str, Tensor]
) -> RowOptimizer:
    """Return what updates the rows as `optimizer` does all else.

    Raises:
        ModelError: there is no such rule for it.
    """
    group, kind = optimizer.param_groups[0], type(optimizer)
    refused = [key for key in ("maximize", "dampening", "amsgrad") if group.get(key)]
    if isinstance(group["lr"], Tensor):
        refused.append("lr as a tensor")
    if len(optimizer.param_groups) == 1 and not refused:
        if isinstance(optimizer, optim.SGD) and kind is optim.SGD:
            return RowSgd(optimizer, tables)
        if isinstance(optimizer, optim.AdamW) and kind is optim.AdamW:
            return RowAdamw(optimizer, tables)
    what = f" with {refused[0]}" if refused else ""
    raise ModelError(
        f"optimiser {kind.__name__}{what}: has no update of single rows (sparse ="
        " True); SGD and AdamW of torch in one group have, without dampening, maximize"
        " and amsgrad"
    )
