"""The configuration of a run: TOML in, frozen dataclasses, resolved TOML out.

    [strategy]
    name = "model_averaging"
    period = 20

Sections that offer a choice (model, optim, schedule, strategy) carry a `name`; the
other keys are the settings of that choice. Every key can be set on the command line as
`--set section.key=value`, where value is TOML, or a bare word for a string.

Each setting is documented where it is declared; `mpilm train --help` prints that text.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from mpilm.convert import Choice, convert, fields_of, to_plain, unknown
from mpilm.errors import ConfigError
from mpilm.models.configs import MODELS, OwnModelConfig, PretrainConfig
from mpilm.optim.configs import OPTIMIZERS, SCHEDULES, OwnOptimConfig
from mpilm.storage.files import reason
from mpilm.strategies import STRATEGIES, find_strategy
from mpilm.strategies.ema import EmaConfig
from mpilm.world.faults import Faults
from mpilm.world.machine import Machine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(gt=0.0, le=1.0)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section [data]."""

    corpus: str = "data/docs.h5"
    """HDF5 file made by `mpilm prepare`"""
    source: Literal["shards", "pool"] = "shards"
    """shards: each rank has its own part; pool: chunks go to whoever is free"""
    chunk_windows: Positive = 20
    """minibatches in one chunk of the pool"""
    cache: Positive = 32_768
    """frames whose order is shuffled together (shards of a corpus of frames)"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Section [train]. A sample is one predicted token, or one frame."""

    samples: Positive = 1_000_000
    """samples to process, all ranks together"""
    batch: Positive = 20
    """sequences in a minibatch of one rank; of `dnn`: frames"""
    unroll: Positive = 35
    """time steps in a minibatch: truncated back-propagation through time"""
    accumulate: Positive = 1
    """minibatches in a step: an update with the gradient of their mean loss"""
    seed: Natural = 1
    """of the initial model, dropout and the order of the data"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPU number local rank modulo visible GPUs, or CPU where there is none"""
    threads: Positive = 1
    """CPU threads of one rank"""
    valid_every: Natural = 0
    """samples between two evaluations on the valid split; 0: at the end only"""
    test: bool = True
    """evaluate the test split at the end"""
    worst_rank: bool = True
    """evaluate at the end every rank's own model too, where ranks differ"""
    worst_rank_share: Share = 0.1
    """part of the run's work that this may take: of larger splits a part is evaluated;
    1: all of them"""
    eval_streams: Positive = 16
    """sequences evaluated side by side, whatever the number of ranks"""
    max_bad_steps: Positive = 10
    """steps in a row, skipped as the gradient was not finite, that end a run"""
    max_bad_rounds: Natural = 10
    """means in a row that a rank is left out of (strategy.leave_out) that end a run; 0:
    any number may be"""
    log_every: Positive = 10
    """steps between two rows of the log"""
    trace_steps: Natural = 50
    """first steps whose events are logged: the timeline of `report`"""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Section [checkpoint]. One is always written at the end or when stopped."""

    every: Natural = 0
    """samples between two checkpoints; 0: at the end only"""
    keep: Positive = 2
    """checkpoints kept"""
    beside: bool = True
    """write them while training goes on, from a copy in memory, or let it wait"""
    agree_every: Positive = 5
    """steps between two agreements on stopping early (signals)"""
    peer_every: Natural = 0
    """steps between two copies of a rank's state in the memory of the next rank, for
    `world.on_death`; 0: none"""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Section [world]: how real MPI is used."""

    gpu_messages: Literal["staged", "direct", "auto"] = "staged"
    """buffers on a GPU: through pinned host memory, or by an MPI that takes them; auto:
    direct where a trial in a child process works"""
    on_death: Literal["end", "go_on", "replace"] = "end"
    """when a rank dies: all end; or the others go on (under mpirun --with-ft ulfm), and
    replace: until another one has been started in its place"""
    silence_s: Seconds = 600.0
    """seconds without an answer from a rank that end the run, while others wait; 0:
    never"""


