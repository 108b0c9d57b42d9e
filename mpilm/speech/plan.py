"""Which recordings make which utterance of which split, before a wav file is read.

    train          recordings, and strings of them: recordings of one speaker, joined
    valid, test    recordings, single
    valid-strings  strings of the recordings of valid
    strings        strings of the recordings of test

Nobody said the strings in one breath, so there is no silence between their words and no
co-articulation; but features are computed over the joined wave, so frames at the joints
hold the end of one word and the beginning of the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from zlib import crc32

import numpy as np

from mpilm.data.hdf5 import SPLITS
from mpilm.data.wav import LISTS, Recording, list_recordings
from mpilm.errors import DataError

T = TypeVar("T")

STRING_SPLITS = {"train": "train", "valid": "valid-strings", "test": "strings"}
SHARE_STEPS = 10_000  # what a share of the train part is counted in


@dataclass(frozen=True)
class SplitConfig:
    """How recordings become splits.

    train, valid, test  folders
    valid_names         recordings of train whose name has this go to valid instead
    test_names          recordings of train whose name has this go to test instead
    valid_share         of train, by a hash of the name, if nothing else says valid
    """

    train: tuple[Path, ...]
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    valid_names: str = ""
    test_names: str = ""
    valid_share: float = 0.05

    def lists(self) -> Iterator[Path]:
        """Yield the lists of all folders, where there are any."""
        for folder in (*self.train, *self.valid, *self.test):
            yield from (folder / name for name in LISTS)

    def __post_init__(self) -> None:
        if not 0 <= self.valid_share < 1:
            raise DataError(f"--valid-share {self.valid_share}: must be 0 to below 1")
        for option in ("valid_names", "test_names"):
            try:
                re.compile(getattr(self, option))
            except re.error as error:
                name = f"--{option.replace('_', '-')}"
                value = getattr(self, option)
                raise DataError(
                    f"{name} {value}: no regular expression: {error}"
                ) from None


@dataclass(frozen=True)
class StringConfig:
    """How recordings are joined to strings.

    least, most  words of a string; 0: no strings
    num_train    strings added to train
    num          strings in valid-strings and in strings
    seed         of the choice
    """

    least: int = 0
    most: int = 0
    num_train: int = 0
    num: int = 0
    seed: int = 1

    @classmethod
    def of(cls, lengths: str, *, num_train: int, num: int, seed: int) -> StringConfig:
        """Return the configuration for lengths such as "3-7" or "5"; "": no strings.

        >>> StringConfig.of("3-7", num_train=0, num=200, seed=1).most
        7

        Raises:
            DataError: no such lengths, or a negative number.
        """
        if not lengths:
            return cls()
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", lengths)
        least = int(match[1]) if match else 0
        most = int(match[2] or match[1]) if match else 0
        if not 1 <= least <= most:
            raise DataError(f"--strings {lengths}: write two lengths such as 3-7")
        for option, value in {"num": num, "train": num_train, "seed": seed}.items():
            if value < 0:
                raise DataError(f"--strings: {option} {value} is negative")
        return cls(least, most, num_train, num, seed)

    def count(self, split: str) -> int:
        """Return how many strings the recordings of a split make."""
        if not self.most:
            return 0
        return self.num_train if split == "train" else self.num


@dataclass(frozen=True)
class Take:
    """An utterance to be: recordings to join, usually one."""

    name: str
    split: str
    speaker: str
    recordings: tuple[Recording, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """What is said."""
        return tuple(word for r in self.recordings for word in r.words)


def plan_splits(config: SplitConfig) -> dict[str, list[Recording]]:
    """Return the recordings of each split, by name.

    Raises:
        DataError: a folder without recordings, a name twice, or nothing for train.
    """
    splits: dict[str, list[Recording]] = {name: [] for name in SPLITS}
    given = {"train": config.train, "valid": config.valid, "test": config.test}
    for split, folders in given.items():
        for recording in _once(split, map(list_recordings, folders)):
            target = split
            if split == "train" and _has(recording, config.test_names):
                target = "test"
            elif split == "train" and _has(recording, config.valid_names):
                target = "valid"
            splits[target].append(recording)
    if not splits["valid"]:
        places = [
            crc32(r.name.encode("utf-8", "surrogateescape")) % SHARE_STEPS
            for r in splits["train"]
        ]
        cut = config.valid_share * SHARE_STEPS
        if cut and len(places) > 1:  # one at least
            cut = max(cut, min(places) + 1)
        kept: list[Recording] = []
        held_out: list[Recording] = []
        for recording, place in zip(splits["train"], places, strict=True):
            (held_out if place < cut else kept).append(recording)
        splits["train"], splits["valid"] = kept, held_out
    if not splits["train"]:
        where = ", ".join(map(str, config.train))
        raise DataError(f"{where}: no recording is left for train")
    return splits


def _has(recording: Recording, pattern: str) -> bool:
    return bool(pattern) and re.search(pattern, recording.name) is not None


def _once(split: str, folders: Iterable[list[Recording]]) -> Iterable[Recording]:
    seen: set[str] = set()
    for recordings in folders:
        for recording in recordings:
            if recording.name in seen:
                raise DataError(f"recording {recording.name}: twice in {split}")
            seen.add(recording.name)
            yield recording


def single(split: str, recording: Recording) -> Take:
    """Return a recording as an utterance."""
    return Take(recording.name, split, recording.speaker, (recording,))


def make_strings(
    recordings: Sequence[Recording], split: str, config: StringConfig
) -> list[Take]:
    """Return strings of the recordings of a split, one speaker each.

    Speaker, length and recordings are drawn evenly; no recording is twice in a string
    unless the speaker has too few.
    """
    rng = np.random.default_rng([config.seed, SPLITS.index(split)])
    by_speaker: dict[str, list[Recording]] = {}
    for recording in recordings:
        by_speaker.setdefault(recording.speaker, []).append(recording)
    speakers = sorted(by_speaker)
    takes = []
    for number in range(config.count(split) if speakers else 0):
        speaker = speakers[rng.integers(len(speakers))]
        length = int(rng.integers(config.least, config.most + 1))
        own = by_speaker[speaker]
        chosen = rng.choice(len(own), length, replace=length > len(own))
        takes.append(
            Take(
                f"string-{number:05d}-{speaker}" if speaker else f"string-{number:05d}",
                STRING_SPLITS[split],
                speaker,
                tuple(own[i] for i in chosen),
            )
        )
    return takes


def choose_words(splits: dict[str, list[Recording]]) -> list[str]:
    """Return the words of train, sorted.

    Raises:
        DataError: all recordings of train are bad; it is about the first.
    """
    words = sorted({w for r in splits["train"] if not r.problem for w in r.words})
    if not words:
        splits["train"][0].require_sound()  # all have problems: name the first
    return words
