"""Errors that a user can act on: one line each, naming the file, key or rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence

# exit codes
ERROR = 1  # not foreseen: with a traceback
BAD_INPUT = 2  # an MpilmError
STALLED = 3  # a wait lasted longer than allowed
DIED = 4  # a rank, as [faults] declares
STOPPED_EARLY = 75  # EX_TEMPFAIL: a signal stopped the run; `resume` goes on
INTERRUPTED = 130  # by SIGINT
TERMINATED = 143  # by SIGTERM or SIGHUP


class MpilmError(Exception):
    """Base of all errors that the command line prints as one line, no traceback.

    everywhere  every rank raises the same error at the same point (a collective check
                failed), so that all can leave in order and one of them speaks
    """

    def __init__(self, text: str, *, everywhere: bool = False) -> None:
        super().__init__(text)
        self.everywhere = everywhere


class TerminatedError(KeyboardInterrupt):
    """SIGTERM or SIGHUP ends a command as Ctrl-C does: its files are tidied up."""


class ConfigError(MpilmError):
    """A configuration key is unknown, of the wrong type or out of range."""


class DataError(MpilmError):
    """An input file is missing, malformed or does not fit the run."""


class CheckpointError(MpilmError):
    """A checkpoint or run folder cannot be read or written."""


class ModelError(MpilmError):
    """A model, its loss or its optimiser is not, or is no longer, one to train."""


class WorldError(MpilmError):
    """Ranks cannot communicate as asked (thread level, deadlock, a lost rank)."""


class RanksDiedError(WorldError):
    """Ranks have died; the others can go on without them, see `World.shrink`.

    ranks  their numbers, as far as they are known here

    Args:
        sign: what told of it, where no number is known.
    """

    def __init__(self, ranks: Sequence[int] = (), *, sign: str = "") -> None:
        self.ranks = tuple(ranks)
        unknown = f"unknown ({sign})" if sign else "unknown"
        names = " and ".join(map(str, self.ranks)) or unknown
        is_one = len(self.ranks) == 1
        super().__init__(f"rank{'' if is_one else 's'} {names} died")


class LeftBehindError(WorldError):
    """A communicator is used that ended as ranks died or joined: a fault of ours.

    It is no death: whoever took it for one would end the communicators of today.
    """


class DivergenceError(MpilmError):
    """The loss or the model is not finite any more."""


def interruption(error: KeyboardInterrupt) -> tuple[int, str]:
    """Return the exit code and the line for what a signal has ended.

    >>> interruption(KeyboardInterrupt()), interruption(TerminatedError())
    ((130, 'interrupted'), (143, 'terminated'))
    """
    if isinstance(error, TerminatedError):
        return TERMINATED, "terminated"
    return INTERRUPTED, "interrupted"


def signal_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the signal that an error is about, if it came while a library was at work.

    h5py's locks answer a signal that comes at the wrong moment with a SystemError.

    >>> error = MpilmError("x.h5: returned a result with an exception set")
    >>> error.__context__ = TerminatedError()
    >>> signal_behind(error), signal_behind(MpilmError("x.h5: not there"))
    (TerminatedError(), None)
    """
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen


def say(text: str) -> None:
    """Tell people something: a line on stderr; what a command yields is on stdout."""
    sys.stderr.write(f"mpilm: {text}\n")
    sys.stderr.flush()
