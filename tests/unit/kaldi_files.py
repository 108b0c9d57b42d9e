"""A small Kaldi data folder, made with kaldiio."""

from __future__ import annotations

from pathlib import Path

import kaldiio
import numpy as np

NUM_FEATURES, NUM_PDFS = 4, 6
CENTRES = np.random.default_rng(7).normal(size=(NUM_PDFS, NUM_FEATURES)) * 2
LENGTHS = [31, 12, 25, 40, 18, 22, 9, 35, 28, 16, 33, 21]


def utterances(seed: int = 1, lengths: list[int] = LENGTHS):
    """Yield (name, features, pdf ids): runs of 3 frames around the pdf's centre."""
    random = np.random.default_rng(seed)
    for index, length in enumerate(lengths):
        pdfs = np.repeat(random.integers(0, NUM_PDFS, length // 3 + 1), 3)[:length]
        noise = random.normal(size=(length, NUM_FEATURES))
        features = (CENTRES[pdfs] + 0.7 * noise).astype(np.float32)
        yield f"s{index % 3}-u{index:02}", features, pdfs.astype(np.int32)


def make_folder(path: Path, seed: int = 1, *, compression: int | None = None) -> Path:
    """Write feats.scp and .ark, utt2spk, text, and alignments in three forms."""
    path.mkdir(parents=True)
    everything = list(utterances(seed))
    kaldiio.save_ark(
        str(path / "feats.ark"),
        {name: features for name, features, _ in everything},
        scp=str(path / "feats.scp"),
        compression_method=compression,
    )
    pdfs = {name: pdfs for name, _, pdfs in everything}
    kaldiio.save_ark(str(path / "pdf.ark"), pdfs, scp=str(path / "pdf.scp"))
    lines = [f"{name} {' '.join(map(str, ids))}\n" for name, ids in pdfs.items()]
    (path / "pdf.txt").write_text("".join(lines))
    (path / "utt2spk").write_text("".join(f"{n} {n.split('-')[0]}\n" for n in pdfs))
    (path / "text").write_text("".join(f"{n} THE WORDS {n[-1]}\n" for n in pdfs))
    return path
