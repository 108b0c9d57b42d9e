"""Learning rate schedules: functions of global samples. No torch here.

Source      exponential and Newbob: H. Su and H. Chen, arXiv 1507.01239, 2015, schedules
            B and A; Newbob's thresholds and order of decisions as in Kaldi's
            train_scheduler.sh, which they used. Linear warm-up: P. Goyal et al.,
            "Accurate, Large Minibatch SGD", arXiv 1706.02677, 2017.
Notation    s -> samples that all ranks together have processed
            W -> warmup_samples      S -> samples of the whole training
            K -> ranks where `times_ranks` is set, else 1
            f -> final_ratio         E -> stages
Rate        lr(s) = K * lr * warmup(s) * main(max(0, s - W), S - W)                (1)
            warmup(s) = min(1, (s + 1) / W)                                    (2)
            constant      1                                                    (3)
            exponential   f^(s / S), or with E stages f^(floor(E s/S) / (E-1)) (4)
            newbob, newbob_accuracy: a factor that validations decide, see `Newbob`
Gain        newbob: (best - loss) / best; newbob_accuracy: accuracy - best       (5)
Departs     rejecting a validation is an option (their script always rejects a loss that
            is no lower, Kaldi's too); newbob_accuracy rejects an accuracy that is no
            higher. The warm-up begins near 0 (Goyal et al.: at lr / K). Global samples
            make main() and warmup() independent of the number of ranks.
"""

from __future__ import annotations

from typing import Any

from mpilm.convert import Choice
from mpilm.optim.configs import (
    ConstantConfig,
    ExponentialConfig,
    NewbobAccuracyConfig,
    NewbobConfig,
)


def warmup(samples: int, warmup_samples: int) -> float:
    """Return the share of the full rate after `samples` (2).

    >>> [warmup(s, 100) for s in (0, 49, 99, 500)], warmup(0, 0)
    ([0.01, 0.5, 1.0, 1.0], 1.0)
    """
    return min(1.0, (samples + 1) / warmup_samples) if warmup_samples else 1.0


def exponential_decay(
    samples: int, total: int, *, final_ratio: float, stages: int = 0
) -> float:
    """Return rate over initial rate (4); `final_ratio` from `total` samples on.

    >>> decay = exponential_decay
    >>> [round(decay(s, 100, final_ratio=0.01), 3) for s in (0, 50, 100, 200)]
    [1.0, 0.1, 0.01, 0.01]
    >>> stage = [decay(s, 90, final_ratio=0.01, stages=3) for s in (29, 30, 89)]
    >>> [round(ratio, 3) for ratio in stage]
    [1.0, 0.1, 0.01]
    """
    progress = min(1.0, samples / max(1, total))
    if stages:
        stage = min(stages - 1, stages * samples // max(1, total))
        progress = stage / max(1, stages - 1)
    return final_ratio**progress


class Newbob:
    """Halve the rate once validations gain little; then stop.

        gain as in (5)                  best: lowest loss (highest accuracy) before
        if halving has begun and gain < stop_halving: finished
        if gain < start_halving: halving begins, and goes on to the end
        if halving has begun: factor <- factor * config.factor

    measure    what it goes by: "loss" or "accuracy"
    factor     what the rate is multiplied by
    best       lowest loss, or highest accuracy, so far (None: none seen)
    halving    whether halving has begun
    finished   whether training is to end

    >>> newbob = Newbob(NewbobConfig())
    >>> [newbob.observe(loss) for loss in (5.0, 4.0, 3.99, 3.5, 3.6)]
    [True, True, True, True, False]
    >>> newbob.factor, newbob.finished
    (0.25, True)
    """

    def __init__(self, config: NewbobConfig | NewbobAccuracyConfig) -> None:
        self.config = config
        self.measure = "loss" if isinstance(config, NewbobConfig) else "accuracy"
        self.factor = 1.0
        self.best: float | None = None
        self.halving = False
        self.finished = False

    def observe(self, loss: float, accuracy: float = 0.0) -> bool:
        """Take note of a validation; return whether it is better than the best.

        Args:
            loss: mean NLL > 0.
            accuracy: share of frames classified correctly.
        """
        is_loss = self.measure == "loss"
        found = loss if is_loss else accuracy
        if self.best is None:
            self.best = found
            return True
        gain = (self.best - found) / self.best if is_loss else found - self.best
        if gain > 0.0:
            self.best = found
        if self.halving and gain < self.config.stop_halving:
            self.finished = True
            return gain > 0.0
        self.halving = self.halving or gain < self.config.start_halving
        if self.halving:
            self.factor *= self.config.factor
        return gain > 0.0


class Schedule:
    """The learning rate of a run (1).

    Args:
        config: a config of this module's schedules.
        lr: the rate before the schedule, > 0.
        samples: samples of the whole training, all ranks together.
        ranks: how many there are.
    """

    def __init__(
        self,
        config: ConstantConfig
        | ExponentialConfig
        | NewbobConfig
        | NewbobAccuracyConfig,
        *,
        lr: float,
        samples: int,
        ranks: int = 1,
    ) -> None:
        self.config, self.samples = config, samples
        self.full_lr = lr * ranks if config.times_ranks else lr
        self.newbob: Newbob | None = None
        if isinstance(config, NewbobConfig | NewbobAccuracyConfig):
            self.newbob = Newbob(config)

    def lr(self, samples: int) -> float:
        """Return the rate to use after `samples` samples of all ranks."""
        config = self.config
        rate = self.full_lr * warmup(samples, config.warmup_samples)
        if isinstance(config, ExponentialConfig):
            rate *= exponential_decay(
                max(0, samples - config.warmup_samples),
                self.samples - config.warmup_samples,
                final_ratio=config.final_ratio,
                stages=config.stages,
            )
        return rate * self.newbob.factor if self.newbob else rate

    @property
    def rejects(self) -> bool:
        """Whether `observe` may ask for the best model to be put back."""
        return bool(getattr(self.config, "reject", False))

    def observe(self, loss: float, accuracy: float = 0.0) -> bool:
        """Take note of a validation; return whether its model is to be kept.

        Only Newbob listens. False: go back to the one of the last True.

        Args:
            loss: mean NLL, > 0.
            accuracy: share of samples classified correctly, where it was measured.
        """
        is_kept = self.newbob is None or self.newbob.observe(loss, accuracy)
        return is_kept or not self.rejects

    @property
    def finished(self) -> bool:
        """Whether training is to end before its samples are used up."""
        return self.newbob is not None and self.newbob.finished

    @property
    def may_finish(self) -> bool:
        """Whether the next validation may be the one after which training ends."""
        return self.newbob is not None and self.newbob.halving

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        newbob = self.newbob
        if newbob is None:
            return {}
        seen = {} if newbob.best is None else {"best": newbob.best}
        return {
            "measure": newbob.measure,
            "factor": newbob.factor,
            "halving": int(newbob.halving),
            "finished": int(newbob.finished),
            **seen,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned.

        Newbob begins anew where the state is of another schedule: an accuracy is no
        loss to compare with.
        """
        newbob = self.newbob
        if newbob is None or state.get("measure") != newbob.measure:
            return
        newbob.factor = float(state["factor"])
        newbob.halving = bool(state["halving"])
        newbob.finished = bool(state["finished"])
        newbob.best = float(state["best"]) if "best" in state else None


def build_schedule(
    choice: Choice, *, lr: float, samples: int, ranks: int = 1
) -> Schedule:
    """Return the schedule of section [schedule]."""
    return Schedule(choice.settings, lr=lr, samples=samples, ranks=ranks)
