"""Settings that were changed when a run was resumed: `changes.toml` of a run folder.

    [[change]]
    samples = 80000          # of all ranks: the first ones with the old value
    step = 1000              # minibatches of rank 0
    key = "optim.lr"
    old = 0.01               # not there: a setting that another choice did not have
    new = 0.005

`config.toml` stays what the run began with; with the changes, in their order, it is
what the run was last trained with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpilm.config import Config, read_toml, tomllib
from mpilm.errors import CheckpointError
from mpilm.storage.files import reason, replace_file

Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """A setting that has another value from some sample on; None: it is not there."""

    samples: int
    step: int
    key: str
    old: Any = None
    new: Any = None

    @property
    def shown(self) -> tuple[Any, Any]:
        """The two values as a person reads them: what is empty would not be seen."""
        values = self.old, self.new
        old, new = ("none" if v is None else '""' if v == "" else v for v in values)
        return old, new

    def __str__(self) -> str:
        old, new = self.shown
        return f"{self.key}: {old} -> {new} from sample {self.samples:,} on"


def differences(
    old: Config, new: Config, *, samples: int = 0, step: int = 0
) -> list[Change]:
    """Return the settings that have another value in `new`, in order."""
    before, after = old.to_document(), new.to_document()
    found = []
    for section, given in after.items():
        kept = before[section]
        for key in {**kept, **given}:
            values = kept.get(key), given.get(key)
            if values[0] != values[1]:
                found.append(Change(samples, step, f"{section}.{key}", *values))
    return found


def with_changes(document: Mapping[str, Any], changes: Iterable[Change]) -> Sections:
    """Return plain sections of a configuration after some changes.

    >>> with_changes({"optim": {"lr": 1.0}}, [Change(0, 0, "optim.lr", 1.0, 0.5)])
    {'optim': {'lr': 0.5}}
    """
    sections: Sections = copy.deepcopy(dict(document))
    for change in changes:
        section, _, key = change.key.partition(".")
        if change.new is None:
            sections.get(section, {}).pop(key, None)
        else:
            sections.setdefault(section, {})[key] = change.new
    return sections


def read_changes(path: Path) -> list[Change]:
    """Return the changes in a file; none if there is no file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        table = tomllib.loads(read_toml(path))
        return [Change(**entry) for entry in table["change"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {reason(error)}") from None


def write_changes(path: Path, changes: Iterable[Change]) -> None:
    """Make a file say these changes; without any there is none.

    Raises:
        OSError: it cannot be written; the old one stands.
    """
    import tomli_w

    entries = [
        {key: value for key, value in asdict(change).items() if value is not None}
        for change in changes
    ]
    if entries:
        text = tomli_w.dumps({"change": entries})
        replace_file(path, text.encode("utf-8", "surrogateescape"))
    else:
        path.unlink(missing_ok=True)
