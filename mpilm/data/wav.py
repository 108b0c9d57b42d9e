"""Wav files: which there are, what they hold, and clear words about bad ones.

Recordings are listed in one of two ways:

    a folder of wav files    named TEXT_SPEAKER_NUMBER.wav, as in the Free Spoken Digit
                             Dataset: 7_jackson_32.wav
    a folder with wav.scp    lines "NAME PATH"; beside it text, lines "NAME WORD ...",
                             and utt2spk, lines "NAME SPEAKER", if it is there

Every error names the recording, so that a person can find it among thousands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpilm.data.lists import is_utf8, read_list, split_words
from mpilm.data.riff import read_pcm
from mpilm.data.sources import unreadable
from mpilm.errors import DataError
from mpilm.storage.files import reason

LISTS = ("wav.scp", "text", "utt2spk")
NAMED = re.compile(r"([^_]+)_([^_]+)_.+")  # TEXT_SPEAKER_NUMBER


@dataclass(frozen=True)
class Recording:
    """A wav file and what is said in it.

    name     unique in its folder
    speaker  who speaks; "": not known
    words    what is said
    problem  why it cannot be used, or ""
    """

    name: str
    path: Path
    speaker: str
    words: tuple[str, ...]
    problem: str = ""

    def require_sound(self) -> None:
        """Raise if the recording has a problem.

        Raises:
            DataError: one line with its name.
        """
        if self.problem:
            raise DataError(f"recording {self.name}: {self.problem}")


def list_recordings(folder: Path) -> list[Recording]:
    """Return the recordings of a folder, by name.

    One that is not as it should be has a `problem`; it is raised when it is used.

    Raises:
        DataError: no such folder, or there are no recordings.
    """
    try:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "no such folder"
            raise DataError(f"{folder}: {what}")
        if (folder / "wav.scp").is_file():
            found = list(_in_lists(folder))
        else:
            found = [_by_name(path) for path in folder.iterdir() if _is_wav(path)]
    except OSError as error:
        raise unreadable(folder, error) from error
    if not found:
        raise DataError(f"{folder}: neither wav files nor a wav.scp")
    return sorted(found, key=lambda recording: recording.name)


def _is_wav(path: Path) -> bool:
    return path.suffix.lower() == ".wav" and not path.name.startswith(".")


def _by_name(path: Path) -> Recording:
    if not is_utf8(path.stem):
        return Recording(path.name, path, "", (), "its name is not UTF-8")
    match = NAMED.fullmatch(path.stem)
    if match is None:
        problem = "its name is not TEXT_SPEAKER_NUMBER.wav, and there is no wav.scp"
        return Recording(path.name, path, "", (), problem)
    return Recording(path.stem, path, match[2], (match[1],))


def _in_lists(folder: Path) -> Iterator[Recording]:
    paths = dict(read_list(folder / "wav.scp", of_paths=True))
    texts = dict(read_list(folder / "text"))
    speakers = {}
    if (folder / "utt2spk").is_file():
        speakers = dict(read_list(folder / "utt2spk"))
    for name in texts.keys() - paths.keys():
        yield Recording(name, folder / name, "", (), "is in text but not in wav.scp")
    for name, place in paths.items():
        words = tuple(split_words(texts.get(name, "")))
        problem = ""
        if place.endswith("|"):
            problem = "a command in wav.scp: write a wav file of it, and its path"
        elif name not in texts:
            problem = "is in wav.scp but not in text"
        elif not words:
            problem = "has no words in text"
        elif speakers and name not in speakers:
            problem = "is not in utt2spk"
        path = folder / place  # the folder matters to relative paths only
        yield Recording(name, path, speakers.get(name, ""), words, problem)


@dataclass
class WavReader:
    """Reads wav files that all have one sample rate.

    rate  samples/s; None: that of the first file read
    """

    rate: int | None = field(default=None)

    def read(self, recording: Recording) -> NDArray[np.float32]:
        """Return the samples of a recording, (n,), on the scale of 16 bits.

        Raises:
            DataError: one line with its name: missing, not a wav file, truncated,
                empty, stereo, or of another sample rate than the others.
        """
        recording.require_sound()
        try:
            found = read_pcm(recording.path)
        except DataError as error:
            raise self._bad(recording, str(error)) from None
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise self._bad(recording, f"cannot be read: {reason(error)}") from error
        if found.channels != 1:
            what = "stereo" if found.channels == 2 else f"{found.channels} channels"
            raise self._bad(recording, f"{what}; one channel is needed")
        if self.rate is not None and found.rate != self.rate:
            what = f"{found.rate} samples/s, the others have {self.rate}"
            raise self._bad(recording, what)
        if found.width not in SCALES:
            raise self._bad(recording, f"samples of {8 * found.width} bits")
        self.rate = found.rate
        return _samples(found.raw, found.width)

    @staticmethod
    def _bad(recording: Recording, problem: str) -> DataError:
        return DataError(f"recording {recording.name}: {problem} ({recording.path})")


# bytes of a sample -> what brings it to the scale of 16 bits
SCALES = {1: 2.0**8, 2: 1.0, 3: 2.0**-8, 4: 2.0**-16}


def _samples(raw: bytes, width: int) -> NDArray[np.float32]:
    if width == 1:  # the only width whose samples have no sign
        wide = np.frombuffer(raw, np.uint8).astype(np.int32) - 128
    elif width == 3:
        parts = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        wide = np.zeros((len(parts), 4), np.uint8)
        wide[:, 1:] = parts  # as the high bytes of 32 bits, which carry the sign
        wide = wide.view("<i4")[:, 0] >> 8
    else:
        wide = np.frombuffer(raw, f"<i{width}")
    return (wide * SCALES[width]).astype(np.float32)
