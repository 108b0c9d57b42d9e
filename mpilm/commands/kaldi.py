"""`mpilm prepare kaldi` and `mpilm export`: from Kaldi's files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from mpilm.commands.prepare import Paths, positive, progress_bar
from mpilm.errors import DataError

MOST_SHOWN = 10  # bad utterances


def kaldi(
    *,
    out: Path,
    train: Path | None = None,
    valid: Path | None = None,
    test: Path | None = None,
    ali: Paths = (),
    classes: int | None = None,
    cmvn: Literal["speaker", "utterance", "none"] = "speaker",
    norm_vars: bool = False,
    context: int = 0,
    valid_share: float = 0.1,
    test_share: float = 0.0,
    skip_bad: bool = False,
) -> None:
    """Make a corpus of features and alignments that Kaldi made.

    A folder has feats.scp, and utt2spk, text and cmvn.scp where they are. Utterances
    are read one by one.

    Args:
        out: HDF5 file to write
        train: data folder
        valid: data folder; if none, a share of train
        test: data folder; if none, a share of train; may have no alignment
        ali: pdf ids (ali-to-pdf, not ali.*.gz) or targets: archives, or lists *.scp
        classes: number of pdfs; if not given, one more than the largest in --ali
        cmvn: normalise over a speaker (cmvn.scp if it is there), an utterance, or not
        norm_vars: normalise the variance, too
        context: frames on either side that a DNN will see, unless told otherwise
        valid_share: of train, if there is no --valid
        test_share: of train, if there is no --test
        skip_bad: leave out bad utterances and count them, in the place of stopping
    """
    from mpilm.data.kaldi_archives import Bad
    from mpilm.data.kaldi_prepare import prepare_kaldi

    given = {"train": train, "valid": valid, "test": test}
    folders = {split: path for split, path in given.items() if path is not None}
    if not folders:
        raise DataError("give at least one of --train, --valid and --test")
    if context < 0:
        raise DataError(f"--context {context}: must be 0 or more")
    shares = {"valid": valid_share, "test": test_share}
    for split, part in shares.items():
        if not 0 <= part < 1:
            raise DataError(f"--{split}-share {part}: must be in [0, 1)")
    bad = Bad(skip=skip_bad)
    with progress_bar() as progress:
        summary = prepare_kaldi(
            folders,
            out,
            alignments=ali,
            num_classes=positive("--classes", classes),
            cmvn=cmvn,
            variance=norm_vars,
            context=context,
            shares={s: part for s, part in shares.items() if s not in folders},
            bad=bad,
            progress=progress,
        )
    print(f"{summary.path}: {summary.features} features, {summary.classes} classes")
    for split, utterances in summary.utterances.items():
        frames, labelled = summary.frames[split], summary.labelled[split]
        share = f"{labelled / frames:.2%} of them with a label"
        print(f"  {split:<6}{utterances:>9,} utterances{frames:>13,} frames, {share}")
    if bad.lines:
        print(f"  {len(bad.lines):,} bad utterances left out:")
        for line in list(bad.lines.values())[:MOST_SHOWN]:
            print(f"    {line}")
        if len(bad.lines) > MOST_SHOWN:
            print(f"    and {len(bad.lines) - MOST_SHOWN:,} more")


def export_scores(
    run: tyro.conf.Positional[Path],
    /,
    *,
    corpus: Path,
    out: Path,
    split: str = "test",
    posteriors: bool = False,
    ema: bool = False,
) -> None:
    """Write what an acoustic model makes of a split, for Kaldi's decoders.

    Three files: OUT (an archive of log-posteriors minus log-priors, one matrix per
    utterance), the same name with .scp, and with .priors (how often each class stands
    in the train split, a vector that nnet-forward takes as --class-frame-counts).

    Args:
        run: run folder
        corpus: HDF5 corpus
        out: archive to write, name.ark
        split: train, valid or test
        posteriors: log-posteriors alone, without subtracting log-priors
        ema: use the moving average of the models in the place of the last one
    """
    from mpilm.data.frame_corpus import FrameCorpus
    from mpilm.data.kaldi_export import write_scores, written_beside
    from mpilm.storage.files import require_apart
    from mpilm.train.folder import RunFolder
    from mpilm.train.run import TrainedModel

    require_apart(written_beside(out), [corpus, *RunFolder(run).files()])
    model = TrainedModel.read(run, ema=ema)
    with FrameCorpus.open(corpus) as frames:
        utterances = frames.split(split)
        expected = model.require("features")
        if frames.num_features != expected:
            raise DataError(
                f"{corpus}: {frames.num_features} features in a frame, {run} was"
                f" trained with {expected}"
            )
        from mpilm.speech.scores import Scorer

        scorer = Scorer(model, priors=not posteriors)
        with progress_bar() as progress:
            write_scores(scorer, utterances, out, model.counts, progress)
    what = "log-posteriors" if posteriors else "log-posteriors minus log-priors"
    print(f"{out}: {what} of {len(utterances):,} utterances")
