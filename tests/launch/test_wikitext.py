"""The whole way of a user on real text: prepare, train, be killed, resume, evaluate."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from .conftest import Running, first_checkpoint, mpirun, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("MPILM_DATA", ROOT.parent / "shared/data"))
SAMPLE = DATA / "wikitext2-sample"


@pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"no WikiText-2 sample in {DATA}")
def test_wikitext_2_on_4_ranks_killed_resumed_and_evaluated(tmp_path: Path) -> None:
    corpus, out = tmp_path / "wiki.h5", tmp_path / "run"
    text, held_out = SAMPLE / "wiki.valid.tokens", SAMPLE / "wiki.test-a.tokens"
    splits = ("--train", text, "--valid", held_out, "--test", held_out)
    prepared = mpirun(0, "prepare", "text", *splits, "--out", corpus, "--vocab", "2000")
    assert prepared.code == 0
    assert "vocabulary of 2,000 words" in prepared.out

    small = "model.embed=16 model.hidden=16 train.batch=8 train.samples=240000"
    often = "checkpoint.every=20000 schedule.warmup_samples=0 optim.lr=0.02"
    settings = f"data.corpus={corpus} {small} {often}".split()
    sets = [word for setting in settings for word in ("--set", setting)]
    train = ("train", ROOT / "jobs/configs/demo.toml", *sets, "--out", out)

    def term_the_ranks(running: Running) -> None:
        first_checkpoint(out)
        for rank in wait_for(lambda: running.ranks, "ranks"):
            os.kill(rank, signal.SIGTERM)

    stopped = mpirun(4, *train, during=term_the_ranks)
    assert stopped.code == 75, stopped
    stopped.has_no_traceback()
    finished = mpirun(4, *train, "--resume")
    assert finished.code == 0, finished
    assert "resumed at step" in finished.out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ranks"] == 4
    assert summary["samples"] >= 240_000

    results = []
    for ranks in (1, 2, 3):
        evaluated = mpirun(ranks, "eval", out, "--split", "test")
        assert evaluated.code == 0, evaluated
        results.append(re.findall(r"[\d.]+$", evaluated.out, re.MULTILINE))
    assert results[0] == results[1] == results[2]
    perplexity, unigram = map(float, results[0])
    assert perplexity == pytest.approx(summary["test_perplexity"], abs=0.01)
    assert 1.0 < perplexity < 1.5 * unigram
    written = mpirun(0, "generate", out, "--prompt", "the game", "--tokens", "12")
    assert written.code == 0
    assert written.out.startswith("the game ")
    assert len(written.out.split()) >= 12
