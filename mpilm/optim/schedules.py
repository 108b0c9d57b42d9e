"""Learning rate schedules: functions of global samples. No torch here.

Source      exponential and Newbob: H. Su and H. Chen, arXiv 1507.01239, 2015, schedules
            B and A; Newbob's thresholds and order of decisions as in Kaldi's
            train_scheduler.sh, which they used. Linear warm-up: P. Goyal et al.,
            "Accurate, Large Minibatch SGD", arXiv 1706.02677, 2017.
Notation    s -> samples that all ranks together have processed
            W -> warmup_samples      S -> samples of the whole training
            f -> final_ratio         E -> stages
Rate        lr(s) = lr * warmup(s) * main(max(0, s - W), S - W)                (1)
            warmup(s) = min(1, (s + 1) / W)                                    (2)
            constant      1                                                    (3)
            exponential   f^(s / S), or with E stages f^(floor(E s/S) / (E-1)) (4)
            newbob        a factor that validation losses decide, see `Newbob`
Departs     the warm-up begins near 0 (Goyal et al.: at lr / K); global samples make the
            rate independent of the number of ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

from mpilm.optim.configs import ConstantConfig, ExponentialConfig, NewbobConfig


class Choice(Protocol):
    """A schedule's name and its settings."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Any: ...


def warmup(samples: int, warmup_samples: int) -> float:
    """Return the share of the full rate after `samples` (2).

    >>> [warmup(s, 100) for s in (0, 49, 99, 500)], warmup(0, 0)
    ([0.01, 0.5, 1.0, 1.0], 1.0)
    """
    return min(1.0, (samples + 1) / warmup_samples) if warmup_samples else 1.0


def exponential(
    samples: int, total: int, *, final_ratio: float, stages: int = 0
) -> float:
    """Return rate over initial rate (4); `final_ratio` from `total` samples on.

    >>> [round(exponential(s, 100, final_ratio=0.01), 3) for s in (0, 50, 100, 200)]
    [1.0, 0.1, 0.01, 0.01]
    >>> stage = [exponential(s, 90, final_ratio=0.01, stages=3) for s in (29, 30, 89)]
    >>> [round(ratio, 3) for ratio in stage]
    [1.0, 0.1, 0.01]
    """
    progress = min(1.0, samples / max(1, total))
    if stages:
        stage = min(stages - 1, stages * samples // max(1, total))
        progress = stage / max(1, stages - 1)
    return final_ratio**progress


class Newbob:
    """Halve the rate once the validation loss gains little; then stop.

        gain = (best - loss) / best              best: lowest loss before this one
        if halving has begun and gain < stop_halving: finished
        if gain < start_halving: halving begins, and goes on to the end
        if halving has begun: factor <- factor * config.factor

    factor     what the rate is multiplied by
    best       lowest loss so far (None: none seen)
    halving    whether halving has begun
    finished   whether training is to end

    >>> newbob = Newbob(NewbobConfig())
    >>> for loss in (5.0, 4.0, 3.99, 3.5, 3.5): newbob.observe(loss)
    >>> newbob.factor, newbob.finished
    (0.25, True)
    """

    def __init__(self, config: NewbobConfig) -> None:
        self.config = config
        self.factor = 1.0
        self.best: float | None = None
        self.halving = False
        self.finished = False

    def observe(self, loss: float) -> None:
        """Take note of a validation loss (mean NLL > 0)."""
        if self.best is None:
            self.best = loss
            return
        gain = (self.best - loss) / self.best
        self.best = min(self.best, loss)
        if self.halving and gain < self.config.stop_halving:
            self.finished = True
            return
        self.halving = self.halving or gain < self.config.start_halving
        if self.halving:
            self.factor *= self.config.factor


class Schedule:
    """The learning rate of a run (1).

    Args:
        config: a config of this module's schedules.
        lr: the rate before the schedule, > 0.
        samples: samples of the whole training, all ranks together.
    """

    def __init__(
        self,
        config: ConstantConfig | ExponentialConfig | NewbobConfig,
        *,
        lr: float,
        samples: int,
    ) -> None:
        self.config, self.full_lr, self.samples = config, lr, samples
        self.newbob = Newbob(config) if isinstance(config, NewbobConfig) else None

    def lr(self, samples: int) -> float:
        """Return the rate to use after `samples` samples of all ranks."""
        config = self.config
        rate = self.full_lr * warmup(samples, config.warmup_samples)
        if isinstance(config, ExponentialConfig):
            rate *= exponential(
                max(0, samples - config.warmup_samples),
                self.samples - config.warmup_samples,
                final_ratio=config.final_ratio,
                stages=config.stages,
            )
        return rate * self.newbob.factor if self.newbob else rate

    def observe(self, loss: float) -> None:
        """Take note of a validation loss; only Newbob listens."""
        if self.newbob:
            self.newbob.observe(loss)

    @property
    def finished(self) -> bool:
        """Whether training is to end before its samples are used up."""
        return self.newbob is not None and self.newbob.finished

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        newbob = self.newbob
        if newbob is None:
            return {}
        seen = {} if newbob.best is None else {"best": newbob.best}
        return {
            "factor": newbob.factor,
            "halving": int(newbob.halving),
            "finished": int(newbob.finished),
            **seen,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        newbob = self.newbob
        if newbob is None:
            return
        newbob.factor = float(state["factor"])
        newbob.halving = bool(state["halving"])
        newbob.finished = bool(state["finished"])
        newbob.best = float(state["best"]) if "best" in state else None


def build_schedule(choice: Choice, *, lr: float, samples: int) -> Schedule:
    """Return the schedule of section [schedule]."""
    return Schedule(choice.settings, lr=lr, samples=samples)
