"""What will stop all ranks in order: found on one of them, raised on all."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpilm.errors import DivergenceError, MpilmError
from mpilm.train.metrics import Totals
from mpilm.world.base import World

if TYPE_CHECKING:  # it loads torch, and bad input is told of before that
    from mpilm.learner.finite_check import FiniteCheck

LARGEST_LOSS = math.log(sys.float_info.max)  # nats; above, perplexity is infinite


class Failure:
    """The first failure of this rank, until the ranks stop and raise it.

    Args:
        totals: counts of the run; skipped steps are added to them.
        checkpoints: the folder that a person will look into.
        max_bad_steps: steps without an update in a row, of which one is too many.
        max_bad_rounds: the same of means that the model is left out of; 0: none.
        is_nats: whether the loss is one whose exponential is shown.

    error  it; None: nothing has failed
    """

    def __init__(
        self,
        totals: Totals,
        checkpoints: Path,
        *,
        max_bad_steps: int,
        max_bad_rounds: int,
        is_nats: bool,
    ) -> None:
        self.error: MpilmError | None = None
        self._totals = totals
        self._checkpoints = checkpoints
        self._max_bad_steps, self._max_bad_rounds = max_bad_steps, max_bad_rounds
        self._most = LARGEST_LOSS if is_nats else math.inf
        self._num_skipped = 0  # of those that the learner knows of, counted

    def note(self, error: MpilmError) -> None:
        """Remember it, unless something failed before. No communication."""
        self.error = self.error or error

    def count(self, checked: FiniteCheck, loss: Any) -> None:
        """Count the steps that were skipped; too many in a row are a failure.

        Args:
            checked: the learner's; on a GPU it may not know of the last step yet.
            loss: of the last step.
        """
        self.count_skipped(checked)
        if checked.num_in_a_row >= self._max_bad_steps:
            self.note(
                self.diverged(
                    f"the loss is {float(loss):.3g}, the gradient was not finite"
                    f" {checked.num_in_a_row} times in a row"
                )
            )

    def count_skipped(self, checked: FiniteCheck) -> None:
        """Add to the totals the skipped steps that the learner has come to know of."""
        self._totals.skipped += checked.num_left_out - self._num_skipped
        self._num_skipped = checked.num_left_out

    def count_rounds(self, leaving: Any) -> None:
        """Note a failure if the model was left out of too many rounds in a row."""
        most = self._max_bad_rounds
        if most and leaving is not None and leaving.num_in_a_row >= most:
            self.note(
                self.diverged(
                    f"a rank was left out of {most} rounds in a row, the last"
                )
            )

    def is_good(self, loss: float) -> bool:
        """Return whether a loss is a finite one, and so is its exponential."""
        return loss < self._most

    def diverged(self, what: str) -> DivergenceError:
        """Return the error that says so."""
        return DivergenceError(
            f"{what} at step {self._totals.step}: a smaller optim.lr or optim.clip may"
            f" help; earlier checkpoints are in {self._checkpoints}",
            everywhere=True,
        )

    def raise_(self, world: World, kind: type[MpilmError] = MpilmError) -> None:
        """Raise on all ranks what failed on one, if it is of this kind. Collective."""
        with world.all_or_none():
            if isinstance(self.error, kind):
                raise self.error
