"""Does the moving average of the models beat the last model?

    python benchmarks/claims/ema_final_model.py

Claim       The moving average of the synchronised models beats the raw final model, for
            model averaging and BMUF, for DNN and LSTM, at no cost to training.
Source      Tian et al., arXiv 1703.01024 (abstract; decay and tables not available)
Set-up      4 ranks, blocks of 5 minibatches; LSTM on words (40,000, minibatch 4 x 10)
            and DNN on digits (120,000 frames, minibatch 128); plain SGD; the window is
            a tenth of the run; rate tuned by the one rule for each of the four on the
            raw model, with the rate falling to a tenth, and taken for a constant rate
            too; test perplexity of words, test cross-entropy (nats) of frames, 3 seeds;
            both models are of one run
Decision    reproduced if with the falling rate the average is better in all 3 seeds in
            each of the four; not reproduced if in one of the four it is worse in all
            seeds. The constant rate is shown beside. That it costs training nothing is
            held to the bit by tests/strategies/test_ema.py
"""

from __future__ import annotations

from typing import Any

from claim import Finding, Study, judged, main, shown
from tasks import EXPONENTIAL, all_seeds, few, frames, tuned, words

WHY = {
    "not reproduced": (
        "It depends on the rate. Where it falls to a tenth, the last models move little"
        " and an average over the last tenth of the run is behind them; where it is"
        " constant, the average is the better model. Which of the two the paper has,"
        " and its window, cannot be had. Use it with a rate that stays high."
    )
}
TASKS: dict[str, tuple[Any, float, dict[str, Any]]] = {
    "LSTM": (words, 8.0, {"samples": 40_000}),
    "DNN": (frames, 4.0, {"samples": 120_000}),
}
STRATEGIES = ("model_averaging", "bmuf")


def measure(study: Study) -> Finding:
    """Return what the claim came to."""
    better, worse = {}, {}
    parts = []
    for model, (task, first, key) in TASKS.items():
        window = {"ema": {"samples": key["samples"] // 10}}
        for name in STRATEGIES:
            whole = {
                **key, "strategy": {"name": name, "period": 5},
                "ranks": few(study, 4), "more": window,
            }  # fmt: skip
            lr = tuned(study, first, task, **whole)
            ratios = {}
            for schedule in (EXPONENTIAL, {"name": "constant"}):
                found = all_seeds(study, task, lr=lr, schedule=schedule, **whole)
                ratios[schedule["name"]] = [p["ema"] / p["test"] for p in found]
            falling = ratios["exponential"]
            of_it = f"{model}, {name}:"
            better[f"{of_it} better in all seeds"] = max(falling) < 1.0
            worse[f"{of_it} worse in all seeds"] = min(falling) > 1.0
            parts.append(
                f"{model}, {name}: average/raw {shown(falling, 3)}, constant rate"
                f" {shown(ratios['constant'], 3)}"
            )
    return judged(parts, holds=better, refutes=worse)


if __name__ == "__main__":
    main()
