"""Does training on a sample of the words reach the perplexity of training on all?

    python benchmarks/bench_samplers.py --out benchmarks/results/samplers.json
    python benchmarks/bench_samplers.py --vocab 267735 --hidden 64 --samples 60000 \\
        --valid-tokens 4000 --decay --bias unigram --seeds 1 --no-controls --out ...
    ... --vocab 267735 --hidden 512 --batch 32 --unroll 35 --samples 1800000 \\
        --device cuda ...       where there is a GPU: 30 times as many tokens

The same LSTM language model, from the same first weights, on the same minibatches, by
the full softmax and by samples of F frequent and m drawn words (and, of a third number,
those of so many targets before); then the perplexity on
held-out text by the full softmax. On the WikiText-2 sample with its whole vocabulary,
or, with --vocab, on a synthetic language of Zipf's law. --bias unigram begins with the
logarithms of the words' frequencies as biases.

Two controls show what an error would look like: a sample without a random part (other
words are never seen as wrong), and one whose logits are not corrected by -ln pi.

Seeds change first weights and draws alike. The noise is what the full softmax's
perplexities differ by between seeds. Goal: within 2% of the full softmax's mean.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench_xiao import BRANCHING, WIKITEXT, prepare_wikitext
from harness import parser, report
from torch import Tensor

from mpilm.data.hdf5 import Corpus
from mpilm.data.streams import EvaluationStreams, Streams
from mpilm.data.synthetic import prepare_synthetic
from mpilm.learner.learner import Learner
from mpilm.models.lstm_lm import LstmLm
from mpilm.models.sampled_softmax import SampledSoftmax
from mpilm.models.softmax import Softmax
from mpilm.optim.build import clip_before_step

CLIP = 0.25
MOST = 1.02  # sampled over full: the goal, issue E

SAMPLES = ["1000 + 400", "0 + 1400", "1000 + 2000"]
FULL = "full"
# words without a random part; words whose logits are left as they are
CONTROLS = ["1400 + 0 (control)", "1000 + 400, -ln pi left out (control)"]


class Uncorrected(SampledSoftmax):
    """The sample as it is, without (4)."""

    def sample(self, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return words, 0 instead of ln pi, places."""
        ids_S, log_pi_S, places = super().sample(targets_N)
        return ids_S, torch.zeros_like(log_pi_S), places


def make_learner(
    args: argparse.Namespace, name: str, seed: int, corpus: Corpus
) -> Learner:
    """Return a learner of a variant."""
    num_words = len(corpus.counts)

    def softmax(num_inputs: int, num_words: int) -> Softmax:
        if name == FULL:
            return Softmax(num_inputs, num_words)
        kind: Any = Uncorrected if "left out" in name else SampledSoftmax
        numbers = name.partition(",")[0].partition(" (")[0].split("+")
        frequent, random, *recent = (min(int(each), num_words) for each in numbers)
        if recent:
            kind = partial(kind, num_recent=recent[0])
        return kind(
            num_inputs,
            num_words,
            num_frequent=frequent,
            num_random=random,
            sparse=True,
        )

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(parameters, lr=args.lr, fused=True)
        sgd.register_step_pre_hook(clip_before_step(CLIP))
        return sgd

    torch.manual_seed(seed)
    model = LstmLm(
        num_words, embed=args.hidden, hidden=args.hidden, softmax=softmax, sparse=True
    )
    if args.bias == "unigram":
        counts = torch.from_numpy(corpus.counts + 1.0)
        model.softmax.bias.data.copy_((counts / counts.sum()).log())
    batches = Streams(corpus.split("train")[:], args.batch, args.unroll)
    own = {"flat": True, "sparse": True, "seed": seed, "device": args.device}
    return Learner(model, batches, optimizer, **own)


