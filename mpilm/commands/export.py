"""`mpilm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tyro

from mpilm.errors import DataError
from mpilm.storage.files import new_output, require_apart


def export(
    run: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    format: Literal["auto", "safetensors", "ark"] = "auto",
    corpus: Path | None = None,
    split: str = "test",
    posteriors: bool = False,
    ema: bool = False,
) -> None:
    """Write a trained model for other programs, or its scores for Kaldi's decoders.

    safetensors: the parameters under the names of the torch module, and beside them
    name.json with the model's settings and the words in the order of their ids.

    ark: for an acoustic model and a corpus three files: an archive of log-posteriors
    minus log-priors, one matrix per utterance; the same name with .scp; and with
    .priors (how often each class stands in the train split, a vector that nnet-forward
    takes as --class-frame-counts).

    Args:
        run: run folder
        out: file to write: name.safetensors, or name.ark
        format: auto: what the name of the file ends in
        corpus: HDF5 corpus; for ark only, as are the next two
        split: train, valid or test
        posteriors: log-posteriors alone, without subtracting log-priors
        ema: use the moving average of the models in the place of the last one
    """
    if format == "auto":
        format = "safetensors" if out.suffix == ".safetensors" else "ark"
    if format == "safetensors":
        export_model(run, out, ema=ema)
        return
    from mpilm.commands import kaldi

    if corpus is None:
        raise DataError("--format ark: scores of which corpus? say --corpus")
    kaldi.export_scores(
        run, corpus=corpus, out=out, split=split, posteriors=posteriors, ema=ema
    )


def export_model(run: Path, out: Path, *, ema: bool = False) -> None:
    """Write the parameters of a run's newest checkpoint as safetensors.

    Names and shapes are those of the torch module; tied weights stand there once. A
    file beside it, `model.json` for `model.safetensors`, says what the model is and
    what its inputs and outputs mean: for text the words, in the order of their ids.

    Raises:
        CheckpointError: no run there, or it cannot be read.
        DataError: the library is missing, or the file cannot be written.
    """
    import json

    from mpilm import __version__
    from mpilm.train.folder import RunFolder
    from mpilm.train.run import TrainedModel

    try:
        from safetensors.numpy import save
    except ImportError:
        raise DataError(
            "--format safetensors: the library is missing: pip install safetensors"
        ) from None
    beside = out.with_suffix(".json")
    require_apart([out, beside], RunFolder(run).files())
    model = TrainedModel.read(run, ema=ema)
    learner = model.learner()
    arrays: dict[str, Any] = {
        segment.name: model.theta_P[segment.slice].reshape(segment.shape)
        for segment in learner.layout
    }
    about = {
        "model": model.config.to_dict()["model"],
        "made_by": f"mpilm {__version__}",
        "fingerprint": model.fingerprint,
        **model.description,
    }
    kept = {
        "format": "pt",
        "made_by": about["made_by"],
        "model": model.config.model.name,
    }
    with new_output(out) as tensors, new_output(beside) as meaning:
        tensors.write_bytes(save(arrays, metadata=kept))
        meaning.write_text(f"{json.dumps(about, indent=1)}\n", encoding="utf-8")
    print(f"{out}: {len(arrays)} tensors, {model.theta_P.size:,} parameters")
    print(f"{beside}: what they mean")
