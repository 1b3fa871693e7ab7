"""The sentences below the fields of a class, for reference pages and JSON schemas."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap


def field_descriptions(cls: type) -> dict[str, str]:
    """The string below each annotated field of a class and of its bases, on one line; None is written as YAML's null.

    Classes whose source cannot be found, such as those that a call has made, have none.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(("builtins", "pydantic", "typing")):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:
            continue
        [definition] = ast.parse(textwrap.dedent(source)).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                text = " ".join(str(below.value.value).split())
                found[field.target.id] = re.sub(r"\bNone\b", "null", text)
    return found
