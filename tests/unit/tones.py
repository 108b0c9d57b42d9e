"""Recordings made in the tests: a "word" is a rise or fall of a tone."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np

RATE = 8000
# word -> frequencies that it goes through, Hz
WORDS = {"low": (300, 500), "high": (2500, 2900), "rise": (500, 2500)}


def tone(word: str, seed: int, seconds: float = 0.3) -> np.ndarray:
    """Return samples of a word, (n,) int16: other noise and pitch for other seeds."""
    rng = np.random.default_rng(seed)
    count = int(RATE * seconds * rng.uniform(0.8, 1.3))
    begin, end = np.array(WORDS[word]) * rng.uniform(0.95, 1.05)
    phase = np.cumsum(2 * np.pi * np.linspace(begin, end, count) / RATE)
    samples = 6000 * np.sin(phase) + rng.normal(scale=150, size=count)
    return samples.astype(np.int16)


def write_wav(
    path: Path,
    samples: np.ndarray,
    *,
    rate: int = RATE,
    channels: int = 1,
    width: int = 2,
) -> Path:
    """Write samples, (n,) or bytes, with the header that is asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples if isinstance(samples, bytes) else samples.tobytes())
    return path


def write_words(folder: Path, takes: int = 6, speakers: tuple[str, ...] = ("ann",)):
    """Write recordings WORD_SPEAKER_NUMBER.wav; return the folder."""
    for number in range(takes):
        for s, speaker in enumerate(speakers):
            for w, word in enumerate(WORDS):
                samples = tone(word, 100 * number + 10 * s + w)
                write_wav(folder / f"{word}_{speaker}_{number}.wav", samples)
    return folder
