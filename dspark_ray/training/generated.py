"""Generated texts of the corpus: regular lines of arithmetic, and questions with their answers.

All randomness comes from the generator that a caller passes.
"""

import random
from collections.abc import Callable

# Arithmetic.


def arithmetic_text(rng: random.Random) -> str:
    """One to three paragraphs of regular lines."""
    paragraphs = ["\n".join(rng.choice(_PARAGRAPHS)(rng)) for _ in range(rng.randint(1, 3))]
    return "\n\n".join(paragraphs) + "\n"


def _limit(rng: random.Random) -> int:
    """Draw the largest operand of a paragraph; small ones are the most frequent."""
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


_PARAGRAPHS: tuple[Callable[[random.Random], list[str]], ...] = (
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


# Chat.

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


def question_and_answer(rng: random.Random) -> tuple[str, str]:
    """A question that a user asks, and the assistant's answer."""
    return rng.choices(_CHATS, _CHAT_WEIGHTS)[0](rng)


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
