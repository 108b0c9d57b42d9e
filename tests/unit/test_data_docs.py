"""The default corpus: Python's own documentation, read without running any of it."""

from __future__ import annotations

import doctest
import platform
import time
from pathlib import Path

import pytest

from mpilm.data import docs
from mpilm.data.docs import docstrings, documents, prepare_docs, read_topics, sentences
from mpilm.data.hdf5 import SPLITS, Corpus
from mpilm.errors import DataError

MODULE = '''
"""The module says what it is good for."""

raise SystemExit("a module was imported")

class Thing:
    """The thing has a docstring of its own."""

    async def wait(self):
        """It waits until the other one is ready."""

        def inner():
            "It is inside and has a docstring too."

try:
    import fast
except ImportError:
    def slow():
        """It is what there is when nothing is fast."""

if True:
    def under_a_condition():
        """It is documented under a condition here."""
'''


def library(
    folder: Path, topics: str = "topics = {'with': 'One topic it is.'}"
) -> Path:
    """Make a small standard library."""
    (folder / "pydoc_data").mkdir()
    (folder / "pydoc_data" / "topics.py").write_text(topics, encoding="utf-8")
    (folder / "package" / "test").mkdir(parents=True)
    (folder / "package" / "module.py").write_text(MODULE)
    (folder / "package" / "test" / "test_it.py").write_text('"""A test is not it."""')
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "other.py").write_text('"""Another is not it."""')
    (folder / "broken.py").write_text("def (:\n")
    return folder


def test_docstrings_are_found_in_order_and_nothing_runs(tmp_path: Path) -> None:
    found = docstrings(library(tmp_path) / "package" / "module.py")
    assert [text.split()[1] for text in found if text] == [
        "module",
        "thing",
        "waits",
        "is",
        "is",
        "is",
    ]


def test_documents_are_topics_and_modules_in_a_fixed_order(tmp_path: Path) -> None:
    topics = "topics = {'with': 'b', 'assert': 'a'}\n"
    found = [name for name, _ in documents(library(tmp_path, topics))]
    assert found == [
        "topics/assert",
        "topics/with",
        "library/broken.py",
        "library/package/module.py",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "# made by Sphinx\ntopics = {'a': 'x\\ny', 'b': '\\u2019'}\n",  # to 3.12
        "topics = {\n    'a': r'''x\ny''',\n    'b': r'''\u2019''',\n}\n",  # 3.13 on
        "from typing import Final\ntopics: Final = {'a': 'x\\ny', 'b': '\\u2019'}\n",
    ],
)
def test_topics_of_every_python_are_read(tmp_path: Path, text: str) -> None:
    path = library(tmp_path, text) / "pydoc_data" / "topics.py"
    assert read_topics(path) == {"a": "x\ny", "b": "\u2019"}


def test_a_python_without_its_documentation_is_named(tmp_path: Path) -> None:
    folder = library(tmp_path)
    out = tmp_path / "c.h5"
    topics = folder / "pydoc_data" / "topics.py"

    def refused() -> str:
        with pytest.raises(DataError) as error:
            prepare_docs(out, library=folder)
        assert not out.exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    message = refused()  # topics and modules, but hardly a word
    assert str(folder) in message
    assert "without docstrings" in message
    topics.write_text("topics = None\n")
    assert refused() == f"{topics} holds no dictionary of help topics"
    topics.write_text("topics = {\n")
    assert refused() == f"{topics} cannot be parsed"
    topics.unlink()
    assert refused().startswith(f"{topics} is missing")


def test_code_grammar_and_repeated_paragraphs_are_left_out() -> None:
    text = (
        "The \u201cwith\u201d statement\n*****************\n\n"
        "   with_stmt ::= 'with' (',' with_item)* ':' suite\n\n"
        "   with A() as a, B() as b:\n       SUITE\n\n"
    )
    prose = "It wraps a whole block.  It is well-\nknown; see :meth:`os.path` for 2!"
    text += f"{prose}\n\n{prose}\n"
    seen: set[str] = set()
    once = [
        "it wraps a whole block .",
        "it is well-known ; see os.path for N !",
    ]
    assert list(sentences(text, seen)) == once
    assert list(sentences(text, seen)) == []


def test_all_splits_are_of_whole_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docs, "LEAST_WORDS", 0)
    words = [f"{a}{b}" for a in "bcdfghklmn" for b in "aeiou"]
    texts = {word: f"This is the topic {word}, not any but {word}." for word in words}
    folder = library(tmp_path, f"topics = {texts!r}")
    seen: list[tuple[int, int]] = []
    out = tmp_path / "c.h5"
    prepare_docs(out, vocab=None, library=folder, progress=lambda *n: seen.append(n))
    assert seen == [(1, 2), (2, 2)]
    with Corpus.open(out) as corpus:
        for word in words:
            split = docs.split_of(f"topics/{word}")
            if split == "train":
                ids = corpus.split("train")[:].tolist()
                assert ids.count(corpus.ids[word]) == 2
            else:
                assert word not in corpus.ids
        assert all(len(corpus.split(name)) > 0 for name in SPLITS)


@pytest.mark.long
def test_the_corpus_of_this_python(tmp_path: Path) -> None:
    out = tmp_path / "docs.h5"
    start_s = time.process_time()
    summary = prepare_docs(out)
    assert time.process_time() - start_s < 30.0  # some 3 s of CPU time
    assert 4_000 < summary.vocabulary <= 10_000
    assert 200_000 < summary.tokens["train"] < 500_000
    for name in ("valid", "test"):
        assert summary.tokens[name] > 10_000
        assert summary.unknown[name] < 0.08
    assert 0.01 < summary.unknown["train"] < 0.02  # a model sees <unk> in training
    with Corpus.open(out) as corpus:
        assert corpus.provenance["python"] == platform.python_version()
        assert corpus.vocabulary.index("the") < 3
        assert corpus.counts.min() >= 2
        assert corpus.split("train").dtype == "uint16"


def test_examples_in_the_docstrings() -> None:
    result = doctest.testmod(docs)
    assert result.attempted > 0
    assert result.failed == 0
