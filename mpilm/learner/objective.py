"""What a learner minimises, and what evaluation counts: loss, nll, samples."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Number
from typing import Any

from torch import Tensor, nn

from mpilm.errors import ModelError
from mpilm.learner.minibatch import samples_of
from mpilm.learner.parameters import require_scalar


class Objective:
    """The loss of a model, of its own or given.

    Args:
        model: with `loss(minibatch)`, if none is given, and perhaps `nll(minibatch)`.
        loss: from (model, minibatch) to the mean loss, or a pair with the number of
            samples that were guessed wrong.
        num_samples: from a minibatch to its samples; `samples_of` if not given.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Any] | None,
        num_samples: Callable[[Any], int] | None,
    ) -> None:
        self._model = model
        self._loss = loss or (lambda model, batch: model.loss(batch))
        self._nll = None if loss else getattr(model, "nll", None)
        self._samples_of = num_samples or samples_of

    def samples(self, batch: Any) -> int:
        """Return the number of samples of a minibatch."""
        return int(self._samples_of(batch))

    def loss(self, batch: Any) -> tuple[Tensor, Any]:
        """Return the mean loss of a minibatch, and its wrong guesses (None: unknown).

        Raises:
            ModelError: it is something else.
        """
        found = self._loss(self._model, batch)
        if not (isinstance(found, tuple) and len(found) == 2):
            return found, None
        loss, wrong = found
        is_number = wrong is None or isinstance(wrong, Number)
        if not is_number and getattr(wrong, "ndim", -1) != 0:
            shape = tuple(getattr(wrong, "shape", ()))
            raise ModelError(
                f"the loss is a pair with a {type(wrong).__name__} of shape {shape}: a"
                " pair is the mean loss, and how many samples were guessed wrong"
            )
        return loss, wrong

    def nll(self, batch: Any, num_samples: int) -> tuple[Any, Any]:
        """Return the nll of a minibatch, summed, and its wrong guesses or None.

        Raises:
            ModelError: the loss is no scalar.
        """
        if self._nll is not None:
            found = self._nll(batch)
            return found if isinstance(found, tuple) else (found, None)
        loss, wrong = self.loss(batch)
        require_scalar(loss)
        return loss.double() * num_samples, wrong
