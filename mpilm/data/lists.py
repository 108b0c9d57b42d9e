"""Lists as Kaldi has them: feats.scp, wav.scp, utt2spk, text.

line    ends at a newline and nowhere else; a carriage return before it is dropped
blanks  spaces, tabs and the other white space of ASCII, any run of them
key     what stands before the first blanks; each stands there once
rest    what stands after them, without the blanks at its end; may be empty
text    UTF-8; a byte order mark at the beginning of the file is dropped
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mpilm.errors import DataError
from mpilm.storage.files import reason

LONGEST_LINE_BYTES = 1 << 24  # what is longer is no list; chosen, not tuned
WORD = re.compile(r"[^ \t\n\r\f\v]+")


def split_words(text: str) -> list[str]:
    """Return the words of a transcript: what blanks separate.

    >>> split_words(" one\\ttwo  half\\u00a0past ")
    ['one', 'two', 'half\\xa0past']
    """
    return WORD.findall(text)


def is_utf8(text: str) -> bool:
    """Return whether UTF-8 has all characters; not so for stray bytes of a path.

    >>> is_utf8("caf\\u00e9"), is_utf8("caf\\udce9")
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_list(path: Path, *, of_paths: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (key, rest of the line) of a list.

    Args:
        of_paths: the rest names a file: bytes that are no UTF-8 are kept, as Python
            keeps them in paths.

    Raises:
        DataError: one line with file, line and key: it cannot be read, is no UTF-8, a
            key is there twice, or a line is blank (but at the end).
    """
    seen: set[str] = set()
    blank = offset = 0
    handling = "surrogateescape" if of_paths else "strict"
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: _line(file, path), b""), 1):
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                key, *more = line.split(None, 1) or [b""]
                if not key:
                    blank = blank or number
                elif blank:
                    raise DataError(f"{path}: line {blank} is blank")
                else:
                    try:
                        name = key.decode()
                        rest = b"".join(more).rstrip().decode(errors=handling)
                    except UnicodeDecodeError as error:
                        at = offset + raw.index(error.object) + error.start
                        raise DataError(
                            f"{path}: not UTF-8 text: byte {at}, line {number}"
                        ) from None
                    if name in seen:
                        raise DataError(f"{path}, line {number}: {name} is there twice")
                    seen.add(name)
                    yield name, rest
                offset += len(raw)
    except OSError as error:
        raise DataError(f"{path}: {reason(error)}") from None


def _line(file: BinaryIO, path: Path) -> bytes:
    line = file.readline(LONGEST_LINE_BYTES)
    if len(line) == LONGEST_LINE_BYTES:
        raise DataError(f"{path}: is no list: a line of {LONGEST_LINE_BYTES} bytes")
    return line
