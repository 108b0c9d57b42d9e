"""`mpilm eval` and `mpilm generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from mpilm.errors import DataError


def eval_(
    run: tyro.conf.Positional[Path],
    /,
    *,
    split: str = "test",
    corpus: Path | None = None,
    ema: bool = False,
) -> int:
    """Print the perplexity of a trained model on a split, beside a unigram model's.

    Under mpirun the ranks share the work; the number does not depend on how many.

    Args:
        run: run folder
        split: train, valid or test
        corpus: HDF5 corpus; the run's own if not given
        ema: measure the moving average of the models in the place of the last one
    """
    from mpilm.train.evaluate import evaluate, unigram_perplexity
    from mpilm.train.run import TrainedModel
    from mpilm.train.task import LanguageTask, open_task
    from mpilm.world.mpi import MpiWorld, abort_on_error

    with MpiWorld() as world, abort_on_error(world):
        with world.all_or_none():
            model = TrainedModel.read(run, ema=ema)
            task = open_task(corpus or model.config.data.corpus, model.config.model)
            task.require_split(split)
            if task.fingerprint != model.fingerprint:
                raise DataError(
                    f"{task.path}: its {task.meaning} is not the one that {run} was"
                    " trained with"
                )
            learner = model.learner(world.device())
        result = evaluate(learner, task, split, model.config.train, world)
        if world.rank == 0:
            print(f"{split} {result}")
            if isinstance(task, LanguageTask):
                per_word = task.word_perplexity(split, result.loss)
                if per_word is not None:
                    print(f"{split} perplexity per word {per_word:.2f}")
                unigram = unigram_perplexity(task.corpus, split)
                print(f"unigram baseline {unigram:.2f}")
            if task.floor is not None:
                print(f"floor of the language {task.floor:.2f}")
    return 0


def generate(
    run: tyro.conf.Positional[Path],
    /,
    *,
    prompt: str = "",
    tokens: int = 40,
    temperature: float = 0.8,
    top_k: Annotated[int, tyro.conf.arg(name="top-k")] = 0,
    unk: bool = False,
    seed: int = 0,
) -> int:
    """Print text that a trained model goes on with after a prompt.

    Args:
        run: run folder
        prompt: text to begin with
        tokens: how many words (or characters) to add
        temperature: below 1: more likely words more often; 0: always the likeliest
        top_k: choose among the k likeliest only; 0: among all
        unk: let <unk> be chosen too
        seed: of the random choice
    """
    from mpilm.data.hdf5 import UNK
    from mpilm.data.subwords import prompt_pieces, text_of_pieces, tokenizer_of
    from mpilm.data.text import encode_prompt, text_from_ids
    from mpilm.train.run import TrainedModel

    options = {"--tokens": tokens, "--temperature": temperature, "--top-k": top_k}
    for option, value in options.items():
        if not value >= 0:
            raise DataError(f"{option} {value}: must be 0 or more")
    model = TrainedModel.read(run)
    pieces = None
    if model.level == "subword":
        pieces = tokenizer_of(str(model.require("tokenizer")), str(run))
        ids = prompt_pieces(prompt, model.vocabulary, pieces)
    else:
        ids = encode_prompt(prompt, model.vocabulary, model.level)
    unknown = [i for i, word in enumerate(model.vocabulary) if word == UNK]
    never = [] if unk or len(unknown) == len(model.vocabulary) else unknown
    import torch  # late: what is wrong with the arguments is said at once

    lstm: Any = model.learner().model
    made = lstm.generate(
        ids,
        tokens,
        temperature=temperature,
        top_k=top_k,
        never=never,
        generator=torch.Generator().manual_seed(seed),
    )
    if pieces is not None:
        print(text_of_pieces([*ids, *made], model.vocabulary, pieces))
    else:
        print(text_from_ids([*ids, *made], model.vocabulary, model.level))
    return 0
