"""`mpilm prepare wav`, `align` and `decode`: from wav files to words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mpilm.commands.prepare import Paths, progress_bar
from mpilm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mpilm.data.frames import FrameSummary

MOST_SHOWN = 10  # bad recordings
RESULTS = "decode.json"


def wav(
    *,
    train: Paths,
    out: Path,
    valid: Paths = (),
    test: Paths = (),
    valid_names: str = "",
    test_names: str = "",
    valid_share: float = 0.05,
    words: tuple[str, ...] = (),
    features: Literal["fbank", "mfcc"] = "fbank",
    num_bins: int = 40,
    num_ceps: int = 13,
    cmvn: Literal["speaker", "utterance", "none"] = "speaker",
    rate: int | None = None,
    states: int = 8,
    silence_states: int = 3,
    rounds: int = 8,
    strings: str = "",
    num_strings: int = 200,
    train_strings: int = 0,
    seed: int = 1,
    skip_bad: bool = False,
    like: Annotated[Path | None, tyro.conf.arg(metavar="RUN")] = None,
) -> None:
    """Make a corpus of recordings: features, and an alignment with word HMMs.

    A folder holds wav files named TEXT_SPEAKER_NUMBER.wav, or wav.scp and text (and
    utt2spk) as Kaldi has them. All have one channel and one sample rate.

    Args:
        train: folders
        out: HDF5 file to write
        valid: folders; if none, taken from train
        test: folders
        valid_names: take these from train for valid: a regular expression in the name
        test_names: take these from train for test: a regular expression in the name
        valid_share: of train, for valid where nothing else says which
        words: the vocabulary; if none, the words of train
        features: log-mel energies, or MFCC
        num_bins: mel bins
        num_ceps: coefficients of mfcc
        cmvn: normalise mean and variance of each speaker in each split, or utterance
        rate: samples/s; if none, that of the first recording
        states: of each word's HMM
        silence_states: of the HMM of silence between words; 0: no silence
        rounds: alignments of train by Gaussians, before the one that is written
        strings: join recordings of a speaker to strings of so many words, as 3-7
        num_strings: in the splits valid-strings and strings (of test)
        train_strings: added to train
        seed: of the strings
        skip_bad: leave bad recordings out and count them
        like: words, states, features and rate as this run was trained with, so that
            its model can decode and align the new recordings
    """
    from mpilm.speech.features import FeatureConfig
    from mpilm.speech.plan import SplitConfig, StringConfig
    from mpilm.speech.prepare import prepare_wav

    splits = SplitConfig(train, valid, test, valid_names, test_names, valid_share)
    made = FeatureConfig(kind=features, num_bins=num_bins, num_ceps=num_ceps, cmvn=cmvn)
    if like is not None:
        from mpilm.speech.like import prepared_like

        given = (words, made, rate, states, silence_states, rounds)
        if given != ((), FeatureConfig(), None, 8, 3, 8):
            raise ConfigError(
                "--like: words, features, cmvn, rate, states and rounds are those of"
                " the run; leave these options out"
            )
        before = prepared_like(like)
        made, rate, rounds = before.features, before.rate, before.rounds
        words, states = before.hmms.words, before.hmms.num_states
        silence_states = before.hmms.silence_states
    with progress_bar() as progress:
        summary = prepare_wav(
            out,
            splits,
            strings=StringConfig.of(
                strings, num_train=train_strings, num=num_strings, seed=seed
            ),
            features=made,
            words=words,
            num_states=states,
            silence_states=silence_states,
            rounds=rounds,
            rate=rate,
            skip_bad=skip_bad,
            progress=progress,
        )
    print(
        f"{out}: {summary.frames.features} features, {summary.frames.classes} classes,"
        f" {len(summary.words):,} words, {summary.rate:,} samples/s"
    )
    print_frames(summary.frames)
    report_bad(summary.problems)


def print_frames(summary: FrameSummary) -> None:
    """Print what is in the splits."""
    for split, utterances in summary.utterances.items():
        frames = summary.frames[split]
        print(f"  {split:<14}{utterances:>9,} utterances{frames:>12,} frames")


def report_bad(problems: Any) -> None:
    """Print how many recordings were left out, and why."""
    if problems:
        print(f"  left out: {len(problems):,}")
        for problem in problems[:MOST_SHOWN]:
            print(f"    {problem}")
        if len(problems) > MOST_SHOWN:
            print("    ...")


def align(
    run: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    corpus: Path | None = None,
    prior_scale: float = 1.0,
    ema: bool = False,
    skip_bad: bool = False,
) -> int:
    """Write a corpus with labels by a trained model in the place of the old ones.

    Under mpirun the ranks share the work.

    Args:
        run: run folder
        out: HDF5 file to write
        corpus: HDF5 corpus with word HMMs; the run's own if not given
        prior_scale: log-posterior minus this times log-prior is a frame's score
        ema: use the moving average of the models in the place of the last one
        skip_bad: leave utterances out that cannot be aligned, and count them
    """
    from mpilm.speech.realign import realign

    with (
        opened(run, corpus, prior_scale, ema, [out]) as (world, frames, scores, _),
        speaking(world) as progress,
    ):
        summary, problems = realign(
            frames,
            scores,
            out,
            world,
            skip_bad=skip_bad,
            provenance={"run": str(run), "prior_scale": prior_scale},
            progress=progress,
        )
        if summary:
            print(f"{out}: aligned anew")
            print_frames(summary)
            report_bad(problems)
    return 0


def decode(
    run: tyro.conf.Positional[Path],
    /,
    *,
    split: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="split")
    ] = (),
    corpus: Path | None = None,
    penalty: float = 0.0,
    tune: str = "",
    prior_scale: float = 1.0,
    ema: bool = False,
    out: Path | None = None,
) -> int:
    """Print the word error rate of a trained model on one or more splits.

    Any word may follow any other. Under mpirun the ranks share the utterances; the
    result does not depend on how many they are. RUN/decode.json holds the figures.

    Args:
        run: run folder
        split: may be given more than once; test if not given
        corpus: HDF5 corpus with word HMMs; the run's own if not given
        penalty: what each word costs, nats: more of it, fewer words
        tune: find the penalty on this split instead
        prior_scale: log-posterior minus this times log-prior is a frame's score
        ema: use the moving average of the models in the place of the last one
        out: text file to write, a line for each utterance: its name and the words
    """
    from mpilm.speech import decode as decoding
    from mpilm.speech import require

    splits = split or ("test",)
    written = [run / RESULTS, *([out] if out else [])]
    with opened(run, corpus, prior_scale, ema, written) as (
        world,
        frames,
        scores,
        hmms,
    ):
        with world.all_or_none():
            require("jiwer", "jiwer")
            chosen = [frames.split(name) for name in splits]
            tuning = frames.split(tune) if tune else None
        results = []
        if tuning is not None:
            best = decoding.tune(tuning, scores, hmms, world)
            penalty = best.penalty
            results.append(best)
            if world.rank == 0:
                print(f"{tune} {best.errors}, penalty {penalty:g}")
        for frame_split in chosen:
            with speaking(world) as progress:
                (found,) = decoding.decode(
                    frame_split,
                    scores,
                    hmms,
                    world,
                    penalties=[penalty],
                    progress=progress,
                )
            results.append(found)
            if world.rank == 0:
                what = found.errors or f"{len(found.recognised):,} utterances, no texts"
                print(f"{found.split} {what}")
        with world.all_or_none():
            if world.rank == 0:
                write_results(run, results[-len(chosen) :], results, out)
    return 0


def write_results(
    run: Path, wanted: list[Any], results: list[Any], out: Path | None
) -> None:
    """Write the figures into the run folder, and the words to `out`.

    Raises:
        DataError: they cannot be written.
    """
    from mpilm.storage.files import new_output

    figures = [result.to_json() for result in results]
    lines = [
        " ".join((name, *words)) + "\n"
        for result in wanted
        for name, words in result.recognised.items()
    ]
    contents = {run / RESULTS: json.dumps(figures, indent=1) + "\n"}
    if out is not None:
        contents[out] = "".join(lines)
    for path, text in contents.items():
        with new_output(path) as partial:
            partial.write_text(text, encoding="utf-8")


@contextmanager
def opened(
    run: Path,
    corpus: Path | None,
    prior_scale: float,
    ema: bool,
    written: list[Path],
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Yield this rank's world, the corpus, the model's scores and the word HMMs.

    Args:
        written: files that will be, which may be none of those that are read.
    """
    from mpilm.data.frame_corpus import FrameCorpus
    from mpilm.speech.hmm import WordHmms
    from mpilm.speech.scorer import ModelScores, require_fit
    from mpilm.storage.files import require_apart
    from mpilm.train.folder import RunFolder
    from mpilm.train.run import TrainedModel
    from mpilm.world.mpi import MpiWorld, abort_on_error

    with MpiWorld() as world, abort_on_error(world):
        with world.all_or_none():
            if not 0 <= prior_scale <= 10:
                raise DataError(f"--prior-scale {prior_scale}: must be 0 to 10")
            model = TrainedModel.read(run, ema=ema)
            model.require("counts")
            frames = FrameCorpus.open(corpus or model.config.data.corpus)
            require_apart(written, [frames.path, *RunFolder(run).files()])
            require_fit(model, frames)
            try:
                hmms = WordHmms.from_json(frames.hmm)
            except DataError as error:
                raise DataError(f"{frames.path}: {error}") from None
            scores = ModelScores(model, prior_scale=prior_scale, device=world.device())
        yield world, frames, scores, hmms


@contextmanager
def speaking(world: Any) -> Iterator[Any]:
    """Yield what to call with counts: a bar on rank 0, nothing on the others."""
    if world.rank:
        yield None
        return
    with progress_bar() as progress:
        yield progress
