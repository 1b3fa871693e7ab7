"""The training corpus of the tiny model: the standard library, arithmetic and short chats.

All texts come from the running interpreter's own library or from seeded generators (generated.py), so the corpus needs
no download and is the same for all who run the same Python version.
"""

import ast
import hashlib
import inspect
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count as count_from
from pathlib import Path
from typing import Literal, get_args

from dspark_ray.training.generated import arithmetic_text, question_and_answer

Kind = Literal["code", "prose", "arithmetic", "chat"]
Split = Literal["train", "heldout"]

KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[Split, ...] = get_args(Split)

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_END = "</think>"

HELD_OUT_PERCENT = 2
SHORTEST_PROSE = 200
PROMPT_CHARACTERS = (200, 600)

# One pass over the generated kinds, sized to match one pass over the library's code.
_GENERATED_DOCUMENTS: dict[Split, dict[str, int]] = {
    "train": {"arithmetic": 5000, "chat": 10000},
    "heldout": {"arithmetic": 160, "chat": 500},
}

_TEST_FOLDERS = {"test", "tests"}
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """One training text, without its begin and end markers."""

    name: str
    kind: Kind
    text: str


@dataclass(frozen=True)
class _Docstring:
    """A cleaned docstring, with the dotted name of its owner inside the module."""

    owner: str
    text: str
    of_function: bool


def documents(split: Split, seed: int = 0, library: Path | None = None) -> Iterator[Document]:
    """Yield one pass over the documents of a split, kind after kind, in a fixed order.

    Another seed gives other arithmetic, other chats and another choice of test modules.
    """
    for kind in KINDS:
        yield from documents_of_kind(kind, split, seed, library)


def documents_of_kind(kind: str, split: str, seed: int = 0, library: Path | None = None) -> Iterator[Document]:
    """Yield one pass over the documents of one kind."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    library = library or Path(sysconfig.get_path("stdlib"))
    if kind == "code":
        return _code_documents(split, seed, library)
    if kind == "prose":
        return _prose_documents(split, library)
    if kind == "arithmetic":
        return _arithmetic_documents(split, seed)
    return _chat_documents(split, seed, library)


def render_chat_prompt(question: str, system: str = "") -> str:
    """Render a chat up to where the assistant's answer starts, without the begin marker."""
    return f"{system}{USER}{question}{ASSISTANT}{THINK_END}"


def held_out_prompts(kind: str, count: int, seed: int = 0, library: Path | None = None) -> list[str]:
    """Cut prompts out of held-out documents, without the begin marker."""
    rng = random.Random(f"prompts:{kind}:{seed}")
    sources = list(documents_of_kind(kind, "heldout", seed, library))
    rng.shuffle(sources)
    prompts: list[str] = []
    seen: set[str] = set()
    for round_number in count_from():
        found_before = len(prompts)
        for document in sources:
            if len(prompts) >= count:
                return prompts
            prompt = _cut_prompt(document, rng, from_start=round_number == 0)
            if prompt and prompt not in seen:
                seen.add(prompt)
                prompts.append(prompt)
        if len(prompts) == found_before and len(prompts) < count:
            raise ValueError(f"only {len(prompts)} held-out prompts of kind {kind!r} exist, asked for {count}")
    return prompts


def training_prompts(kind: str, seed: int = 0, library: Path | None = None) -> Iterator[str]:
    """Cut a different prompt out of each training document, in shuffled order; of a chat, its full question."""
    rng = random.Random(f"prompts:train:{kind}:{seed}")
    sources = list(documents_of_kind(kind, "train", seed, library))
    rng.shuffle(sources)
    seen: set[str] = set()
    for document in sources:
        prompt = _cut_prompt(document, rng, from_start=False)
        if prompt and prompt not in seen:
            seen.add(prompt)
            yield prompt


