"""Periodic model averaging: local steps, then the mean of all models.

Source      H. Su and H. Chen, "Experiments on Parallel Training of Deep Neural Network
            using Model Averaging", arXiv 1507.01239, 2015.
Notation    m       -> comm.size, ranks
            n       -> period, minibatches between two averages
            F       -> period_samples, the same in samples of one rank
            alpha   -> lr, multiplied by m for plain averaging (linear scaling)
Update      theta <- theta - alpha * P(grad)              every minibatch      (1)
            theta <- (1/m) sum_i theta_i                  every n minibatches  (2)
Messages    one Allreduce of 4P bytes every n minibatches, blocking; of row tables only
            the rows that somebody has updated since the last (shared_rows.py).

            rank 0: step step step |=average=| step step step |=average=|
            rank 1: step step step |=average=| step step step |=average=|
Invariants  n = 1 with plain SGD is `allreduce`, to rounding.
            All ranks hold the same theta after (2), and take part in the same number
            of averages: minibatches have the same number of samples on all ranks.
            With `leave_out` (2) is the mean of the ranks whose mean loss since the last
            average is finite, as their model is, and at most so much above the lowest
            (Kaldi's rule for averages: 1.0); the others go on from it.
Departs     from the paper in: `leave_out`; an optional warm-up, in which every
            minibatch is averaged; momentum (the paper has none) is kept, reset or
            averaged at (2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from mpilm.errors import ConfigError
from mpilm.learner.flat import Layout
from mpilm.strategies.base import Learner, Strategy, WireConfig
from mpilm.strategies.leave_out import LEAVING, LeaveOut, left_out_of
from mpilm.strategies.shared_rows import SharedRows, require_resting_rows


@dataclass(frozen=True, kw_only=True)
class ModelAveragingConfig(WireConfig):
    """Section [strategy] of `model_averaging`."""

    period: Annotated[int, Meta(ge=1)] = 10
    """minibatches between two averages"""
    period_samples: Annotated[int, Meta(ge=0)] = 0
    """samples of one rank between two averages; 0: use `period`"""
    warmup: Annotated[int, Meta(ge=0)] = 0
    """minibatches at the start that are averaged one by one"""
    momentum: Literal["keep", "reset", "average"] = "keep"
    """what an average does to the optimiser's moment vectors; reset: counts as well"""
    leave_out: Annotated[float, Meta(ge=0.0)] = 0.0
    """nats above the lowest loss of a rank that leave another out; 0: none is"""

    def __post_init__(self) -> None:
        if self.leave_out and self.momentum == "average":
            raise ValueError("leave_out: momentum = average takes those of all ranks")


class ModelAveraging(Strategy):
    """Local SGD with the plain mean of all models every `period` minibatches.

    moved    bytes of all averages so far, each way: moment vectors included
    leaving  who is left out; None: nobody
    """

    name = "model_averaging"
    Config = ModelAveragingConfig
    survives = True
    synchronises = True
    takes_rows = True
    saves: tuple[str, ...] = (
        *("moved", "rounds", "steps"),
        *("rows.moved", "rows.touched"),
    )
    lasting = ("rounds", "steps")

    def __init__(self, world: Any, config: ModelAveragingConfig) -> None:
        super().__init__(world, config)
        self.steps = self.rounds = self.moved = 0
        if config.leave_out:
            self.leaving = LeaveOut(config.leave_out)
            self.saves += LEAVING

    def start(self, learner: Learner) -> None:
        super().start(learner)
        self.rows = SharedRows(self.comm, learner.layout)

    def require(self, learner: Learner) -> None:
        super().require(learner)
        require_resting_rows(self.name, learner)
        if learner.layout.tables and self.config.leave_out:
            raise ConfigError(
                "strategy.leave_out: takes whole models; with model.sparse = true it"
                " must be 0"
            )

    def step(self, learner: Learner) -> Any:
        before = learner.samples
        loss = learner.gradient()
        learner.update()  # (1)
        self.rows.touch(learner)
        self.steps += 1
        if self.leaving:
            self.leaving.note(loss)
        if self.is_due(before, learner.samples):
            if learner.layout.tables:
                part = self.rows.agree(slice(0, learner.layout.size))
                for piece in part.pieces():
                    values = piece.of(learner.theta)
                    self.average_(values)  # (2)
                    piece.set_(learner.theta, values)
            else:
                self.average_those_in_(learner)  # (2)
            self.rounds += 1
            self.synchronised(slice(0, learner.layout.size), learner.theta)
            self.treat_moments(learner)
        return loss

    def is_due(self, before: int, samples: int) -> bool:
        """Return whether to average now; the same on every rank."""
        config = self.config
        if self.steps <= config.warmup:
            return True
        if config.period_samples:
            return before // config.period_samples < samples // config.period_samples
        return (self.steps - config.warmup) % config.period == 0

    def treat_moments(self, learner: Learner) -> None:
        """Keep, reset or average the optimiser's vectors after the model jumped."""
        if self.comm.size == 1:
            return
        if self.config.momentum == "reset":
            learner.reset_moments()
        elif self.config.momentum == "average":  # counts of steps are equal anyway
            for vector in learner.moments().values():
                self.average_(vector)

    def average_those_in_(self, learner: Learner) -> None:
        """Replace theta by its mean over the ranks that are not left out.

        Communicates: with `leave_out` an Allreduce of 8 bytes for each rank before it.
        """
        theta, leaving = learner.theta, self.leaving
        if leaving is None or self.comm.size == 1:
            self.average_(theta)
            return
        leaving.begin_round(theta)
        is_out_K, moved = left_out_of(self.comm, leaving)
        self.moved += moved
        if leaving.out_C[0]:
            theta[:] = 0.0
        self.average_(theta)
        if is_out_K.any():
            theta *= self.comm.size / int((~is_out_K).sum())
        if leaving.out_C[0]:
            learner.reset_moments()  # of a model that is no more

    def average_(self, vector: Any) -> None:
        """Replace `vector` by its mean over ranks; count its bytes."""
        self.mean_(vector)
        self.moved += self.allreduced_bytes(len(vector))

    def metrics(self) -> dict[str, Any]:
        out = {"left_out": self.leaving.num_rounds} if self.leaving else {}
        return self.averages(self.rounds) | out

    def moved_bytes(self, layout: Layout) -> tuple[int, int]:
        moved = self.moved + self.rows.moved
        return moved, moved
