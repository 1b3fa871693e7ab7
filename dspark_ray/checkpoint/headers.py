"""Index and headers of safetensors files, checked before tensors are read.

A file is eight bytes with the length of its header, the header as JSON, and the tensors, without gaps:

    {"NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ..., "__metadata__": {...}}
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from dspark_ray.checkpoint.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"

_BYTES_PER_ELEMENT = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}
"""Dtypes whose sizes are checked here; the dtypes that a model may use are checked later."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file's header describes it."""

    stored_name: str
    file: Path
    dtype: str
    """As safetensors spells it: BF16, F8_E4M3, I8 and so on."""
    shape: tuple[int, ...]
    num_bytes: int


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Tensors of the files named by the index, or of all *.safetensors without one. Raises CheckpointError."""
    index = path / INDEX_FILE
    if index.is_file():
        yield from _by_index(index)
        return
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise CheckpointError(f"{path}: expected a folder with {INDEX_FILE} or *.safetensors, found neither")
    for file in files:
        yield from _header(file).values()


def _by_index(index: Path) -> Iterator[StoredTensor]:
    weight_map = _weight_map(index)
    headers = {file: _header(index.parent / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(f"{index}: {name}: expected in {file}, found no such tensor there")
        yield headers[file][name]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        raw = json.loads(index.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{index}: expected JSON with a weight_map, found {error}") from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map={_shown(weight_map)}: expected file names by the names of tensors")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: weight_map.{name}={_shown(file)}: expected the name of a file beside it")
    return weight_map


def _header(file: Path) -> dict[str, StoredTensor]:
    """All tensors of one file. Raises CheckpointError if file size and header disagree."""
    raw, header_bytes, file_bytes = _raw_header(file)
    raw.pop("__metadata__", None)
    tensors, ranges = {}, []
    for name, entry in raw.items():
        tensors[name], start = _described(name, file, entry)
        ranges.append((start, start + tensors[name].num_bytes, name))
    expected = header_bytes + _end_of(file, sorted(ranges))
    if file_bytes != expected:
        raise CheckpointError(f"{file}: expected {expected} bytes, found {file_bytes}: is the download complete?")
    return tensors


def _raw_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """(header, bytes up to its end, bytes of the file)"""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            found = os.fstat(stream.fileno()).st_size
            if length > found - 8:
                raise CheckpointError(f"{file}: expected a header of {length} bytes, found a file of {found}")
            raw = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: the checkpoint's index names this file, found no such file") from None
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a safetensors header, found {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file}: expected a safetensors header, found {_shown(raw)}")
    return raw, 8 + length, found


def _described(name: str, file: Path, entry: object) -> tuple[StoredTensor, int]:
    """(tensor, its start in bytes after the header)"""
    values = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = values.get("dtype"), values.get("shape"), values.get("data_offsets")
    if not isinstance(dtype, str):
        raise _wrong(file, name, "dtype", dtype, "a name such as BF16")
    if not _are_sizes(shape):
        raise _wrong(file, name, "shape", shape, "a list of whole numbers, 0 or more")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _wrong(file, name, "data_offsets", offsets, "[start, stop] in bytes")
    start, stop = offsets
    size = _BYTES_PER_ELEMENT.get(dtype)
    if size is not None and stop - start != math.prod(shape) * size:
        expected = f"{math.prod(shape) * size} bytes, which {dtype} of shape {shape} takes"
        raise _wrong(file, name, "data_offsets", offsets, expected)
    return StoredTensor(name, file, dtype, tuple(shape), stop - start), start


def _end_of(file: Path, ranges: list[tuple[int, int, str]]) -> int:
    """End of the last tensor; `ranges` are sorted (start, stop, name). Raises CheckpointError for gaps and overlaps."""
    end, before = 0, "the header"
    for start, stop, name in ranges:
        if start != end:
            problem = "overlaps with" if start < end else "leaves a gap behind"
            raise _wrong(file, name, "data_offsets", [start, stop], f"a start at {end}: it {problem} {before}")
        end, before = stop, name
    return end


def _are_sizes(raw: object) -> TypeGuard[list[int]]:
    return isinstance(raw, list) and all(type(size) is int and size >= 0 for size in raw)


def _wrong(file: Path, name: str, key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"{file}: {name}: {key}={_shown(value)}: expected {expected}")


def _shown(value: object) -> str:
    """As JSON, cut to 100 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 100 else f"{text[:100]}..."
