"""How a run of several ranks ends: in order, or all at once.

One rank that dies quietly would leave the others waiting for ever.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from mpilm.errors import BAD_INPUT, ERROR, MpilmError, interruption, say


class Abortable(Protocol):
    """A world, as far as its end goes.

    on_failure  is called with an error of an activity, if it is set
    """

    on_failure: Callable[[BaseException], None] | None

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def require_ended(self) -> None:
        """Raise WorldError if an activity would never end."""

    def close(self) -> None:
        """End in order. Collective."""

    def abort(self, code: int) -> None:
        """End all ranks at once. Does not return."""


@contextmanager
def abort_on_error(
    world: Abortable, folder: Path | str | None = None
) -> Iterator[None]:
    """End all ranks when one raises, with one line on stderr that names it.

    An error that every rank raises alike (`error.everywhere`) ends the run in order:
    rank 0 prints the line and all raise SystemExit.

    Args:
        world: this rank's world.
        folder: receives the traceback of an error that is no MpilmError, as
            `traceback-rank-0003.txt`; without a folder it goes to stderr.

    Raises:
        SystemExit: the run ended in order, or there is only one rank.
    """
    world.on_failure = lambda error: _end(world, error, folder)
    try:
        yield
    except BaseException as error:
        _end(world, error, folder)
        raise
    finally:
        world.on_failure = None


def _end(world: Abortable, error: BaseException, folder: Path | str | None) -> None:
    """Print, close or abort; return only if `error` is no failure."""
    code, text = exit_line(error)
    if code == 0:
        return
    everywhere = isinstance(error, MpilmError) and error.everywhere
    if text and (world.rank == 0 or not everywhere):
        where = ""
        if not isinstance(error, (MpilmError, KeyboardInterrupt, SystemExit)):
            where = save_traceback(world.rank, error, folder)
        prefix = f"rank {world.rank}: " if world.size > 1 and not everywhere else ""
        say(f"{prefix}{text}{where}")
    if everywhere and has_ended(world):
        world.close()
    elif world.size > 1:
        world.abort(code)
    raise SystemExit(code) from error


def has_ended(world: Abortable) -> bool:
    """Return whether no activity would keep `close` waiting for ever."""
    try:
        world.require_ended()
    except MpilmError:
        return False
    return True


def exit_line(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line for an error; "" for no line.

    >>> exit_line(ValueError("no")), exit_line(SystemExit(0)), exit_line(SystemExit(3))
    ((1, 'ValueError: no'), (0, ''), (3, ''))
    """
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0, ""
        return ERROR, str(error.code)
    if isinstance(error, KeyboardInterrupt):
        return interruption(error)
    if isinstance(error, MpilmError):
        return BAD_INPUT, one_line(str(error))
    return ERROR, one_line(f"{type(error).__name__}: {error}")


def one_line(text: str) -> str:
    """Return `text` without line breaks."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def save_traceback(rank: int, error: BaseException, folder: Path | str | None) -> str:
    """Write the traceback of `error`; return words that tell where it is."""
    text = "".join(traceback.format_exception(error))
    if folder is not None:
        path = Path(folder) / f"traceback-rank-{rank:04d}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            pass  # the folder may be what failed; stderr is left
        else:
            return f" (traceback: {path})"
    sys.stderr.write(text)
    return ""
