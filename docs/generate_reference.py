"""Write the tables of the site that follow from the code: keys of the YAML files, fields of requests, measured faults.

    python docs/generate_reference.py            write them between the marks in docs/*.md
    python docs/generate_reference.py --check    write nothing, and end with 1 where a page is stale

A key's sentence is the string below it in its class.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from pydantic import BaseModel  # noqa: E402
from pydantic.fields import FieldInfo  # noqa: E402

from autoscale.controller import ControllerConfig  # noqa: E402
from autoscale.goodput import GoodputSearch  # noqa: E402
from autoscale.replicas import ReplicaRule  # noqa: E402
from autoscale.saturation import SignalScale  # noqa: E402
from autoscale.thresholds import FixedThreshold, LoadCurve  # noqa: E402
from benchmarks.harness.report import filled  # noqa: E402
from deployments import args  # noqa: E402
from deployments.descriptions import field_descriptions  # noqa: E402
from deployments.http.chat_requests import ChatMessage, ChatRequest  # noqa: E402
from deployments.http.fields import Schema  # noqa: E402
from deployments.http.requests import CompletionRequest, GenerationRequest, Speculative, StreamOptions  # noqa: E402
from dspark_ray.types import SamplingParams, VerificationLimits  # noqa: E402

Line = tuple[str, ...]
_LARGE = 2**20
"""Bounds from here on keep programs safe and tell a reader nothing."""


# Types and defaults.


def shown(value: object) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(each)}' for key, each in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) and value.is_integer() and value < 1e6 else str(value)


def kind(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema or "oneOf" in schema:
        parts = [kind(part) for part in schema.get("anyOf", schema.get("oneOf", ()))]
        return " or ".join(dict.fromkeys(parts))
    if "enum" in schema:
        return " \\| ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "$ref" in schema:
        return _OBJECTS.get(schema["$ref"].rpartition("/")[2], "object")
    name = {"integer": "integer", "number": "number", "array": "list", "object": "mapping"}.get(
        schema.get("type", ""), schema.get("type", "any")
    )
    if name == "list":
        return f"list of {kind(schema.get('items', {}))}"
    return f"{name}{_range(schema)}"


def _range(schema: dict[str, Any]) -> str:
    low, above, high = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if above is not None and schema["type"] == "integer":
        low, above = above + 1, None
    if high is not None and high < _LARGE:
        return f" ({above:g}, {high:g}]" if above is not None else f" [{low or 0:g}, {high:g}]"
    if low is not None and low > -_LARGE:
        return f" ≥ {low:g}"
    return "" if above is None else f" > {above:g}"


_OBJECTS = {
    "WorkerPlacement": "`{resources: …, labels: …}`",
    "KeyFile": "`{file: PATH}`",
    "KeyVariable": "`{env: NAME}`",
    "ChatMessage": "message",
    "TextPart": "text part",
    "ToolCall": "tool call",
}


def table(heads: Sequence[str], lines: Iterable[Line]) -> str:
    """Markdown."""
    rows = [" | ".join(cell or " " for cell in line) for line in lines]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {row} |" for row in rows)])


# Keys of the YAML file.


def yaml_blocks() -> Iterator[str]:
    """A section for every block under `args`."""
    yield from _blocks(args.AppArgs, "args")


def _blocks(model: type[BaseModel], path: str) -> Iterator[str]:
    schema = model.model_json_schema()
    lines: list[Line] = []
    inner: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        block = _block_of(field.annotation)
        if block is not None:
            inner.append((name, block))
            link = f"[below](#{path.replace('.', '')}{name})"
            lines.append((f"`{name}`", "keys", "", f"{_described(field)} {link}".strip()))
            continue
        lines.append((f"`{name}`", kind(schema["properties"][name]), _default(field), _described(field)))
    about = inspect.cleandoc(model.__doc__).split("\n\n")[0] if "__doc__" in vars(model) and model.__doc__ else ""
    heads = ("key", "value", "default", "")
    yield "\n\n".join(filter(None, (f"### {path}", " ".join(about.split()), table(heads, lines))))
    for name, block in inner:
        yield from _blocks(block, f"{path}.{name}")


def _described(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{shown(value.model_dump() if isinstance(value, BaseModel) else value)}`"


def _block_of(annotation: Any) -> type[BaseModel] | None:
    """The block that a key holds, if it always holds one."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    blocks = [each for each in options if isinstance(each, type) and issubclass(each, BaseModel)]
    others = [each for each in options if each not in blocks and each is not types.NoneType]
    return blocks[0] if len(blocks) == 1 and not others else None


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union


