"""The points of a sweep: what one TOML file asks to be run.

    config = "train.toml"                       # beside this file, or an absolute path
    run = "local"                               # simulate, protocol, local, slurm, pbs
    ranks = [2, 4]
    set = ["train.samples=200_000"]             # of every point
    [vary]
    "strategy.name" = ["allreduce", "gossip_bmuf"]
    "faults.slow" = [{}, {0 = 10.0}]

Every combination is a point, with a name such as `allreduce-slow=0x10.0-r4`, and a
folder of that name in the sweep's folder.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from mpilm.commands.tuned import Tuning
from mpilm.config import SECTIONS, read_document
from mpilm.convert import convert, unknown
from mpilm.errors import ConfigError

Values = Annotated[list[Any], Meta(min_length=1)]
SIMULATED = ("simulate", "protocol")
SUBMITTED = ("slurm", "pbs")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a sweep's file holds."""

    config: str
    """TOML file of a run, as `mpilm train` takes it"""
    run: Literal["simulate", "protocol", "local", "slurm", "pbs"]
    """simulate, protocol: in virtual time; local: mpirun; slurm, pbs: submitted"""
    ranks: Annotated[list[Annotated[int, Meta(ge=1)]], Meta(min_length=1)]
    """numbers of ranks"""
    machines: list[str] = field(default_factory=list)
    """names or files as `simulate --machine` takes them; none: the configuration's"""
    set: list[str] = field(default_factory=list)
    """section.key=value of every point"""
    options: list[str] = field(default_factory=list)
    """more words for mpilm simulate or submit, or for mpirun"""
    tune: Tuning | None = None
    """a search that every point makes, see tuned.py"""
    vary: dict[str, Values] = field(default_factory=dict)
    """section.key, or a section whose values are tables, to the values it takes"""

    @classmethod
    def read(cls, path: Path) -> Spec:
        """Return what a file says; `config` becomes a path from here.

        Raises:
            ConfigError: one line that names the file and the key.
        """
        document = read_document(path)
        try:
            spec = convert(cls, document, "sweep")
            spec.check()
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        document["config"] = str(path.parent / spec.config)
        return convert(cls, document, "sweep")

    def check(self) -> None:
        """Raise unless the points can be named.

        Raises:
            ConfigError: one line that names the key.
        """
        if self.machines and self.run not in SIMULATED:
            raise ConfigError(f'machines: run = "{self.run}" has its own')
        if self.tune is not None:
            if self.run not in ("simulate", "local"):
                raise ConfigError('tune: only with run = "simulate" or "local"')
            self.tune.check()
        for key, values in self.vary.items():
            section, dot, _ = key.partition(".")
            if section not in SECTIONS:
                raise ConfigError(
                    f"vary.{key}: {unknown('section', section, SECTIONS)}"
                )
            if not dot and not all(isinstance(v, dict) and v for v in values):
                raise ConfigError(f"vary.{key}: write {key}.KEY, or tables as values")

    def points(self) -> list[Point]:
        """Return all combinations, the number of ranks changing fastest.

        Raises:
            ConfigError: two of them are the same.
        """
        axes = [
            [
                (point_label(key, value), tuple(overrides(key, value)))
                for value in values
            ]
            for key, values in self.vary.items()
        ]
        points: dict[str, Point] = {}
        for chosen in itertools.product(*axes):
            settings = (*self.set, *(one for _, many in chosen for one in many))
            labels = [text for text, _ in chosen]
            for machine, ranks in itertools.product(self.machines or [""], self.ranks):
                words = [word for word in [*labels, Path(machine).stem] if word]
                name = "-".join([*(words or [Path(self.config).stem]), f"r{ranks}"])
                name = re.sub(r"[^\w.=+,-]+", "_", name, flags=re.ASCII)
                if name in points:
                    raise ConfigError(f"two points of the sweep are {name}")
                points[name] = Point(name, ranks, settings, machine)
        return list(points.values())


@dataclass(frozen=True)
class Point:
    """One run of a sweep; settings are section.key=value."""

    name: str
    ranks: int
    settings: tuple[str, ...]
    machine: str

    def command(self, spec: Spec, out: Path) -> list[str]:
        """Return the words that run it into the folder OUT/NAME.

        What follows `mpirun` or `mpilm`: the one who starts it knows where these are.
        """
        run, folder = spec.run, out / self.name
        settings = [word for one in self.settings for word in ("--set", one)]
        if run in SIMULATED:
            words = ["simulate", spec.config, "--ranks", str(self.ranks)]
            words += ["--machine", self.machine] if self.machine else []
            words += ["--protocol-only"] if run == "protocol" else []
            return [*words, *spec.options, *settings, "--out", str(folder)]
        if run in SUBMITTED:
            words = ["submit", spec.config, "--scheduler", run, *spec.options]
            words += ["--ranks", str(self.ranks)]  # which adds -rN to the folder
            base = folder.with_name(self.name.removesuffix(f"-r{self.ranks}"))
            return [*words, *settings, "--out", str(base)]
        words = [*spec.options, "-n", str(self.ranks)]
        program = [sys.executable, "-m", "mpilm", "train", spec.config, "--resume"]
        return [*words, *program, *settings, "--out", str(folder)]


def overrides(key: str, value: Any) -> Iterator[str]:
    """Yield what sets a varied key.

    >>> list(overrides("strategy", {"name": "bmuf", "period": 20}))
    ['strategy.name="bmuf"', 'strategy.period=20']
    """
    if "." in key:
        yield f"{key}={in_toml(value)}"
    else:
        for inner, one in value.items():
            yield f"{key}.{inner}={in_toml(one)}"


def in_toml(value: Any) -> str:
    """Return a value as TOML on one line, without blanks of its own.

    >>> in_toml({"0": [10.0, True, "a b"]})
    '{"0"=[10.0,true,"a b"]}'
    """
    if isinstance(value, dict):
        pairs = (f"{json.dumps(k)}={in_toml(v)}" for k, v in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(in_toml, value)) + "]"
    if isinstance(value, (bool, str)):
        return json.dumps(value)
    return str(value)


def point_label(key: str, value: Any) -> str:
    """Return a value's part of a point's name.

    >>> point_label("strategy.name", "bmuf"), point_label("faults.slow", {"0": 10.0})
    ('bmuf', 'slow=0x10.0')
    >>> point_label("strategy", {"name": "bmuf", "period": 20})
    'bmuf,period=20'
    >>> point_label("faults.slow", {})
    'slow=no'
    """
    last = key.rpartition(".")[2]
    if last == "name":
        return str(value)
    if "." not in key:
        return ",".join(point_label(f"{key}.{k}", v) for k, v in value.items())
    if isinstance(value, dict):
        value = ",".join(f"{k}x{v}" for k, v in value.items()) or "no"
    return f"{last}={value}"
