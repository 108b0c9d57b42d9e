"""The default corpus: the documentation that every CPython carries. No download.

Documents   Every help topic (`pydoc_data.topics`: chapters of the language reference)
            and every source file of the standard library with its docstrings. Source
            is parsed, never imported: importing can run code, and -OO takes nothing
            from source.
Text        A document is cut into paragraphs at blank lines. Code, grammar rules and
            tables are left out: a paragraph stays if two thirds of its tokens are plain
            words. A paragraph that was seen before is left out (topics repeat each
            other), so no text of one split stands in another.
Tokens      Lower case; one sentence a line, ending in `<eos>`. A word keeps its inner
            dots, hyphens, apostrophes and underscores (`os.path`, `don't`); a number is
            `N`; every other mark stands alone, save markup (` and *), which goes.
Splits      by document: crc32 of its name modulo 14: 0 valid, 1 test, else train.
"""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

from mpilm.data.hdf5 import SPLITS, PrepareSummary, ShowProgress
from mpilm.data.sources import unreadable
from mpilm.data.text import write_corpus
from mpilm.data.vocabulary import Words
from mpilm.errors import DataError
from mpilm.storage.files import require_apart

# Folders of the library that hold other things than its own documented modules.
LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
# CPython 3.10 to 3.13 have some 300,000; a tenth of it means that docs were stripped.
LEAST_WORDS = 30_000

MARKS = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "`": None,
        "*": None,
    }
)
ROLE = re.compile(r":[a-z:]+:(?=`)")
WRAPPED_HYPHEN = re.compile(r"(?<=\w)-\n\s*(?=\w)")
TOKEN = re.compile(
    r"\.\.\.|--+|[ei]\.[ge]\.|[^\W\d]\w*(?:[.'-]\w+)*|\d+(?:[.,]\d+)*|\S"
)
PLAIN = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[\"'(]?[A-Z])")
LEAST_TOKENS = 4
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def prepare_docs(
    out: str | Path,
    *,
    vocab: int | None = 10_000,
    library: Path | None = None,
    progress: ShowProgress | None = None,
) -> PrepareSummary:
    """Write a corpus of real English from Python's own documentation.

    The text depends on the version of Python, which is in the provenance.

    Args:
        vocab: keep that many most frequent words, if so many stand in the train text
            more than once; the others are `<unk>`, which a model so learns to expect.
            None: no limit.
        library: folder of the standard library; None: that of the running Python.
        progress: called with files done and in all.

    Raises:
        DataError: this Python was installed without its documentation, or `out` cannot
            be written.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    require_apart([Path(out)], library.rglob("*.py"))
    texts: dict[str, list[str]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    num_documents = num_words = 0
    for name, document in documents(library, progress):
        lines = list(sentences(document, seen))
        if lines:
            texts[split_of(name)].extend(lines)
            num_documents += 1
            num_words += sum(line.count(" ") + 1 for line in lines)
    if num_words < LEAST_WORDS:
        raise DataError(
            f"{library}: only {num_words} words of documentation: this Python was"
            " installed without docstrings; use another, or mpilm prepare text"
        )
    blocks = {name: "\n".join(lines) + "\n" for name, lines in texts.items()}
    encoder = Words()
    encoder.count(blocks["train"])
    encoder.choose(vocab, least=2)
    provenance = {
        "command": "prepare docs",
        "options": {"vocab": vocab},
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "documents": num_documents,
        "sources": [{"path": str(library)}],
    }
    return write_corpus(
        Path(out),
        encoder,
        lambda name: iter([encoder.encode(blocks[name])]),
        provenance,
    )


def split_of(document: str) -> str:
    """Return the split that a document belongs to, by its name alone.

    >>> split_of("topics/with"), split_of("library/json/decoder.py")
    ('train', 'train')
    """
    return {0: "valid", 1: "test"}.get(crc32(document.encode()) % 14, "train")


def documents(
    library: Path, progress: ShowProgress | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document, in a fixed order.

    Raises:
        DataError: the help topics or the source files are not there.
    """
    topics = read_topics(library / "pydoc_data" / "topics.py")
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]
    files = sorted(
        path
        for path in library.rglob("*.py")
        if not LEFT_OUT.intersection(path.relative_to(library).parts)
    )
    for done, path in enumerate(files, start=1):
        name = path.relative_to(library).as_posix()
        yield f"library/{name}", "\n\n".join(docstrings(path))
        if progress:
            progress(done, len(files))


def read_topics(path: Path) -> dict[str, str]:
    """Return the help topics: name -> text.

    Raises:
        DataError: they are missing, or not a dictionary of strings.
    """
    try:
        tree = _parse(path)
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: this Python was installed without its documentation"
            " (Debian: install python3; or use another Python, or mpilm prepare text)"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    except (SyntaxError, ValueError):
        raise DataError(f"{path} cannot be parsed") from None
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            try:
                topics = ast.literal_eval(node.value)
            except ValueError:
                continue
            if isinstance(topics, dict):
                return {str(name): str(text) for name, text in topics.items()}
    raise DataError(f"{path} holds no dictionary of help topics")


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a source file in the order in which they stand.

    A file that this Python cannot parse (a template, another encoding) has none.
    """
    try:
        tree = _parse(path)
    except (SyntaxError, ValueError, OSError):
        return []
    found: list[str] = []
    _collect(tree, found)
    return found


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in the file
        return ast.parse(path.read_bytes())


def _collect(node: ast.AST, found: list[str]) -> None:
    if isinstance(node, DOCUMENTED):
        found.append(ast.get_docstring(node) or "")
    for field in ("body", "orelse", "handlers", "finalbody"):
        children = getattr(node, field, None)
        if isinstance(children, list):
            for child in children:
                _collect(child, found)


def sentences(document: str, seen: set[str]) -> Iterator[str]:
    """Yield the sentences of a document, tokens separated by spaces.

    Paragraphs in `seen` are left out; new ones are added to it.

    >>> text = "See *this* module.\\n\\n>>> x = f(1)\\n\\nIt isn't ready in 3.5 now!"
    >>> list(sentences(text, set()))
    ['see this module .', "it isn't ready in N now !"]
    """
    for paragraph in re.split(r"\n\s*\n", document):
        text = ROLE.sub("", WRAPPED_HYPHEN.sub("-", paragraph)).translate(MARKS)
        text = " ".join(text.split())
        tokens = TOKEN.findall(text)
        num_plain = sum(1 for token in tokens if PLAIN.fullmatch(token))
        if 3 * num_plain < 2 * len(tokens) or text in seen:
            continue
        seen.add(text)
        for sentence in SENTENCE_END.split(text):
            tokens = TOKEN.findall(sentence.lower())
            if len(tokens) >= LEAST_TOKENS:
                yield " ".join("N" if NUMBER.fullmatch(t) else t for t in tokens)
