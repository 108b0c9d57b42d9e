"""The Viterbi algorithm: the best path through a graph of states, in numpy.

    delta_0(s) = start(s) + b_0(s)                                            (1)
    delta_t(s) = max_r (delta_{t-1}(r) + w(r, s)) + b_t(s)                    (2)
    best       = max_s (delta_{T-1}(s) + final(s))                            (3)

b_t(s) is the score of the class of state s in frame t, all scores are logarithms. A
state has at most K predecessors of its own, and all states may meet in a hub that takes
no time, so that a loop over W words costs W and not W^2:

    hub_t      = max_r (delta_{t-1}(r) + exit(r))                             (4)
    delta_t(s) = max(as in (2), hub_t + enter(s)) + ...

A step is a handful of numpy calls over all states; only frames are a Python loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.errors import DataError

Scores = NDArray[np.float64]
NEVER = -np.inf


class NoPathError(DataError):
    """No path of the graph has as many frames as the utterance."""


@dataclass(frozen=True)
class Graph:
    """States and how one follows the other; S states, K predecessors each.

    class_S     class that a state emits: a column of the scores
    before_KS   predecessors; any state where the weight is -inf
    weight_KS   w(before, s)
    start_S     of paths that begin there
    final_S     of paths that end there
    exit_S      into the hub, or None without one
    enter_S     out of the hub, or None
    """

    class_S: NDArray[np.int64]
    before_KS: NDArray[np.int64]
    weight_KS: Scores
    start_S: Scores
    final_S: Scores
    exit_S: Scores | None = None
    enter_S: Scores | None = None


@dataclass(frozen=True)
class Path:
    """A path through a graph.

    score     (3)
    states_T  its states
    via_T     whether it came to the state through the hub; true in the first frame
    """

    score: float
    states_T: NDArray[np.int64]
    via_T: NDArray[np.bool_]


def viterbi(graph: Graph, scores_TC: NDArray[Any]) -> Path:
    """Return the best path for the scores of T frames.

    Of paths that are equally good, the one whose last differing state came by the
    earlier of the predecessors, and by a predecessor rather than the hub.

    Args:
        scores_TC: log-likelihood of each class in each frame, finite.

    Raises:
        NoPathError: no path has T frames.
    """
    emit_TS = np.asarray(scores_TC, np.float64)[:, graph.class_S]
    num_frames, num_states = emit_TS.shape
    first_S, weight_S = graph.before_KS[0], graph.weight_KS[0]
    others = list(zip(graph.before_KS[1:], graph.weight_KS[1:], strict=True))
    back_TS = np.empty((num_frames, num_states), np.int32)
    delta_S = graph.start_S + emit_TS[0]  # (1)
    for t in range(1, num_frames):
        best_S = delta_S[first_S] + weight_S  # (2)
        from_S = back_TS[t]
        from_S[:] = first_S
        for before_S, weight in others:
            other_S = delta_S[before_S] + weight
            is_better_S = other_S > best_S
            np.copyto(best_S, other_S, where=is_better_S)
            np.copyto(from_S, before_S, where=is_better_S, casting="same_kind")
        if graph.exit_S is not None and graph.enter_S is not None:
            leaving_S = delta_S + graph.exit_S
            hub = int(leaving_S.argmax())  # (4)
            other_S = leaving_S[hub] + graph.enter_S
            is_better_S = other_S > best_S
            np.copyto(best_S, other_S, where=is_better_S)
            from_S[is_better_S] = num_states + hub
        best_S += emit_TS[t]
        delta_S = best_S
    end_S = delta_S + graph.final_S  # (3)
    last = int(end_S.argmax())
    if not end_S[last] > NEVER:
        raise NoPathError(f"no path of {num_frames} frames")
    states_T = np.empty(num_frames, np.int64)
    via_T = np.ones(num_frames, np.bool_)
    state = last
    for t in range(num_frames - 1, 0, -1):
        states_T[t] = state
        state = int(back_TS[t, state])
        via_T[t] = state >= num_states
        state -= num_states if via_T[t] else 0
    states_T[0] = state
    return Path(float(end_S[last]), states_T, via_T)
