"""Viterbi against all paths, one by one; word HMMs against their definition."""

from __future__ import annotations

from itertools import product
from math import log

import numpy as np
import pytest

from mpilm.errors import DataError
from mpilm.speech.align import Aligner, flat_start, require_frames
from mpilm.speech.hmm import OPTIONAL, WordHmms
from mpilm.speech.viterbi import NEVER, Graph, NoPathError, viterbi


def random_graph(rng, num_states, num_classes, most, *, hub):
    """Return a graph where about a third of all weights are -inf."""

    def scores(*shape):
        drawn = rng.normal(size=shape)
        return np.where(rng.random(shape) < 1 / 3, NEVER, drawn)

    return Graph(
        class_S=rng.integers(num_classes, size=num_states),
        before_KS=rng.integers(num_states, size=(most, num_states)),
        weight_KS=scores(most, num_states),
        start_S=scores(num_states),
        final_S=scores(num_states),
        exit_S=scores(num_states) if hub else None,
        enter_S=scores(num_states) if hub else None,
    )


def all_paths(graph, scores_TC):
    """Yield (score, states, through the hub) of every path, possible or not."""
    num_frames, num_states = len(scores_TC), len(graph.class_S)
    emit_TS = scores_TC[:, graph.class_S]
    ways = [*range(len(graph.before_KS)), *([] if graph.exit_S is None else ["hub"])]
    for states in product(range(num_states), repeat=num_frames):
        for steps in product(ways, repeat=num_frames - 1):
            score = graph.start_S[states[0]] + emit_TS[0, states[0]]
            for t, way in enumerate(steps, start=1):
                old, new = states[t - 1], states[t]
                if way == "hub":
                    score += graph.exit_S[old] + graph.enter_S[new]
                elif graph.before_KS[way, new] == old:
                    score += graph.weight_KS[way, new]
                else:
                    score = NEVER
                score += emit_TS[t, new]
            through = (True, *(way == "hub" for way in steps))
            yield score + graph.final_S[states[-1]], states, through


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_the_best_of_all_paths_is_found(seed, hub):
    rng = np.random.default_rng(seed)
    num_states, num_frames = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    graph = random_graph(rng, num_states, 3, int(rng.integers(1, 3)), hub=hub)
    scores_TC = rng.normal(size=(num_frames, 3))
    score, states, through = max(all_paths(graph, scores_TC))
    if score == NEVER:
        with pytest.raises(NoPathError, match=f"{num_frames} frames"):
            viterbi(graph, scores_TC)
        return
    path = viterbi(graph, scores_TC)
    assert path.score == pytest.approx(score, abs=1e-12)
    assert path.states_T.tolist() == list(states)
    assert path.via_T.tolist() == list(through)


def sequences(hmms, ids, num_frames):
    """Yield every sequence of classes that HMMs of words may run through, by score.

    Written from the definition: runs of classes, silence before, between and after.
    """
    gaps = [False, True] if hmms.silence_states else [False]
    for silent in product(gaps, repeat=len(ids) + 1):
        chain: list[int] = []
        score = 0.0
        for gap, word in zip(silent, [*ids, None], strict=True):
            score += OPTIONAL if hmms.silence_states else 0.0
            chain += hmms.silence.tolist() if gap else []
            chain += [] if word is None else hmms.chain([word]).tolist()
        for cuts in product(range(1, num_frames + 1), repeat=len(chain)):
            if sum(cuts) != num_frames:
                continue
            leave = [log(1 - hmms.stay[c]) for c in chain]
            stay = [(n - 1) * log(hmms.stay[c]) for n, c in zip(cuts, chain)]  # noqa: B905
            yield score + sum(leave) + sum(stay), np.repeat(chain, cuts)


def some_hmms(silence_states, num_states=2):
    hmms = WordHmms.new(
        ["a", "b"], num_states=num_states, silence_states=silence_states
    )
    rng = np.random.default_rng(7)
    counts = rng.integers(1, 9, size=(2, hmms.num_classes))
    return hmms.with_stay(*counts)


@pytest.mark.parametrize("silence_states", [0, 1])
@pytest.mark.parametrize("seed", range(6))
def test_an_alignment_is_the_best_of_all_that_the_text_allows(seed, silence_states):
    hmms = some_hmms(silence_states)
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, size=int(rng.integers(1, 3))).tolist()
    num_frames = int(rng.integers(2 * len(ids), 2 * len(ids) + 3))
    scores_TC = rng.normal(size=(num_frames, hmms.num_classes))
    frames = np.arange(num_frames)
    score, classes = max(
        (
            (weight + scores_TC[frames, classes].sum(), tuple(classes.tolist()))
            for weight, classes in sequences(hmms, ids, num_frames)
        ),
    )
    graph = hmms.align_graph(ids)
    path = viterbi(graph, scores_TC)
    assert path.score == pytest.approx(score, abs=1e-9)
    assert tuple(graph.class_S[path.states_T].tolist()) == classes
    aligner = Aligner(hmms)
    words = [hmms.words[i] for i in ids]
    labels_T = aligner.align("u", words, scores_TC)
    assert tuple(labels_T.tolist()) == classes
    assert aligner.stays_C.sum() + aligner.visits_C.sum() == num_frames


