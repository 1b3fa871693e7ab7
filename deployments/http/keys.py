"""API keys in a YAML file: the keys themselves, a file, or an environment variable."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, SecretStr

from dspark_ray.config import ConfigError

_VALID_KEY = re.compile(r"[!-~]+")


class KeyFile(BaseModel):
    """A file with one key per line; empty lines and lines that begin with # are ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    file: str
    """Its path; a relative one starts at the `deployments` package."""


class KeyVariable(BaseModel):
    """An environment variable of the Ingress replicas, with keys separated by commas or white space."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    env: str
    """Its name."""


GivenKeys = SecretStr | list[SecretStr] | KeyFile | KeyVariable
KeySource = GivenKeys | None


def read_keys(name: str, source: KeySource, resolve: Callable[[str], Path]) -> list[str]:
    """The keys of the setting `name`; an empty list for None.

    Raises ConfigError for a source without a key, and for a key that is not printable ASCII without spaces.
    """
    if source is None:
        return []
    keys = _keys(name, source, resolve)
    if not keys:
        raise ConfigError(f"{name}: expected at least one key, found none")
    if not all(map(_VALID_KEY.fullmatch, keys)):
        raise ConfigError(f"{name}: expected keys of printable ASCII characters without spaces")
    return keys


def _keys(name: str, source: GivenKeys, resolve: Callable[[str], Path]) -> list[str]:
    if isinstance(source, SecretStr):
        return [source.get_secret_value()]
    if isinstance(source, list):
        return [key.get_secret_value() for key in source]
    if isinstance(source, KeyVariable):
        return re.findall(r"[^,\s]+", os.environ.get(source.env, ""))
    path = resolve(source.file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: {path}: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
