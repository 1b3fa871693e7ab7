"""Presets, and the way from a mapping, as YAML gives it, to our settings: errors name the whole path of a key."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from autoscale.controller import ControllerConfig
from autoscale.replicas import ReplicaRule
from autoscale.saturation import ConfigError
from autoscale.thresholds import FixedThreshold, GoodputSearch, LoadCurve, ThresholdPolicy

_FOLDER = Path(__file__).with_name("presets")
_POLICIES: dict[str, type] = {policy.kind: policy for policy in (FixedThreshold, LoadCurve, GoodputSearch)}
_DEFAULT_KIND = LoadCurve.kind
"""What a policy is whose keys do not tell, as in ControllerConfig."""
_EXPECTED = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that were chosen for each other; the file says for what."""

    controller: ControllerConfig
    replicas: ReplicaRule


def preset_names() -> list[str]:
    """In alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """Raises ConfigError for a name that there is no file of."""
    return build(Preset, _blocks(name, "preset"), name)


def controller_config(
    preset: str | None, overrides: Mapping[str, Any], *, path: str = "controller"
) -> ControllerConfig:
    """The preset's, or the defaults, with single keys replaced, nested ones too.

    Of `policy`, other keys stay as long as its kind does; another kind starts from that kind's own defaults. `path`
    is what errors call the mapping. Raises ConfigError.
    """
    settings = _overridden(preset, "controller", overrides, path) | {"preset": preset}
    return cast(ControllerConfig, _dataclass(ControllerConfig, settings, path))


def replica_rule(preset: str | None, overrides: Mapping[str, Any], *, path: str = "replicas") -> ReplicaRule:
    """As controller_config, for the other block."""
    settings = _overridden(preset, "replicas", overrides, path)
    return cast(ReplicaRule, _dataclass(ReplicaRule, settings, path, beside=("preset",)))


def build(cls: type[_T], raw: object, path: str) -> _T:
    """A dataclass of ours from a mapping. Raises ConfigError, with `path` before the key."""
    return cast(_T, _dataclass(cls, _mapping(raw, path), path))


def _blocks(preset: object, path: str) -> Mapping[str, Any]:
    names = preset_names()
    if preset not in names:
        raise _wrong(path, preset, f"one of {', '.join(names)}")
    return _read(preset)


@functools.cache
def _read(name: str) -> Mapping[str, Any]:
    return types.MappingProxyType(yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")))


def _overridden(preset: str | None, block: str, overrides: object, path: str) -> dict[str, Any]:
    base = {} if preset is None else _blocks(preset, f"{path}.preset")[block]
    return _merged(base, _mapping(overrides, path))


def _merged(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key, unless they are of different kinds; anything else is replaced."""
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _kind(value, _kind(old)) == _kind(old):
            value = _merged(old, value)
        merged[key] = value
    return merged


def _kind(policy: Mapping[str, Any], default: object = _DEFAULT_KIND) -> object:
    """As it says, or the only kind that has all of its keys where the default one has not."""
    if "kind" in policy:
        return policy["kind"]
    fields = {kind: {field.name for field in dataclasses.fields(cls)} for kind, cls in _POLICIES.items()}
    kinds = [kind for kind, names in fields.items() if set(policy) <= names]
    return kinds[0] if len(kinds) == 1 else default


def _value(hint: Any, raw: object, path: str) -> object:
    """`raw` as what the annotation says."""
    if isinstance(hint, types.UnionType):
        return _optional(hint, raw, path)
    if typing.get_origin(hint) is tuple:
        return _tuple(hint, raw, path)
    if hint is ThresholdPolicy:
        return _policy(raw, path)
    if dataclasses.is_dataclass(hint):
        return build(cast(type, hint), raw, path)
    if hint is float and _is_number(raw):
        return float(cast(float, raw))
    if type(raw) is hint and hint in _EXPECTED and hint is not float:
        return raw
    raise _wrong(path, raw, _described(hint))


def _optional(hint: Any, raw: object, path: str) -> object:
    if raw is None:
        return None
    (only,) = (each for each in typing.get_args(hint) if each is not types.NoneType)
    try:
        return _value(only, raw, path)
    except ConfigError as error:
        raise ConfigError(f"{error}, or null") from None


def _dataclass(cls: type, raw: Mapping[str, Any], path: str, beside: tuple[str, ...] = ()) -> object:
    """`beside` are keys that someone else has taken out of the mapping; errors name them as well."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in raw:
        if key not in names:
            raise ConfigError(f"{path}.{key}: unknown key; expected one of {', '.join([*names, *beside])}")
    values = {name: _value(hints[name], raw[name], f"{path}.{name}") for name in names if name in raw}
    try:
        return cls(**values)
    except ConfigError as error:  # It begins with the key.
        raise ConfigError(f"{path}.{error}") from None


def _policy(raw: object, path: str) -> object:
    mapping = _mapping(raw, path)
    kind = _kind(mapping)
    if not isinstance(kind, str) or kind not in _POLICIES:
        raise _wrong(f"{path}.kind", kind, f"one of {', '.join(_POLICIES)}")
    settings = {key: value for key, value in mapping.items() if key != "kind"}
    return _dataclass(_POLICIES[kind], settings, path, beside=("kind",))


def _tuple(hint: Any, raw: object, path: str) -> tuple[object, ...]:
    if not isinstance(raw, list | tuple):
        raise _wrong(path, raw, _described(hint))
    hints = typing.get_args(hint)
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(raw)
    elif len(hints) != len(raw):
        raise _wrong(path, raw, _described(hint))
    return tuple(_value(each, value, f"{path}[{i}]") for i, (each, value) in enumerate(zip(hints, raw, strict=True)))


def _mapping(raw: object, path: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise _wrong(path, raw, "a mapping of keys to values")
    return raw


def _is_number(raw: object) -> bool:
    """Neither a bool, which YAML makes of `yes`, nor infinite, nor none."""
    try:
        return type(raw) in (int, float) and math.isfinite(cast(float, raw))
    except OverflowError:
        return False


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is not tuple:
        return _EXPECTED[hint]
    first, *rest = typing.get_args(hint)
    if rest == [Ellipsis]:
        return f"a list, each of it {_described(first)}"
    return f"[{', '.join(_described(each) for each in (first, *rest))}]"


def _wrong(path: str, raw: object, expected: str) -> ConfigError:
    return ConfigError(f"{path}={raw!r}: expected {expected}")