@pytest.mark.parametrize("silence_states", [0, 1])
@pytest.mark.parametrize("penalty", [-2.0, 0.0, 1.5])
@pytest.mark.parametrize("num_states", [1, 2])
def test_the_loop_finds_the_best_text(num_states, penalty, silence_states):
    """Every text is tried with its words in order; silence costs nothing extra here."""
    hmms = some_hmms(silence_states, num_states)
    rng = np.random.default_rng(num_states)
    for num_frames in (2, 3):
        scores_TC = rng.normal(size=(num_frames, hmms.num_classes))
        graph = hmms.loop_graph(penalty)
        path = viterbi(graph, scores_TC)
        found = hmms.words_of(graph, path)
        best, texts = NEVER, set()
        for length in range(num_frames // num_states + 1):
            for ids in product(range(2), repeat=length):
                score = best_of_text(hmms, ids, scores_TC) - penalty * length
                if score > best + 1e-9:
                    best, texts = score, set()
                if score > best - 1e-9:
                    texts.add(tuple(hmms.words[i] for i in ids))
        assert path.score == pytest.approx(best, abs=1e-9)
        assert tuple(found) in texts


def best_of_text(hmms, ids, scores_TC):
    """Return the best score of a text in the loop: any silences between its words."""
    best = NEVER
    gaps = range(len(scores_TC) + 1) if hmms.silence_states else [0]
    for silent in product(gaps, repeat=len(ids) + 1):
        chain: list[int] = []
        for gap, word in zip(silent, [*ids, None], strict=True):
            chain += gap * hmms.silence.tolist()
            chain += [] if word is None else hmms.chain([word]).tolist()
        if 0 < len(chain) <= len(scores_TC):
            best = max(best, best_of_chain(hmms, chain, scores_TC))
    return best


def best_of_chain(hmms, chain, scores_TC):
    """Return the best score of classes in a row, by recursion over the last one."""
    if not chain:
        return 0.0 if not len(scores_TC) else NEVER
    stay = hmms.stay[chain[-1]]
    best = NEVER
    for frames in range(1, len(scores_TC) - len(chain) + 2):
        rest = best_of_chain(hmms, chain[:-1], scores_TC[:-frames])
        own = scores_TC[-frames:, chain[-1]].sum()
        best = max(best, rest + own + (frames - 1) * log(stay) + log(1 - stay))
    return best


def test_the_same_word_twice_is_told_from_a_long_word():
    """One state: only the hub tells them apart, and the penalty decides."""
    hmms = WordHmms.new(["a"], num_states=1)  # stays and leaves with 1/2
    scores_TC = np.zeros((3, 1))
    for penalty, words in ((1.0, ["a"]), (-1.0, ["a", "a", "a"])):
        graph = hmms.loop_graph(penalty)
        assert hmms.words_of(graph, viterbi(graph, scores_TC)) == words


def test_flat_starts():
    hmms = WordHmms.new(["a", "b"], num_states=2, silence_states=1)
    loud = np.array([0, 0, 9, 9, 9, 9, 9, 0.0])
    assert flat_start(hmms, [1], loud).tolist() == [4, 4, 2, 2, 2, 3, 3, 4]
    # three words need more frames than are loud
    spread = [2, 2, 3, 0, 1, 1, 2, 3]
    assert flat_start(hmms, [1, 0, 1], loud).tolist() == spread
    assert flat_start(hmms, [0], np.zeros(4)).tolist() == [0, 0, 1, 1]


def test_utterances_that_cannot_be_aligned_are_named():
    hmms = WordHmms.new(["a"], num_states=3)
    with pytest.raises(DataError, match=r"utterance u7: 5 frames are shorter .*'a a'"):
        Aligner(hmms).align("u7", ["a", "a"], np.zeros((5, 3)))
    with pytest.raises(DataError, match="utterance u8: unknown word 'x'"):
        Aligner(hmms).align("u8", ["x"], np.zeros((5, 3)))
    with pytest.raises(DataError, match="utterance u9: has no words"):
        require_frames("u9", hmms, [], 5)


def test_hmms_survive_json():
    hmms = some_hmms(2)
    assert WordHmms.from_json(hmms.to_json()) == hmms
    assert hmms.class_names() == ["a.0", "a.1", "b.0", "b.1", "<sil>.0", "<sil>.1"]
    for wrong in (None, {}, {**hmms.to_json(), "stay": [0.5]}, {"words": 3}):
        with pytest.raises(DataError, match="no word HMMs in the corpus"):
            WordHmms.from_json(wrong)


def test_durations_are_fitted():
    hmms = WordHmms.new(["a"], num_states=2)
    aligner = Aligner(hmms)
    scores_TC = np.log(np.array([[9, 1], [9, 1], [9, 1], [1, 9]]))
    assert aligner.align("u", ["a"], scores_TC).tolist() == [0, 0, 0, 1]
    assert aligner.stays_C.tolist() == [2, 0]
    assert aligner.visits_C.tolist() == [1, 1]
    assert aligner.fitted().stay == pytest.approx((3 / 5, 1 / 3))
