"""Presets, and settings from mappings as YAML gives them. Errors name the whole path of a key."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from autoscale.controller import ControllerConfig
from autoscale.errors import PolicyError
from autoscale.goodput import GoodputSearch
from autoscale.replicas import ReplicaRule
from autoscale.settings import SETTINGS
from autoscale.thresholds import FixedThreshold, LoadCurve

_FOLDER = Path(__file__).with_name("presets")
_POLICIES: dict[str, type] = {policy.kind: policy for policy in (FixedThreshold, LoadCurve, GoodputSearch)}
_KEYS = {kind: {field.name for field in fields(policy)} - {"kind"} for kind, policy in _POLICIES.items()}
"""Of every kind of policy; no two kinds share a key."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, config=SETTINGS)
class Preset:
    """Settings of load control and autoscaling that were chosen together; the file states their purpose."""

    controller: ControllerConfig
    replicas: ReplicaRule


def preset_names() -> list[str]:
    """In alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """Raises PolicyError for an unknown name."""
    return build(Preset, _read_preset(name, "preset"), name)


def controller_config(
    preset: str | None, overrides: Mapping[str, Any], *, path: str = "controller"
) -> ControllerConfig:
    """The preset's settings, or the defaults, with single keys replaced, nested ones too.

    A `policy` without a `kind` is of the kind that its keys belong to. Where it has no such key either, it is of the
    preset's kind, and without a preset `fixed`, which is also the default policy. A policy of the preset's kind keeps
    the preset's other keys; one of another kind starts from that kind's defaults.

    `path` is what errors call the mapping. Raises PolicyError.
    """
    base = {} if preset is None else _read_preset(preset, f"{path}.preset")["controller"]
    settings = _merged(base, _mapping(overrides, path)) | {"preset": preset}
    if isinstance(overrides.get("policy"), Mapping):
        settings["policy"] = _policy(base.get("policy", {"kind": FixedThreshold.kind}), overrides["policy"])
    return build(ControllerConfig, settings, path)


def replica_rule(preset: str | None, overrides: Mapping[str, Any], *, path: str = "replicas") -> ReplicaRule:
    """As controller_config, for the block `replicas`."""
    base = {} if preset is None else _read_preset(preset, f"{path}.preset")["replicas"]
    return build(ReplicaRule, _merged(base, _mapping(overrides, path)), path, other_keys=("preset",))


def build(cls: type[_T], raw: object, path: str, other_keys: tuple[str, ...] = ()) -> _T:
    """Settings of class `cls` from a mapping. Raises PolicyError, with `path` before every key.

    `other_keys` are valid beside the fields of `cls` and were taken out of the mapping; errors list them as well.
    """
    try:
        return TypeAdapter(cls).validate_python(raw)
    except ValidationError as error:
        messages = [_message(cls, each, path, other_keys) for each in error.errors(include_url=False)]
        raise PolicyError("; ".join(messages)) from None


@functools.cache
def _yaml(name: str) -> Mapping[str, Any]:
    return yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def _read_preset(name: object, path: str) -> Mapping[str, Any]:
    names = preset_names()
    if name not in names:
        raise PolicyError(f"{path}={name!r}: expected one of {', '.join(names)}")
    return _yaml(name)


def _mapping(raw: object, path: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise PolicyError(f"{path}={raw!r}: expected a mapping of keys to values")
    return raw


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else is replaced."""
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _policy(base: Mapping[str, Any], policy: Mapping[str, Any]) -> dict[str, Any]:
    kind = policy.get("kind", _kind_of(policy) or base["kind"])
    return (_merged(base, policy) if kind == base["kind"] else dict(policy)) | {"kind": kind}


def _kind_of(policy: Mapping[str, Any]) -> str | None:
    return next((kind for kind, keys in _KEYS.items() if not keys.isdisjoint(policy)), None)


# Errors.


def _message(cls: type, error: Any, path: str, other_keys: tuple[str, ...]) -> str:
    """One of pydantic's errors as `path=value: expected ...`."""
    kind, location, value = error["type"], error["loc"], error["input"]
    where = path + "".join(_step(part) for part in location if part not in _POLICIES)
    cause = error.get("ctx", {}).get("error")
    if kind in ("unexpected_keyword_argument", "invalid_key"):
        keys = [field.name for field in fields(_class_at(cls, location[:-1]))]
        return f"{where}: unknown key; expected one of {', '.join([*keys, *other_keys])}"
    if kind == "missing":
        return f"{where}: missing"
    if kind == "union_tag_invalid":
        return f"{where}.kind={value['kind']!r}: expected one of {', '.join(_POLICIES)}"
    if kind in ("dataclass_type", "model_attributes_type"):
        return f"{where}={value!r}: expected a mapping of keys to values"
    if isinstance(cause, PolicyError):  # It begins with a key.
        return f"{where}.{cause}"
    return f"{where}={value!r}: {cause or error['msg'].replace('Input should be', 'expected')}"


def _step(part: str | int) -> str:
    return f"[{part}]" if isinstance(part, int) else f".{part}"


def _class_at(cls: Any, location: tuple[Any, ...]) -> Any:
    """The class of settings at `location` inside `cls`; a kind of policy stands after the key `policy` there."""
    for part in location:
        cls = _POLICIES.get(part) or typing.get_type_hints(cls)[part]
    return cls