def _cut_prompt(document: Document, rng: random.Random, from_start: bool) -> str | None:
    """Cut one prompt out of a document; None if it is too short."""
    if document.kind == "chat":
        header = ASSISTANT + THINK_END
        return document.text[: document.text.index(header) + len(header)]
    lines = lines_of(document.text)
    if document.kind == "arithmetic":
        return "".join(lines[: rng.randint(3, 6)])
    first = 0 if from_start else rng.randrange(len(lines))
    shortest, longest = PROMPT_CHARACTERS
    wanted = rng.randint(shortest, longest)
    prompt = ""
    # The last line stays out, so that every prompt has a continuation in its document.
    for line in lines[first:-1]:
        if len(prompt) >= wanted or len(prompt) + len(line) > longest:
            break
        prompt += line
    return prompt if len(prompt) >= shortest else None


def lines_of(text: str) -> list[str]:
    """Cut a text after every newline and nowhere else (`str.splitlines` also cuts at other characters)."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


# The split.


def _split_of(name: str) -> Split:
    """Assign a name to a split by its hash, so that no list of held-out names is needed."""
    digest = hashlib.sha256(name.encode()).digest()
    # Ten thousand buckets keep the share exact to a hundredth of a percent.
    bucket = int.from_bytes(digest[:8], "big") % 10_000
    return "heldout" if bucket < HELD_OUT_PERCENT * 100 else "train"


# Code: whole modules.


def _code_documents(split: str, seed: int, library: Path) -> Iterator[Document]:
    """Yield the library's modules; test modules are at most a third of all bytes."""
    for name in _chosen_modules(library, seed):
        if _split_of(name) == split and (text := _read(library / name)):
            yield Document(f"code/{name}", "code", text)