@dataclass(frozen=True)
class Config:
    """A resolved configuration: every key has its value."""

    data: DataConfig
    model: Choice
    optim: Choice
    schedule: Choice
    strategy: Choice
    train: TrainConfig
    pretrain: PretrainConfig
    checkpoint: CheckpointConfig
    ema: EmaConfig
    world: WorldConfig
    faults: Faults
    machine: Machine
    notes: tuple[str, ...] = field(default=(), compare=False)

    def inputs(self, *more: Path) -> list[Path]:
        """Return the files that are read where this is carried out, and `more`."""
        init = getattr(self.model.settings, "init", None)
        return [*more, Path(self.data.corpus), *([Path(init)] if init else [])]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return it as plain sections, the form that TOML and JSON hold."""
        sections: dict[str, dict[str, Any]] = {}
        for name in SECTIONS:
            section = getattr(self, name)
            if isinstance(section, Choice):
                sections[name] = {"name": section.name, **to_plain(section.settings)}
            else:
                sections[name] = to_plain(section)
        if self.model.name == OWN:
            for name in NOT_OWN:
                del sections[name]
            for key in NOT_OWN_TRAIN:
                del sections["train"][key]
        return sections

    def to_document(self) -> dict[str, dict[str, Any]]:
        """Return it as TOML can hold it: keys are text, and what is None is not there.

        Resolved again it gives an equal configuration.
        """

        def without_none(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: without_none(v) for k, v in value.items() if v is not None}
            if isinstance(value, list):
                return [without_none(item) for item in value]
            return value

        document: dict[str, dict[str, Any]] = without_none(self.to_dict())
        return document

    def to_toml(self) -> str:
        """Return it as TOML; reading that back gives an equal configuration."""
        import tomli_w

        return tomli_w.dumps(self.to_document())

    def encoded(self) -> bytes:
        """Return the TOML as bytes, see `read_toml`."""
        return self.to_toml().encode("utf-8", "surrogateescape")


class StrategyConfigs(dict[str, type]):
    """The settings of every strategy by name; "my_module:MyStrategy" is a name too."""

    def __init__(self) -> None:
        super().__init__((name, kind.Config) for name, kind in STRATEGIES.items())

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or ":" in str(name)

    def __missing__(self, name: str) -> type:
        return find_strategy(name).Config


OWN = "own"  # model and optimiser of somebody who called `mpilm.fit`
# what such a run has no use for: sections, and settings of [train]
NOT_OWN = ("data", "pretrain", "machine")
NOT_OWN_TRAIN = ("batch", "unroll", "accumulate", "eval_streams")

# section -> its dataclass, or the choices by name and the default one
SECTIONS: dict[str, Any] = {
    "data": DataConfig,
    "model": ({**MODELS, OWN: OwnModelConfig}, "lstm_lm"),
    "optim": ({**OPTIMIZERS, OWN: OwnOptimConfig}, "sgd"),
    "schedule": (SCHEDULES, "constant"),
    "strategy": (StrategyConfigs(), "allreduce"),
    "train": TrainConfig,
    "pretrain": PretrainConfig,
    "checkpoint": CheckpointConfig,
    "ema": EmaConfig,
    "world": WorldConfig,
    "faults": Faults,
    "machine": Machine,
}


def read_toml(path: Path) -> str:
    """Return the text of a TOML file, without a byte order mark.

    Bytes that are no UTF-8 stay, as Python keeps them in paths: so does a path of such
    bytes that `Config.encoded` wrote.

    Raises:
        OSError: it cannot be read.
    """
    return path.read_bytes().decode("utf-8-sig", "surrogateescape")


def read_document(path: Path) -> dict[str, Any]:
    """Return what a TOML file holds.

    Raises:
        ConfigError: it cannot be read, or is no TOML; one line with the path.
    """
    try:
        return tomllib.loads(read_toml(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {reason(error)}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a TOML file with `section.key=value` overrides.

    Raises:
        ConfigError: one line that names the file and the key.
    """
    path = Path(path)
    try:
        text = read_toml(path)
        document = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        has_raw_bytes = any("\udc80" <= c <= "\udcff" for c in text)
        what = "UTF-8 text" if has_raw_bytes else "TOML"
        raise ConfigError(f"{path}: not {what}: {error}") from None
    return resolve(document, overrides, origin=str(path))


