"""Features of speech: log-mel energies or MFCC, by kaldi-native-fbank.

frame t     25 ms of samples from 10 t ms on, Kaldi's defaults (Povey window,
            pre-emphasis 0.97, edges snipped), but no dither: the same wav gives
            the same bits
normalised  (x - mean) / deviation, over an utterance or all frames of a speaker
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpilm.errors import DataError
from mpilm.speech import require

Kind = Literal["fbank", "mfcc"]
Scope = Literal["speaker", "utterance", "none"]

FRAME_S, SHIFT_S = 0.025, 0.010
# A feature that never changes has no deviation; chosen, not tuned.
LEAST_VARIANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What a frame holds.

    kind      "fbank": log-mel energies, for networks; "mfcc": their cosine transform
    num_bins  mel bins
    num_ceps  coefficients of "mfcc", c_0 included
    cmvn      normalise the frames of a speaker, of an utterance, or none
    """

    kind: Kind = "fbank"
    num_bins: int = 40
    num_ceps: int = 13
    cmvn: Scope = "speaker"

    def __post_init__(self) -> None:
        if not 4 <= self.num_bins <= 128:
            raise DataError(f"--num-bins {self.num_bins}: must be 4 to 128")
        if self.kind == "mfcc" and not 2 <= self.num_ceps <= self.num_bins:
            raise DataError(
                f"--num-ceps {self.num_ceps}: must be 2 to the mel bins,"
                f" {self.num_bins}"
            )

    @property
    def num_features(self) -> int:
        """Numbers in a frame, F."""
        return self.num_ceps if self.kind == "mfcc" else self.num_bins

    def extract(self, name: str, samples: NDArray[np.float32], rate: int) -> Any:
        """Return the features of samples on the scale of 16 bits, (T, F) float32.

        Raises:
            DataError: fewer samples than one frame has.
        """
        knf = require("kaldi_native_fbank", "kaldi-native-fbank")
        options = knf.MfccOptions() if self.kind == "mfcc" else knf.FbankOptions()
        options.frame_opts.samp_freq = float(rate)
        options.frame_opts.frame_length_ms = 1e3 * FRAME_S
        options.frame_opts.frame_shift_ms = 1e3 * SHIFT_S
        options.frame_opts.dither = 0.0
        options.mel_opts.num_bins = self.num_bins
        options.use_energy = False  # c_0 in its place
        if self.kind == "mfcc":
            options.num_ceps = self.num_ceps
            extractor = knf.OnlineMfcc(options)
        else:
            extractor = knf.OnlineFbank(options)
        extractor.accept_waveform(float(rate), samples)
        extractor.input_finished()
        num_frames = extractor.num_frames_ready
        if not num_frames:
            raise DataError(
                f"recording {name}: {len(samples) / rate:.3f} s are less than one"
                f" frame ({FRAME_S} s)"
            )
        return np.stack([extractor.get_frame(t) for t in range(num_frames)])

    def loudness(self, features_TF: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a measure of each frame's level, (T,), before normalisation."""
        return features_TF[:, 0] if self.kind == "mfcc" else features_TF.mean(axis=1)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


class Moments:
    """Mean and deviation of frames that come utterance by utterance.

    >>> moments = Moments(1)
    >>> moments.add(np.array([[1.0], [3.0]]))
    >>> moments.normalise(np.array([[1.0], [2.0]])).tolist()
    [[-1.0], [0.0]]
    """

    def __init__(self, num_features: int) -> None:
        self.count = 0
        self.sum_F = np.zeros(num_features)
        self.squares_F = np.zeros(num_features)

    def add(self, features_TF: NDArray[Any]) -> None:
        """Count the frames of an utterance."""
        wide_TF = features_TF.astype(np.float64)
        self.count += len(wide_TF)
        self.sum_F += wide_TF.sum(axis=0)
        self.squares_F += np.square(wide_TF).sum(axis=0)

    def normalise(self, features_TF: NDArray[Any]) -> NDArray[np.float32]:
        """Return frames with the mean taken off, divided by the deviation."""
        mean_F = self.sum_F / self.count
        variance_F = self.squares_F / self.count - np.square(mean_F)
        scale_F = 1.0 / np.sqrt(np.maximum(variance_F, LEAST_VARIANCE))
        return ((features_TF - mean_F) * scale_F).astype(np.float32)


class Normaliser:
    """Normalises as `scope` says, over what it has been shown first."""

    def __init__(self, scope: Scope, num_features: int) -> None:
        self.scope, self.num_features = scope, num_features
        self.groups: dict[Hashable, Moments] = {}

    def see(self, group: Hashable, features_TF: NDArray[Any]) -> None:
        """Count an utterance of a group (a speaker in a split)."""
        if self.scope == "speaker":
            if group not in self.groups:
                self.groups[group] = Moments(self.num_features)
            self.groups[group].add(features_TF)

    def __call__(
        self, group: Hashable, features_TF: NDArray[Any]
    ) -> NDArray[np.float32]:
        """Return the frames of an utterance of a group, normalised."""
        if self.scope == "none":
            return features_TF.astype(np.float32)
        if self.scope == "speaker":
            return self.groups[group].normalise(features_TF)
        moments = Moments(self.num_features)
        moments.add(features_TF)
        return moments.normalise(features_TF)
