"""Random numbers of each learner, though all learners of a process share torch's.

Dropout draws from torch's global random state, which all learners of a process share
(the virtual world runs many). Each learner has a state of its own and puts it into
place when another learner has been at work since; with one learner in the process that
never happens. So any module works, and masks depend on the learner's seed alone. (A
generator of its own for each learner would not reach nn.LSTM's dropout.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor


class RandomState:
    """One learner's state of torch's global random generators (CPU and its GPU)."""

    _in_place: ClassVar[RandomState | None] = None  # whose state the generators hold

    def __init__(self, seed: int, device: torch.device) -> None:
        self.gpu = device if device.type == "cuda" else None
        self._saved = [torch.Generator().manual_seed(seed).get_state()]
        if self.gpu is not None:
            generator = torch.Generator(self.gpu).manual_seed(seed)
            self._saved.append(generator.get_state())

    def put_in_place(self) -> None:
        """Let the global generators go on from this state."""
        holder = RandomState._in_place
        if holder is self:
            return
        if holder is not None:
            holder._saved = holder._read()
        self._write()
        RandomState._in_place = self

    def state(self) -> dict[str, Any]:
        """Return it: device type -> bytes."""
        if RandomState._in_place is self:
            self._saved = self._read()
            # cuDNN keeps a dropout state that cannot be read; setting the generator
            # makes it draw a new one, here as after a resume.
            self._write()
        names = ("random/cpu", "random/cuda")
        return {n: s.numpy().copy() for n, s in zip(names, self._saved, strict=False)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned; a GPU the state lacks stays as it is."""
        names = ("random/cpu", "random/cuda")[: len(self._saved)]
        for index, name in enumerate(names):
            if name in state:
                self._saved[index] = torch.tensor(state[name], dtype=torch.uint8)
        if RandomState._in_place is self:
            self._write()

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.gpu is not None:
            states.append(torch.cuda.get_rng_state(self.gpu))
        return states

    def _write(self) -> None:
        torch.set_rng_state(self._saved[0])
        if self.gpu is not None:
            torch.cuda.set_rng_state(self._saved[1], self.gpu)