def controller_blocks() -> Iterator[str]:
    """Sections on the settings of load control."""
    for title, cls in (
        ("load_controller", ControllerConfig),
        ("load_controller.policy, kind fixed", FixedThreshold),
        ("load_controller.policy, kind load_curve", LoadCurve),
        ("load_controller.policy, kind goodput", GoodputSearch),
        ("load_controller.signals", SignalScale),
        ("policy_kwargs", ReplicaRule),
    ):
        about = " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
        yield f"### {title}\n\n{about}\n\n{_dataclass_table(cls)}"


def _dataclass_table(cls: type) -> str:
    texts = field_descriptions(cls)
    lines = []
    for field in dataclasses.fields(cls):
        if field.name == "kind":
            continue  # the heading has it
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            default_text = f"`{made.kind}`" if hasattr(made, "kind") else "see below"
            if isinstance(made, LoadCurve) and cls is not ControllerConfig:
                default_text = f"`curve: {shown(made.curve)}`"
        else:
            default_text = f"`{shown(default)}`"
        lines.append((f"`{field.name}`", default_text, texts.get(field.name, "")))
    return table(("key", "default", ""), lines)


# Fields of requests.


def field_table(model: type[BaseModel], without: Iterable[str] = ()) -> str:
    """The fields of a request that mean something."""
    texts = field_descriptions(SamplingParams) | field_descriptions(VerificationLimits) | field_descriptions(model)
    schema = model.model_json_schema()
    lines = [
        (f"`{name}`", kind(_without_null(schema["properties"][name])), _described(field) or texts.get(name, ""))
        for name, field in model.model_fields.items()
        if name not in without
    ]
    return table(("field", "value", ""), lines)


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    parts = [part for part in schema.get("anyOf", ()) if part != {"type": "null"}]
    return schema if not parts else parts[0] if len(parts) == 1 else {"anyOf": parts}


def request_fields() -> str:
    """Tables of both endpoints, and what is ignored and refused."""
    common = GenerationRequest.model_fields
    parts = ["### Both endpoints", field_table(GenerationRequest)]
    parts += ["### /v1/completions only", field_table(CompletionRequest, common)]
    parts += ["### /v1/chat/completions only", field_table(ChatRequest, common)]
    parts += ["### A message", field_table(ChatMessage)]
    parts += ["### stream_options", field_table(StreamOptions), "### speculative", field_table(Speculative)]
    parts += ["### Accepted and ignored", _ignored(ChatRequest), "In a message: " + _ignored(ChatMessage)]
    parts += ["### Refused", "Only these values pass, because they ask for nothing:", _refused(ChatRequest)]
    return "\n\n".join(parts)


def _ignored(model: type[Schema]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(model._IGNORED)) + "."


def _refused(model: type[Schema]) -> str:
    lines = [
        (f"`{name}`", ", ".join(f"`{shown(value)}`" if value != "" else '`""`' for value in (None, *values)))
        for name, values in sorted(model._ONLY.items())
    ]
    return table(("field", "values"), lines)


# Pages.


def pages() -> dict[Path, dict[str, str]]:
    """What stands between which marks of which page."""
    docs = ROOT / "docs"
    return {
        docs / "configuration.md": {
            "args": "\n\n".join(yaml_blocks()),
            "load-control": "\n\n".join(controller_blocks()),
        },
        docs / "api.md": {"fields": request_fields()},
        docs / "operating.md": {"chaos": (ROOT / "benchmarks" / "results" / "chaos.md").read_text().strip()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="end with 1 where a page is stale, and write nothing")
    check = parser.parse_args(argv).check
    is_stale = False
    for page, parts in pages().items():
        old = new = page.read_text(encoding="utf-8")
        for name, text in parts.items():
            new = filled(new, name, f"\n{text}\n")
        if new == old:
            continue
        is_stale = True
        if check:
            print(f"{page.relative_to(ROOT)} is stale: run python docs/generate_reference.py", file=sys.stderr)
        else:
            page.write_text(new, encoding="utf-8")
    return int(check and is_stale)


if __name__ == "__main__":
    sys.exit(main())
