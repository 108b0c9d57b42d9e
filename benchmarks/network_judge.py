"""How good are the models that the ranks of bench_network.py have left, and when?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from network_ranks import EMBED, HIDDEN, UNROLL, VOCAB
from points import WIKITEXT
from torch import nn

from mpilm.data.streams import EvaluationStreams
from mpilm.models.lstm_lm import LstmLm

TEXT = WIKITEXT.parent / "tinyshakespeare/input.txt"
VALID = 10_000  # characters held out


class Judge:
    """The perplexity of models that ranks have left in a folder."""

    def __init__(self, tokens: Any, folder: Path, ranks: int = 0) -> None:
        self.folder, self.ranks = folder, ranks
        self.model = LstmLm(VOCAB, embed=EMBED, hidden=HIDDEN).eval()
        self.batches = list(EvaluationStreams(tokens, len(tokens) // UNROLL, UNROLL))

    def lines(self, rank: int) -> list[dict[str, float]]:
        """Return what a rank has written so far."""
        path = self.folder / f"{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line may be under way
        return [json.loads(line) for line in whole.splitlines()]

    def perplexity(self, newest: list[dict[str, float]]) -> float:
        """Return that of the mean of one snapshot of every rank."""
        names = [f"{rank}-{int(s['number'])}.npy" for rank, s in enumerate(newest)]
        return self.of(np.mean([np.load(self.folder / name) for name in names], axis=0))

    @torch.no_grad()
    def of(self, mean_P: Any) -> float:
        """Return that of a model."""
        nn.utils.vector_to_parameters(torch.from_numpy(mean_P), self.model.parameters())
        total, count = 0.0, 0
        for batch in self.batches:
            tensors = {
                "inputs": torch.from_numpy(batch.inputs),
                "targets": torch.from_numpy(batch.targets),
            }
            loss = self.model.loss(batch._replace(**tensors))
            total += float(loss) * batch.num_samples
            count += batch.num_samples
        mean = total / count
        return math.inf if math.isnan(mean) else math.exp(min(50.0, mean))


def at(lines: list[list[dict[str, float]]], seconds: float) -> list[dict[str, float]]:
    """Return of every rank the newest snapshot at that time; [] before the first."""
    found = [[line for line in some if line["s"] <= seconds] for some in lines]
    return [some[-1] for some in found] if all(found) else []


def characters(smoke: bool) -> tuple[Any, Any]:
    """Return the numbers of the characters to train on, and to judge by."""
    if smoke:
        return np.split(np.random.default_rng(1).integers(VOCAB, size=30_000), [20_000])
    text = np.frombuffer(TEXT.read_bytes(), np.uint8)
    ids = np.unique(text, return_inverse=True)[1].astype(np.int64)
    return ids[:-VALID], ids[-VALID:]


def busy(last: list[dict[str, float]]) -> float:
    """Return how many cores the ranks have kept busy since they began to train."""
    return sum(line["cpu_s"] for line in last) / last[0]["s"]
