"""Left-to-right HMMs of whole words, and the graphs made of them.

    word   (0) -> (1) -> ... -> (N-1)    each state stays or goes on; none is skipped

State s of word w is class w N + s of the acoustic model (its "pdf"). Silence is one
more such chain behind those of the words, and is optional wherever a word begins or
ends.

    align_graph   the words of a text in order, with silence between as it likes
    loop_graph    any words in any order; each costs `penalty`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpilm.errors import DataError
from mpilm.speech.viterbi import NEVER, Graph, Path, Scores

# As likely as not: before the first alignment nothing is known. Chosen, not tuned.
FIRST_STAY = 0.5
OPTIONAL = float(np.log(0.5))  # silence, or none
# A state that was never left, or never stayed in, may do it all the same.
LEAST_STAY, MOST_STAY = 0.01, 0.99


@dataclass(frozen=True)
class WordHmms:
    """The HMMs of a vocabulary.

    >>> hmms = WordHmms.new(["one", "two"], num_states=3)
    >>> hmms.num_classes, hmms.chain([1]).tolist()
    (6, [3, 4, 5])

    words           in the order of their classes
    num_states      of a word, N
    silence_states  of silence; 0: there is none
    stay            of each class, probability that it stays for another frame
    """

    words: tuple[str, ...]
    num_states: int
    silence_states: int
    stay: tuple[float, ...]

    @classmethod
    def new(
        cls, words: Sequence[str], *, num_states: int, silence_states: int = 0
    ) -> WordHmms:
        """Return HMMs that have seen no data."""
        num_classes = len(words) * num_states + silence_states
        stay = (FIRST_STAY,) * num_classes
        return cls(tuple(words), num_states, silence_states, stay)

    @classmethod
    def from_json(cls, value: dict[str, Any] | None) -> WordHmms:
        """Return what `to_json` wrote.

        Raises:
            DataError: it is something else.
        """
        try:
            assert value is not None
            hmms = cls(
                tuple(map(str, value["words"])),
                int(value["num_states"]),
                int(value["silence_states"]),
                tuple(map(float, value["stay"])),
            )
            if len(hmms.stay) != hmms.num_classes:
                raise ValueError
            return hmms
        except (AssertionError, KeyError, TypeError, ValueError):
            raise DataError(
                "no word HMMs in the corpus: make it by mpilm prepare wav"
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {"topology": "left-to-right words"} | asdict(self)

    @property
    def num_classes(self) -> int:
        """States of all words and of silence, C."""
        return len(self.words) * self.num_states + self.silence_states

    @property
    def silence(self) -> NDArray[np.int64]:
        """Classes of silence."""
        return np.arange(len(self.words) * self.num_states, self.num_classes)

    def class_names(self) -> list[str]:
        """Return a name for each class: "seven.0", ..., "<sil>.0"."""
        states = [f"{w}.{s}" for w in self.words for s in range(self.num_states)]
        return states + [f"<sil>.{s}" for s in range(self.silence_states)]

    def ids(self, words: Sequence[str]) -> list[int]:
        """Return the numbers of words.

        Raises:
            DataError: there is no such word.
        """
        known = {word: index for index, word in enumerate(self.words)}
        for word in words:
            if word not in known:
                raise DataError(f"unknown word {word!r}")
        return [known[word] for word in words]

    def chain(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Return the classes of words in a row, without silence."""
        states = np.arange(self.num_states)
        first = self.num_states * np.asarray(ids, np.int64)
        return (first[:, None] + states).ravel()

    def with_stay(self, stays_C: NDArray[Any], visits_C: NDArray[Any]) -> WordHmms:
        """Return them with probabilities that fit an alignment.

        Args:
            stays_C: frames whose next frame is in the same visit of the class.
            visits_C: visits of the class.
        """
        share = (stays_C + 1.0) / (stays_C + visits_C + 2.0)  # add-one
        stay = np.clip(share, LEAST_STAY, MOST_STAY)
        return replace(self, stay=tuple(stay.tolist()))

    def align_graph(self, ids: Sequence[int]) -> Graph:
        """Return the graph of a text: its words in order."""
        make = _Builder(self)
        make.silence(begins=True)
        for word in ids:
            make.word(word, penalty=None)
            make.silence()
        return make.chain_graph()

    def loop_graph(self, penalty: float) -> Graph:
        """Return the graph of all texts; a word more costs `penalty`."""
        make = _Builder(self)
        for word in range(len(self.words)):
            make.word(word, penalty=penalty)
        if self.silence_states:
            make.silence(loop=True)
        return make.loop_graph()

    def words_of(self, graph: Graph, path: Path) -> list[str]:
        """Return the words that a path through `loop_graph` runs through."""
        class_T = graph.class_S[path.states_T[path.via_T]]
        is_word_T = class_T < len(self.words) * self.num_states
        return [self.words[c // self.num_states] for c in class_T[is_word_T]]


class _Builder:
    """Puts chains of states one behind the other, or side by side."""

    def __init__(self, hmms: WordHmms) -> None:
        self.hmms = hmms
        self.classes: list[int] = []
        self.links: list[list[tuple[int, float]]] = []  # of a state: its predecessors
        self.starts: dict[int, float] = {}
        self.enters: dict[int, float] = {}
        self.exits: dict[int, float] = {}
        self.open: list[tuple[int, float]] = []  # ends that the next word joins

    def chain(self, classes: Sequence[int]) -> tuple[int, int]:
        """Add states of `classes`; return the first and the last."""
        first = len(self.classes)
        for offset, pdf in enumerate(classes):
            state = first + offset
            links = [(state, float(np.log(self.hmms.stay[pdf])))]
            if offset:
                links.append((state - 1, self.leave(state - 1)))
            self.classes.append(int(pdf))
            self.links.append(links)
        return first, len(self.classes) - 1

    def leave(self, state: int) -> float:
        """Return the score of leaving a state."""
        return float(np.log1p(-self.hmms.stay[self.classes[state]]))

    def word(self, word: int, *, penalty: float | None) -> None:
        """Add a word: in the loop if it has a penalty, else behind what is open."""
        first, last = self.chain(self.hmms.chain([word]).tolist())
        if penalty is not None:
            self.enters[first], self.exits[last] = -penalty, self.leave(last)
            return
        self.links[first] += self.open
        if not self.exits:  # the first word: silence before it is optional
            self.starts[first] = OPTIONAL if self.open else 0.0
        self.open = [(last, self.leave(last))]
        self.exits = dict(self.open)

    def silence(self, *, begins: bool = False, loop: bool = False) -> None:
        """Add optional silence: in the loop, at the beginning, or behind a word."""
        if not self.hmms.silence_states:
            return
        first, last = self.chain(self.hmms.silence.tolist())
        out = self.leave(last)
        if loop:
            self.enters[first], self.exits[last] = 0.0, out
            return
        if begins:
            self.starts[first] = OPTIONAL
        self.links[first] += [(state, w + OPTIONAL) for state, w in self.open]
        self.open = [(state, w + OPTIONAL) for state, w in self.open]
        self.open.append((last, out))
        if not begins:
            self.exits = dict(self.open)

    def chain_graph(self) -> Graph:
        """Return the graph of what was put in a row."""
        return Graph(*self._arrays(), self._row(self.starts), self._row(self.exits))

    def loop_graph(self) -> Graph:
        """Return the graph of what was put side by side."""
        enter_S, exit_S = self._row(self.enters), self._row(self.exits)
        return Graph(*self._arrays(), enter_S, exit_S, exit_S, enter_S)

    def _row(self, scores: dict[int, float]) -> Scores:
        row_S = np.full(len(self.classes), NEVER)
        row_S[list(scores)] = list(scores.values())
        return row_S

    def _arrays(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Scores]:
        most = max(map(len, self.links))
        before_KS = np.zeros((most, len(self.classes)), np.int64)
        weight_KS = np.full((most, len(self.classes)), NEVER)
        for state, links in enumerate(self.links):
            for k, (before, weight) in enumerate(links):
                before_KS[k, state], weight_KS[k, state] = before, weight
        return np.array(self.classes, np.int64), before_KS, weight_KS
