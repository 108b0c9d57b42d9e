"""Plain tables (of TOML) to dataclasses: an unknown key is an error, with a guess."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from mpilm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Choice:
    """A section with a name: the choice and its settings."""

    name: str
    settings: Any


def convert(kind: type, given: Mapping[str, Any], name: str) -> Any:
    """Return the dataclass `kind` with the values of a table.

    Args:
        kind: its annotations are checked, and its own checks made.
        given: key -> value.
        name: of the table, for messages: "strategy".

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range; one line.
    """
    known = fields_of(kind)
    for key in given:
        if key not in known:
            raise ConfigError(f"[{name}] {unknown('key', key, known)}")
    try:
        return msgspec.convert(as_integers(given), kind)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at ")
        key = where.strip("`").removeprefix("$.").removeprefix("$")
        if isinstance(given.get(key), float) and problem.startswith("Expected `int"):
            problem = f"{given[key]} is no whole number below 2^63"
        elif problem.startswith("Invalid enum value") and key in known:
            choices = get_args(get_type_hints(kind)[key])
            if get_origin(get_type_hints(kind)[key]) is Literal:
                problem = f"{given[key]!r} is none of {', '.join(map(str, choices))}"
        raise ConfigError(
            f"{name}.{key}: {problem}" if key else f"{name}: {problem}"
        ) from None
    except ValueError as error:  # raised by a dataclass's own checks
        raise ConfigError(f"[{name}] {error}") from None


def as_integers(value: Any) -> Any:
    """Return a value of TOML with whole numbers as integers; floats take them too.

    >>> as_integers({"samples": 1e4, "lr": [0.5, 2.0]})
    {'samples': 10000, 'lr': [0.5, 2]}
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        return int(value)
    if isinstance(value, Mapping):
        return {key: as_integers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_integers(item) for item in value]
    return value


def whole_number(text: str) -> int:
    """Return a number that is written as TOML writes integers, or whole floats.

    >>> whole_number("1_000"), whole_number("1e4"), whole_number("2.0")
    (1000, 10000, 2)

    Raises:
        ValueError: it is no whole number.
    """
    try:
        return int(text)
    except ValueError:
        value = float(text)
    if not value.is_integer():
        raise ValueError(f"{text} is no whole number")
    return int(value)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Return words that say what is known, and what may have been meant.

    >>> unknown("key", "bacth", ["batch", "seed"])
    "unknown key 'bacth'; did you mean 'batch'? (known: batch, seed)"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known)})"


def fields_of(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a dataclass by name."""
    return {f.name: f for f in dataclasses.fields(kind)}


def to_plain(value: Any) -> Any:
    """Return what `convert` read: a dataclass as a table with *all* its fields.

    (`msgspec.to_builtins` leaves out the fields that `convert` took from defaults.)
    """
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: to_plain(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def counts_in(option: str, text: str) -> list[int]:
    """Return the numbers in a list such as "4,8,16", each of them once.

    >>> counts_in("--ranks", "4,8, 16,8"), counts_in("--periods", "1e3")
    ([4, 8, 16], [1000])

    Raises:
        ConfigError: not such a list of numbers above 0.
    """
    try:
        found = [whole_number(word) for word in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ConfigError(f"{option} {text}: write numbers, such as 4,8,16")
    return list(dict.fromkeys(found))