def resolve(
    document: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    origin: str = "config",
) -> Config:
    """Return the configuration of plain sections with overrides applied.

    Raises:
        ConfigError: an unknown section or key, a wrong type, a value out of range.
    """
    for name, section in document.items():
        if name not in SECTIONS:
            raise ConfigError(f"{origin}: {unknown('section', name, SECTIONS)}")
        if not isinstance(section, Mapping):
            raise ConfigError(f"{origin}: {name} is a section: write [{name}]")
    sections = {name: dict(section) for name, section in document.items()}
    notes = _apply(overrides, sections)
    resolved: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        given = sections.get(name, {})
        if isinstance(kind, tuple):
            resolved[name] = _choice(name, kind, given, origin)
        else:
            resolved[name] = _convert(name, kind, given, origin)
    return Config(**resolved, notes=tuple(notes))


def _apply(overrides: Sequence[str], sections: dict[str, Any]) -> list[str]:
    """Write overrides into `sections`; return notes on what they made void.

    A new `name` keeps those settings of the file that the new choice knows.
    """
    notes: list[str] = []
    parsed = [_parse_override(override) for override in overrides]
    for (section, *keys), value in parsed:
        if keys == ["name"] and isinstance(SECTIONS[section], tuple):
            choices = SECTIONS[section][0]
            given = sections.setdefault(section, {})
            known = fields_of(choices[value]) if value in choices else given
            void = [key for key in given if key != "name" and key not in known]
            for key in void:
                del given[key]
            if void:
                notes.append(
                    f"{section}.name={value} has no setting {', '.join(void)}: left out"
                )
    for (section, *keys), value in parsed:
        target = sections.setdefault(section, {})
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    f"--set {section}.{'.'.join(keys)}: {key} is no table"
                )
        target[keys[-1]] = value
    return notes


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override}: write section.key=value")
    if keys[0] not in SECTIONS:
        raise ConfigError(f"--set {override}: {unknown('section', keys[0], SECTIONS)}")
    try:
        return keys, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, text.strip()


def _choice(
    section: str,
    kind: tuple[Mapping[str, type], str],
    given: dict[str, Any],
    origin: str,
) -> Choice:
    choices, default = kind
    given = dict(given)
    name = str(given.pop("name", default))
    if name not in choices:
        problem = unknown("name", name, choices)
        raise ConfigError(f"{origin}: {section}.name: {problem}")
    return Choice(name, _convert(section, choices[name], given, origin))


def _convert(section: str, kind: type, given: Mapping[str, Any], origin: str) -> Any:
    try:
        return convert(kind, given, section)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


@dataclass(frozen=True)
class Setting:
    """One row of the help: section, choice ("" where there is none), key, default."""

    section: str
    choice: str
    key: str
    default: str
    text: str


def settings() -> Iterator[Setting]:
    """Yield every setting there is, in order, with the text of its declaration."""
    for section, kind in SECTIONS.items():
        if isinstance(kind, tuple):
            choices, default = kind
            text = "one of " + ", ".join(name for name in choices if name != OWN)
            yield Setting(section, "", "name", default, text)
            for choice, config in choices.items():
                if choice == OWN:
                    continue
                yield from _settings_of(section, choice, config)
        else:
            yield from _settings_of(section, "", kind)


def _settings_of(section: str, choice: str, kind: type) -> Iterator[Setting]:
    from docstring_parser import parse_from_object

    texts = {
        param.arg_name: param.description or ""
        for base in reversed(kind.__mro__[:-1])
        for param in parse_from_object(base).params
    }
    for key, field_ in fields_of(kind).items():
        if field_.default is not dataclasses.MISSING:
            default = field_.default
        elif field_.default_factory is not dataclasses.MISSING:
            default = field_.default_factory()
        else:
            default = "required"
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        yield Setting(section, choice, key, shown, texts.get(key, ""))