def train(args: argparse.Namespace, name: str, seed: int, corpus: Corpus) -> Any:
    """Return the perplexity on held-out text, and CPU seconds of a step."""
    learner = make_learner(args, name, seed, corpus)
    steps = args.samples // (args.batch * args.unroll)
    start_s = time.process_time()
    for step in range(steps):
        learner.lr = args.lr * (1.0 - step / steps if args.decay else 1.0)
        learner.gradient()
        learner.update()
    cpu_s = (time.process_time() - start_s) / steps
    held_out = corpus.split("valid")[: args.valid_tokens]
    found = learner.evaluate(EvaluationStreams(held_out, args.batch, args.unroll))
    return math.exp(found.nll / found.num_targets), cpu_s


def compare(args: argparse.Namespace, corpus: Corpus) -> list[str]:
    """Report perplexities; return the ratios against the goal."""
    given = {} if args.full is None else {FULL: [(args.full, math.nan)]}
    everything = [
        *([] if given else [FULL]),
        *args.words,
        *([] if args.no_controls else CONTROLS),
    ]
    found: dict[str, list[Any]] = {name: [] for name in everything} | given
    for seed in range(1, args.seeds + 1):
        for name in everything:
            found[name].append(train(args, name, seed, corpus))
            print(f"seed {seed}, {name}: {found[name][-1][0]:.2f}", flush=True)
    full = mean(perplexity for perplexity, _ in found[FULL])
    rows, lines = [], []
    for name, results in found.items():
        perplexities = [perplexity for perplexity, _ in results]
        ratio = mean(perplexities) / full
        rows.append(
            {
                "frequent + drawn": name,
                "perplexity": mean(perplexities),
                "lowest": min(perplexities),
                "highest": max(perplexities),
                "over full": ratio,
                "step (ms CPU)": 1e3 * mean(cpu_s for _, cpu_s in results),
            }
        )
        if name in args.words:
            verdict = "met" if ratio <= MOST else "MISSED"
            lines.append(f"goal {verdict}: {name}: {ratio:.3f} x full <= {MOST}")
    words = f"synthetic, V={args.vocab}" if args.vocab else "WikiText-2 sample"
    title = f"Perplexity after {args.samples} tokens, {words}, H={args.hidden}"
    report("samplers", title, rows, args)
    return lines


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__ or "", warmup=0, loops=1)
    arguments.add_argument("--samples", type=int, default=210_000)
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--hidden", type=int, default=100, help="and E")
    arguments.add_argument("--batch", type=int, default=10)
    arguments.add_argument("--unroll", type=int, default=20)
    arguments.add_argument("--lr", type=float, default=10.0)
    arguments.add_argument("--vocab", type=int, default=0, help="synthetic corpus")
    arguments.add_argument("--valid-tokens", type=int, default=20_000)
    arguments.add_argument("--decay", action="store_true", help="the rate falls to 0")
    arguments.add_argument("--bias", choices=["zero", "unigram"], default="zero")
    arguments.add_argument("--words", nargs="*", default=SAMPLES, metavar="F + m")
    arguments.add_argument("--full", type=float, help="its perplexity, if known")
    arguments.add_argument("--no-controls", action="store_true")
    arguments.add_argument("--device", default="cpu")
    args = arguments.parse_args()
    if args.smoke:
        args.vocab, args.samples, args.seeds, args.hidden = 3000, 1200, 1, 8
    if not args.vocab and not WIKITEXT.is_dir():
        print(f"skipped: no {WIKITEXT} (set MPILM_DATA, or give --vocab)")
        return
    torch.set_num_threads(1)
    args.load = os.getloadavg()  # of the whole machine, before
    with tempfile.TemporaryDirectory(prefix="samplers.") as folder:
        path = Path(folder) / "corpus.h5"
        if args.vocab:
            tokens = max(args.samples, 20 * 1000)
            prepare_synthetic(
                path, vocab=args.vocab, tokens=tokens, branching=BRANCHING
            )
        else:
            prepare_wikitext(path)
        with Corpus.open(path) as corpus:
            print("\n".join(compare(args, corpus)))


if __name__ == "__main__":
    main()