def _chosen_modules(library: Path, seed: int) -> list[str]:
    """List every ordinary module and as many test modules as half the ordinary bytes hold."""
    names = _modules(library)
    chosen = [name for name in names if not _is_test(name)]
    budget = sum(len(_read(library / name).encode()) for name in chosen) // 2
    tests = [name for name in names if _is_test(name)]
    # The order follows the seed so that each pass shows other tests.
    tests.sort(key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    for name in tests:
        size = len(_read(library / name).encode())
        if size <= budget:
            budget -= size
            chosen.append(name)
    return sorted(chosen)


@cache
def _modules(library: Path) -> tuple[str, ...]:
    """List the library's usable modules as sorted relative names."""
    names = (path.relative_to(library).as_posix() for path in library.rglob("*.py"))
    return tuple(name for name in sorted(names) if not _is_excluded(name, library))


def _is_excluded(name: str, library: Path) -> bool:
    """Whether a module is installed, test data or a generated table."""
    parts = Path(name).parts
    if parts[0].startswith(("_sysconfigdata", "config-")) or name == _TOPICS:
        return True
    if {"site-packages", "dist-packages", "idle_test", "__pycache__"} & set(parts):
        return True
    if parts[:3] == ("lib2to3", "tests", "data"):
        return True
    # Character maps are hundreds of kilobytes of hexadecimal numbers and nothing else.
    return parts[0] == "encodings" and "decoding_table" in _read(library / name)


def _is_test(name: str) -> bool:
    """Tell whether a module lies in a folder of tests."""
    return not _TEST_FOLDERS.isdisjoint(Path(name).parts[:-1])


@cache
def _read(path: Path) -> str:
    """Read a module without translating line ends; empty where it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


# Prose: docstrings and the help topics of the language reference.


def _prose_documents(split: str, library: Path) -> Iterator[Document]:
    """Yield every distinct long docstring of ordinary modules and every help topic."""
    seen = _held_out_prose(library) if split == "train" else frozenset()
    yield from _distinct(_prose_of_split(split, library), set(seen))


@cache
def _held_out_prose(library: Path) -> frozenset[str]:
    """Collect the held-out texts, which some modules of the train split repeat."""
    return frozenset(document.text for document in _prose_of_split("heldout", library))


def _prose_of_split(split: str, library: Path) -> Iterator[Document]:
    """Yield prose, split by the module so that no held-out module's docstrings are trained on."""
    for name in _modules(library):
        if _is_test(name) or _split_of(name) != split:
            continue
        for docstring in _docstrings(library / name):
            if len(docstring.text) >= SHORTEST_PROSE:
                yield Document(f"prose/{name}:{docstring.owner}", "prose", docstring.text + "\n")
    for topic, text in _topics(library).items():
        name = f"prose/topics:{topic}"
        if _split_of(name) == split and len(text) >= SHORTEST_PROSE:
            yield Document(name, "prose", text.strip() + "\n")


def _distinct(candidates: Iterator[Document], seen: set[str]) -> Iterator[Document]:
    """Drop documents whose text has been seen."""
    for document in candidates:
        if document.text not in seen:
            seen.add(document.text)
            yield document


@cache
def _docstrings(path: Path) -> tuple[_Docstring, ...]:
    """Collect the docstrings of a module, its classes and its functions."""
    tree = _parse(path)
    return tuple(_walk_docstrings(tree, "")) if tree else ()


def _parse(path: Path) -> ast.Module | None:
    """Parse a module; None for test files that do not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(_read(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _walk_docstrings(node: _Documented, owner: str) -> Iterator[_Docstring]:
    """Yield the docstrings of a module, class or function and of its members."""
    text = ast.get_docstring(node, clean=False)
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if text and text.strip():
        yield _Docstring(owner, inspect.cleandoc(text), is_function)
    if is_function:
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk_docstrings(child, f"{owner}.{child.name}" if owner else child.name)


@cache
def _topics(library: Path) -> dict[str, str]:
    """Read the help topics from the dictionary literal of a generated module."""
    tree = _parse(library / _TOPICS)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


# Arithmetic: generated lines.


def _arithmetic_documents(split: Split, seed: int) -> Iterator[Document]:
    """Yield generated documents; the hash of a text decides its split."""
    rng = random.Random(f"arithmetic:{split}:{seed}")
    missing = _GENERATED_DOCUMENTS[split]["arithmetic"]
    while missing:
        text = arithmetic_text(rng)
        name = f"arithmetic/{hashlib.sha256(text.encode()).hexdigest()[:20]}"
        if _split_of(name) == split:
            missing -= 1
            yield Document(name, "arithmetic", text)


# Chat: one question and its answer.

_SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Answer in one short sentence.",
    "Answer questions about Python and small numbers.",
)

_DESCRIPTION_QUESTIONS = (
    "What does {} do?",
    "What is {} for?",
    "Explain {}.",
    "Describe {} in Python.",
)


def _chat_documents(split: Split, seed: int, library: Path) -> Iterator[Document]:
    """Yield generated chats, then one chat for each documented function."""
    rng = random.Random(f"chat:{split}:{seed}")
    missing = _GENERATED_DOCUMENTS[split]["chat"]
    while missing:
        question, answer = question_and_answer(rng)
        # The question alone decides the split, so that no held-out question is trained on.
        if _split_of(f"chat/{question}") == split:
            missing -= 1
            yield _chat(question, answer, rng)
    for function, description in _descriptions(split, library):
        yield _chat(rng.choice(_DESCRIPTION_QUESTIONS).format(function), description, rng)


def _chat(question: str, answer: str, rng: random.Random) -> Document:
    """Render a chat, one in eight under a system text."""
    system = rng.choice(_SYSTEM_TEXTS) if rng.random() < 0.125 else ""
    text = render_chat_prompt(question, system) + answer
    return Document(f"chat/{question}", "chat", text)


def _descriptions(split: str, library: Path) -> Iterator[tuple[str, str]]:
    """Yield (public function, first paragraph of its docstring) of ordinary modules."""
    for name in _modules(library):
        if _is_test(name) or _split_of(name) != split:
            continue
        module = _dotted(name)
        for docstring in _docstrings(library / name):
            function = f"{module}.{docstring.owner}"
            private = any(part.startswith("_") for part in function.split("."))
            description = " ".join(docstring.text.split("\n\n")[0].split())
            if docstring.of_function and not private and 20 <= len(description) <= 400:
                yield function, description


def _dotted(name: str) -> str:
    """Turn a module's file name into the name by which users import it."""
    dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return {"posixpath": "os.path"}.get(dotted, dotted)
