"""The training corpus of the tiny model: the standard library, arithmetic and short chats.

Everything comes out of the running interpreter's own library or out of a seeded generator, so
the corpus needs no download and is the same for everyone who runs the same Python version.
"""

import ast
import hashlib
import inspect
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count as count_from
from pathlib import Path
from typing import Literal, get_args

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
    """A cleaned docstring and the dotted name, inside its module, of what it describes."""

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
    """Cut prompts out of held-out documents; none of them carries the begin marker."""
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
    """Cut a different prompt out of each training document, in shuffled order; a chat's is all of its question."""
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
    """Return one prompt out of a document, or nothing where the document has no place to cut."""
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
    """Cut a text behind every newline and nowhere else, which ``splitlines`` does not promise."""
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
    """Yield the library's modules, test modules being at most a third of all bytes."""
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
    """Tell installed packages, test data and generated tables apart from written modules."""
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
    """Read a module with its line ends as they are, or nothing where it is not UTF-8."""
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
    """Parse a module, or return nothing where it is meant not to parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(_read(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _walk_docstrings(node: _Documented, owner: str) -> Iterator[_Docstring]:
    """Yield the docstring of a module, class or function and of what it defines directly."""
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
    """Read the help topics, which one generated module holds as a dictionary literal."""
    tree = _parse(library / _TOPICS)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


# Arithmetic: regular lines.


def _arithmetic_documents(split: Split, seed: int) -> Iterator[Document]:
    """Yield generated documents whose own text decides their split."""
    rng = random.Random(f"arithmetic:{split}:{seed}")
    missing = _GENERATED_DOCUMENTS[split]["arithmetic"]
    while missing:
        text = _arithmetic_text(rng)
        name = f"arithmetic/{hashlib.sha256(text.encode()).hexdigest()[:20]}"
        if _split_of(name) == split:
            missing -= 1
            yield Document(name, "arithmetic", text)


def _arithmetic_text(rng: random.Random) -> str:
    """Write one to three blocks of regular lines."""
    blocks = ["\n".join(rng.choice(_BLOCKS)(rng)) for _ in range(rng.randint(1, 3))]
    return "\n\n".join(blocks) + "\n"


def _limit(rng: random.Random) -> int:
    """Draw the largest operand of a block, small ones being the most frequent."""
    return rng.choice((10, 10, 20, 20, 50, 100, 100, 1000))


def _sums(rng: random.Random) -> list[str]:
    """Write random additions."""
    limit = _limit(rng)
    pairs = [(rng.randint(0, limit), rng.randint(0, limit)) for _ in range(rng.randint(6, 20))]
    return [f"{a} + {b} = {a + b}" for a, b in pairs]


def _differences(rng: random.Random) -> list[str]:
    """Write random subtractions with results of zero or more."""
    limit = _limit(rng)
    pairs = [(rng.randint(0, limit), rng.randint(0, limit)) for _ in range(rng.randint(6, 20))]
    return [f"{max(pair)} - {min(pair)} = {max(pair) - min(pair)}" for pair in pairs]


def _products(rng: random.Random) -> list[str]:
    """Write random multiplications of small numbers."""
    pairs = [(rng.randint(0, 12), rng.randint(0, 12)) for _ in range(rng.randint(6, 20))]
    return [f"{a} x {b} = {a * b}" for a, b in pairs]


def _quotients(rng: random.Random) -> list[str]:
    """Write random divisions without a remainder."""
    pairs = [(rng.randint(0, 12), rng.randint(1, 12)) for _ in range(rng.randint(6, 16))]
    return [f"{a * b} / {b} = {a}" for a, b in pairs]


def _times_table(rng: random.Random) -> list[str]:
    """Write a part of the multiplication table of one number."""
    factor, first = rng.randint(1, 20), rng.randint(0, 4)
    rows = range(first, first + rng.randint(6, 12))
    return [f"{factor} x {row} = {factor * row}" for row in rows]


def _addition_table(rng: random.Random) -> list[str]:
    """Write consecutive additions to one number."""
    term, first = rng.randint(1, 100), rng.randint(0, 20)
    rows = range(first, first + rng.randint(6, 16))
    return [f"{row} + {term} = {row + term}" for row in rows]


def _counting(rng: random.Random) -> list[str]:
    """Write counting sequences, upwards and downwards, one to a line."""
    return [_count_line(rng) for _ in range(rng.randint(2, 6))]


def _count_line(rng: random.Random) -> str:
    """Write one counting sequence behind its description."""
    first, step, length = (
        rng.randint(0, 100),
        rng.choice((1, 1, 1, 2, 3, 5, 10)),
        rng.randint(5, 15),
    )
    numbers = [first + step * index for index in range(length)]
    if rng.random() < 0.25:
        numbers.reverse()
    by = "" if step == 1 else f" by {step}"
    return f"Count from {numbers[0]} to {numbers[-1]}{by}: {_listed(numbers)}"


def _number_column(rng: random.Random) -> list[str]:
    """Write a counting sequence one number to a line."""
    first, step = rng.randint(0, 500), rng.choice((1, 1, 2, 5, 10))
    return [str(first + step * index) for index in range(rng.randint(8, 25))]


def _comparisons(rng: random.Random) -> list[str]:
    """Write comparisons of random numbers."""
    limit = _limit(rng)
    lines = []
    for _ in range(rng.randint(6, 20)):
        a, b = rng.randint(0, limit), rng.randint(0, limit)
        sign = "<" if a < b else ">" if a > b else "="
        lines.append(f"{a} {sign} {b}")
    return lines


def _parities(rng: random.Random) -> list[str]:
    """Write which consecutive numbers are even and which are odd."""
    first = rng.randint(0, 200)
    rows = range(first, first + rng.randint(6, 14))
    return [f"{row} is {'odd' if row % 2 else 'even'}" for row in rows]


def _squares(rng: random.Random) -> list[str]:
    """Write consecutive numbers beside their doubles and squares."""
    first = rng.randint(0, 20)
    rows = range(first, first + rng.randint(5, 10))
    header = ["| n | n + n | n x n |", "| --- | --- | --- |"]
    return header + [f"| {row} | {row + row} | {row * row} |" for row in rows]


_BLOCKS: tuple[Callable[[random.Random], list[str]], ...] = (
    _sums,
    _sums,
    _differences,
    _products,
    _quotients,
    _times_table,
    _addition_table,
    _counting,
    _number_column,
    _comparisons,
    _parities,
    _squares,
)


def _listed(numbers: list[int]) -> str:
    """Join numbers with commas."""
    return ", ".join(map(str, numbers))


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

_OPERATIONS = (
    # the function's name, what it does to two numbers, its value
    ("add", "adds", "{a} + {b}"),
    ("subtract", "subtracts", "{a} - {b}"),
    ("multiply", "multiplies", "{a} * {b}"),
    ("divide", "divides", "{a} / {b}"),
    ("compare", "compares", "{a} == {b}"),
    ("average", "averages", "({a} + {b}) / 2"),
)

_ARGUMENT_NAMES = (("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("m", "n"))

_FUNCTIONS = (
    # what the function does, its name, its argument, its body
    ("returns the length of a list", "length", "items", "return len(items)"),
    ("returns the largest item of a list", "largest", "items", "return max(items)"),
    ("returns the smallest item of a list", "smallest", "items", "return min(items)"),
    ("sums a list of numbers", "total", "numbers", "return sum(numbers)"),
    ("reverses a string", "reverse", "text", "return text[::-1]"),
    ("reverses a list", "reverse", "items", "return items[::-1]"),
    ("sorts a list", "sort", "items", "return sorted(items)"),
    ("returns the first item of a list", "first", "items", "return items[0]"),
    ("returns the last item of a list", "last", "items", "return items[-1]"),
    ("squares a number", "square", "n", "return n * n"),
    ("doubles a number", "double", "n", "return n * 2"),
    ("negates a number", "negate", "n", "return -n"),
    ("checks whether a number is even", "is_even", "n", "return n % 2 == 0"),
    ("checks whether a number is odd", "is_odd", "n", "return n % 2 == 1"),
    ("checks whether a number is positive", "is_positive", "n", "return n > 0"),
    ("checks whether a list is empty", "is_empty", "items", "return len(items) == 0"),
    ("converts a string to upper case", "upper", "text", "return text.upper()"),
    ("converts a string to lower case", "lower", "text", "return text.lower()"),
    ("splits a string into words", "words", "text", "return text.split()"),
    ("counts the words of a string", "count_words", "text", "return len(text.split())"),
    ("removes duplicates from a list", "unique", "items", "return list(set(items))"),
    ("greets a person", "greet", "name", 'return f"Hello, {name}!"'),
    (
        "computes the factorial of a number",
        "factorial",
        "n",
        "if n <= 1:\n        return 1\n    return n * factorial(n - 1)",
    ),
    (
        "computes a Fibonacci number",
        "fibonacci",
        "n",
        "if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)",
    ),
    (
        "returns the absolute value of a number",
        "absolute",
        "n",
        "if n < 0:\n        return -n\n    return n",
    ),
    (
        "prints every item of a list",
        "print_all",
        "items",
        "for item in items:\n        print(item)",
    ),
    (
        "reads a file",
        "read_file",
        "path",
        'with open(path, encoding="utf-8") as file:\n        return file.read()',
    ),
)


def _chat_documents(split: Split, seed: int, library: Path) -> Iterator[Document]:
    """Yield generated chats, then one chat for each documented function."""
    rng = random.Random(f"chat:{split}:{seed}")
    missing = _GENERATED_DOCUMENTS[split]["chat"]
    while missing:
        question, answer = rng.choices(_CHATS, _CHAT_WEIGHTS)[0](rng)
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
    """Yield the public functions of ordinary modules and what their docstrings say first."""
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


def _calculation_chat(rng: random.Random) -> tuple[str, str]:
    """Ask for one calculation."""
    limit = _limit(rng)
    a, b = rng.randint(0, limit), rng.randint(0, limit)
    sign = rng.choice("++-x")
    if sign == "-":
        a, b = max(a, b), min(a, b)
    if sign == "x":
        a, b = rng.randint(0, 12), rng.randint(0, 12)
    value = {"+": a + b, "-": a - b, "x": a * b}[sign]
    form = rng.choice(("What is {}?", "What is {}?", "Calculate {}.", "How much is {}?"))
    expression = f"{a} {sign} {b}"
    return form.format(expression), f"{expression} = {value}."


def _counting_chat(rng: random.Random) -> tuple[str, str]:
    """Ask for a counting sequence."""
    first, length = rng.randint(0, 90), rng.randint(3, 15)
    numbers = list(range(first, first + length))
    direction = ""
    if rng.random() < 0.25:
        numbers.reverse()
        direction = " down"
    return f"Count{direction} from {numbers[0]} to {numbers[-1]}.", _listed(numbers)


def _comparison_chat(rng: random.Random) -> tuple[str, str]:
    """Ask which of two numbers is larger or smaller."""
    a, b = rng.sample(range(_limit(rng) + 1), 2)
    word, pick = rng.choice((("larger", max), ("smaller", min)))
    return f"Which is {word}, {a} or {b}?", f"{pick(a, b)} is {word}."


def _parity_chat(rng: random.Random) -> tuple[str, str]:
    """Ask whether a number is even or odd."""
    number, asked = rng.randint(0, 1000), rng.choice(("even", "odd"))
    actual = "odd" if number % 2 else "even"
    return f"Is {number} {asked}?", f"{'Yes' if asked == actual else 'No'}, {number} is {actual}."


def _operation_chat(rng: random.Random) -> tuple[str, str]:
    """Ask for a function of two numbers."""
    name, verb, expression = rng.choice(_OPERATIONS)
    a, b = rng.choice(_ARGUMENT_NAMES)
    named = rng.random() < 0.5
    which = f"two numbers {a} and {b}" if named else "two numbers"
    if not named:
        a, b = _ARGUMENT_NAMES[0]
    return (
        f"Write a function that {verb} {which}.",
        _fenced(f"def {name}({a}, {b}):\n    return {expression.format(a=a, b=b)}"),
    )


def _constant_chat(rng: random.Random) -> tuple[str, str]:
    """Ask for a function that applies one constant to a number."""
    number = rng.randint(2, 100)
    verb, sign, name = rng.choice(
        (
            ("adds {} to a number", "+", "add_{}"),
            ("subtracts {} from a number", "-", "subtract_{}"),
            ("multiplies a number by {}", "*", "multiply_by_{}"),
            ("divides a number by {}", "/", "divide_by_{}"),
        )
    )
    return (
        f"Write a function that {verb.format(number)}.",
        _fenced(f"def {name.format(number)}(n):\n    return n {sign} {number}"),
    )


def _function_chat(rng: random.Random) -> tuple[str, str]:
    """Ask for a well-known small function."""
    purpose, name, argument, body = rng.choice(_FUNCTIONS)
    form = rng.choice(("Write a function that {}.", "Write a Python function that {}."))
    return form.format(purpose), _fenced(f"def {name}({argument}):\n    {body}")


def _fenced(code: str) -> str:
    """Put code between Markdown fences."""
    return f"```python\n{code}\n```"


_CHATS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _calculation_chat,
    _counting_chat,
    _comparison_chat,
    _parity_chat,
    _operation_chat,
    _constant_chat,
    _function_chat,
)
_CHAT_WEIGHTS = (40, 20, 10, 5, 4, 9, 12)
