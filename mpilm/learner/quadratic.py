"""A learner without torch, data or a network: for protocols, scaling and tests.

Notation    theta -> theta, (P,);  c -> target, (P,);  xi -> noise of a minibatch, (P,)
Loss        L(theta) = 1/2 |theta - c|^2                                       (1)
Gradient    g = theta - c + noise * xi,  xi ~ N(0, 1)                          (2)
Update      velocity <- momentum * velocity + g;  theta <- theta - lr * velocity
                                                                               (3)
Rows        of row tables a gradient has the rows of a random half of the ids; others
            rest, and there is no momentum of rows. `grad` is (2) before the tables.
Invariants  every rank has the same curvature, so the mean of all models follows plain
            gradient descent on the mean loss, whose minimum is the mean target.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from mpilm.learner.flat import Layout, Rows
from mpilm.vectors import chunked, is_finite


def layers(num_parameters: int, num_layers: int = 4) -> Layout:
    """Return a layout of equal layers, each a weight and a bias, each a component.

    >>> [(s.name, s.size) for s in layers(10, 2)]
    [('layer0.weight', 4), ('layer0.bias', 1), ('layer1.weight', 4), ('layer1.bias', 1)]
    """
    parts = []
    for index in range(num_layers):
        size = (index + 1) * num_parameters // num_layers
        size -= index * num_parameters // num_layers
        bias = size // 4
        name = f"layer{index}"
        parts.append((f"{name}.weight", (size - bias,), name))
        if bias:
            parts.append((f"{name}.bias", (bias,), name))
    return Layout.of(parts)


class ProtocolLearner:
    """One rank's quadratic; `mpilm.strategies.base.Learner` in numpy.

    Args:
        size: number of parameters, P.
        compute: `world.compute`.
        seed: of the first model, the target and the noise; a different one per rank.
        target: minimum of this rank's loss, (P,); drawn from the seed if None.
        lr: learning rate.
        momentum: of the update (3); with 0 there is no velocity.
        noise: standard deviation of the gradient noise.
        samples_per_step: samples in a minibatch.
        layout: where parameters lie; `layers(size)` if None.
        spoils: whether the gradient of a step, of a number from 0 on, is not finite;
            such a step changes nothing, see `Learner.update`.
    """

    def __init__(
        self,
        size: int,
        *,
        compute: Callable[..., Any],
        seed: int,
        target: Any = None,
        lr: float = 0.1,
        momentum: float = 0.0,
        noise: float = 0.0,
        samples_per_step: int = 1,
        layout: Layout | None = None,
        spoils: Callable[[int], bool] | None = None,
    ) -> None:
        self.layout = layers(size) if layout is None else layout
        assert self.layout.size == size, "the layout has another size"
        self.compute = compute
        self.random = np.random.default_rng(seed)
        self.theta = self.random.standard_normal(size, dtype=np.float32)
        drawn = self.random.standard_normal(size, dtype=np.float32)
        self.target = drawn if target is None else np.asarray(target, np.float32)
        self.grad = np.zeros(self.layout.num_dense, np.float32)
        self.rows: dict[str, Rows] = {}
        self._drawn: dict[str, Any] | None = None
        self.velocity = np.zeros(self.grad.size if momentum else 0, np.float32)
        self.lr, self.momentum, self.noise = lr, momentum, noise
        self.samples_per_step = samples_per_step
        self.samples = 0
        self.spoils, self.num_skipped = spoils, 0
        self.refresh: Callable[[], None] = lambda: None
        tables = self.layout.tables
        dense = [s for s in self.layout.segments if not s.is_table]
        self._parts = [segment.slice for segment in reversed(dense)]
        self._tables = {s.name: (s.slice, (s.shape[0], s.row_width)) for s in tables}

    def loss(self) -> float:
        """Return (1) at theta."""
        difference = self.theta - self.target
        return 0.5 * float(difference @ difference)

    def gradient(
        self, ready: Callable[[slice], None] | None = None, *, scale: float = 1.0
    ) -> float:
        """Set `grad` by (2) at theta, last layers first; return the loss (1)."""
        loss = self.compute(partial(self._work, scale=scale), ready)
        self.samples += self.samples_per_step
        return loss

    def _work(self, notify: Callable[[slice], None], *, scale: float) -> float:
        if self._tables:
            loss = self.loss()
            end = self.grad.size
            np.subtract(self.theta[:end], self.target[:end], out=self.grad)
        else:
            np.subtract(self.theta, self.target, out=self.grad)
            loss = 0.5 * float(self.grad @ self.grad)
        if self.noise:
            xi = self.random.standard_normal(self.grad.size, dtype=np.float32)
            self.grad += np.float32(self.noise) * xi
        if scale != 1.0:
            self.grad *= np.float32(scale)
        drawn, self._drawn = self._drawn or self.draw(), None
        for name, (where, shape) in self._tables.items():
            difference = self.theta[where] - self.target[where]
            values = difference.reshape(shape)[drawn[name]] * np.float32(scale)
            self.rows[name] = Rows(drawn[name], values)
        if self.spoils is not None and self.spoils(self.samples):
            self.grad[:] = np.nan
            for rows in self.rows.values():
                rows.values[:] = np.nan
        for part in self._parts:
            notify(part)
        return loss

    def draw(self) -> dict[str, Any]:
        """Return the rows that the next gradient reads: half of each table."""
        self._drawn = {
            name: np.flatnonzero(self.random.random(shape[0]) < 0.5)
            for name, (_, shape) in self._tables.items()
        }
        return self._drawn

    def update(self) -> None:
        """Take one step (3); none with a gradient that is not finite."""
        if not self.has_finite_gradient():
            self.num_skipped += 1
            return
        direction = self.grad
        if self.momentum:
            self.velocity *= self.momentum
            self.velocity += self.grad
            direction = self.velocity
        for theta, step in chunked(self.theta[: direction.size], direction):
            theta -= np.float32(self.lr) * step
        for name, (ids, values) in self.rows.items():
            where, shape = self._tables[name]
            self.theta[where].reshape(shape)[ids] -= np.float32(self.lr) * values

    def has_finite_gradient(self) -> bool:
        """Return whether a step can be taken; it is not looked at without `spoils`."""
        if self.spoils is None:
            return True
        parts = (self.grad, *(rows.values for rows in self.rows.values()))
        return all(map(is_finite, parts))

    @property
    def is_plain_sgd(self) -> bool:
        """Whether the next update is theta <- theta - lr * g."""
        return not self.momentum and self.has_finite_gradient()

    @property
    def rows_rest(self) -> bool:
        """Whether rows stay without a gradient: they have no momentum."""
        return True

    def moments(self) -> dict[str, Any]:
        """Return the velocity, if there is one."""
        return {"velocity": self.velocity} if self.momentum else {}

    def reset_moments(self) -> None:
        """Set the velocity to zero."""
        self.velocity[:] = 0.0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {
            "theta": self.theta.copy(),
            "velocity": self.velocity.copy(),
            "samples": self.samples,
            "lr": self.lr,
            "random": json.dumps(self.random.bit_generator.state),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self.theta[:] = state["theta"]
        self.velocity[:] = state["velocity"]
        self.samples = int(state["samples"])
        self.lr = float(state["lr"])
        self.random.bit_generator.state = json.loads(state["random"])
