"""The machines that ship, and machine files: a [machine] and a line about it.

    about = "one K20 a node, FDR InfiniBand"
    [machine]
    latency_s = 20e-6
    bandwidth_Bps = 0.71e9

A file says all about its machine: latency_s and bandwidth_Bps, those inside a node too
where a node has several ranks. A step also depends on the model: where a file has no
step_s, that of the configuration stands. What `mpilm probe` prints is such a file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpilm.config import read_document
from mpilm.convert import convert, unknown
from mpilm.errors import ConfigError
from mpilm.world.machine import Machine

FOLDER = Path(__file__).parents[1] / "machines"
REQUIRED = ("latency_s", "bandwidth_Bps")
REQUIRED_IN_NODE = ("node_latency_s", "node_bandwidth_Bps")


@dataclass(frozen=True)
class MachineFile:
    """What a machine file says.

    about    one line
    machine  step_s is the default one where the file has none
    has_step it has one
    """

    about: str
    machine: Machine
    has_step: bool

    @property
    def settings(self) -> tuple[str, ...]:
        """Return it as `section.key=value` overrides of a configuration."""
        values = dataclasses.asdict(self.machine)
        if not self.has_step:
            del values["step_s"]
        return tuple(f"machine.{key}={value!r}" for key, value in values.items())


def shipped() -> dict[str, Path]:
    """Return the machine files of this package by name, in alphabetical order."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def find_machine(name: str) -> MachineFile:
    """Return the machine of a file, or the one that ships under this name.

    Raises:
        ConfigError: one line that names the file and the key.
    """
    path = Path(name)
    if name in shipped():
        path = shipped()[name]
    elif not path.suffix and not path.exists():
        problem = unknown("machine", name, shipped())
        raise ConfigError(f"--machine {name}: no such file; {problem}")
    return _checked(read_document(path), path)


def shipped_as(values: Mapping[str, Any]) -> str:
    """Return the name of the machine that ships with these numbers; "": none does.

    A step's time may be another one.

    Args:
        values: of a [machine], all of them.
    """
    for name in shipped():
        found = dataclasses.asdict(find_machine(name).machine)
        if all(values.get(key) == found[key] for key in found if key != "step_s"):
            return name
    return ""


def _checked(document: Mapping[str, Any], path: Path) -> MachineFile:
    about, values = document.get("about", ""), document.get("machine")
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: has no [machine]")
    if not isinstance(about, str):
        raise ConfigError(f"{path}: about: is no text")
    try:
        machine = convert(Machine, values, "machine")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    required = REQUIRED + (REQUIRED_IN_NODE if machine.ranks_per_node > 1 else ())
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(f"{path}: machine.{missing[0]} is missing")
    for key, value in values.items():
        if not math.isfinite(value):
            raise ConfigError(f"{path}: machine.{key}: {value} is no number")
    return MachineFile(about, machine, "step_s" in values)
