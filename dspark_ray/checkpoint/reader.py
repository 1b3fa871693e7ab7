"""Reads checkpoints: headers first, then only the slices that one rank needs.

Errors in files, names, shapes and dtypes are found in the headers, before any weight is read; NaN and infinity are
found when a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dspark_kernels.formats import dequantise_fp4, dequantise_fp8
from dspark_ray.checkpoint.errors import CheckpointError
from dspark_ray.checkpoint.headers import StoredTensor, stored_tensors
from dspark_ray.checkpoint.layout import Range, TensorPart, full_region, official_name, parts_of, scale_name
from dspark_ray.checkpoint.stored import SCALE_TILES, is_quantised, keep_stored, scale_attribute, scale_target
from dspark_ray.checkpoint.values import first_bad_value
from dspark_ray.config import ModelConfig
from dspark_ray.drafters.dspark import DSparkModule, FeatureProjector
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.parallel import ParallelGroup

MAX_PROBLEMS = 10

_PLAIN_DTYPES = ("F32", "BF16", "F16")
_TABLE_DTYPES = ("I64", "I32")
_SCALE_DTYPES = ("F8_E8M0", "F32")
_BYTES_AT_ONCE = 64 << 20


class Checkpoint:
    """The tensors of a checkpoint folder under their official names."""

    def __init__(self, path: Path, tensors: dict[str, StoredTensor]) -> None:
        self.path, self.tensors = path, tensors
        self._files: dict[Path, Any] = {}

    @staticmethod
    def open(path: Path | str) -> Checkpoint:
        """Read the headers of the files named by the index, or of all *.safetensors without one.

        Raises CheckpointError for files that are missing, truncated or no safetensors.
        """
        path = Path(path)
        tensors: dict[str, StoredTensor] = {}
        for tensor in stored_tensors(path):
            name = official_name(tensor.stored_name)
            if name in tensors:
                both = f"{tensors[name].stored_name!r} and {tensor.stored_name!r}"
                raise CheckpointError(f"{tensor.file}: {both}: expected one tensor for {name!r}")
            tensors[name] = tensor
        return Checkpoint(path, tensors)

    @cached_property
    def config(self) -> ModelConfig:
        """The folder's `config.json`."""
        return ModelConfig.from_file(self.path)

    def validate(self, parts: Iterable[TensorPart]) -> list[str]:
        """Problems of the parts' tensors found in headers, one sentence per tensor."""
        wanted = {part.name: part for part in parts}
        return [problem for part in wanted.values() if (problem := self._problem(part))]

    def require(self, parts: Iterable[TensorPart]) -> None:
        """Raise CheckpointError with the first problems found by `validate`."""
        problems = self.validate(parts)
        if not problems:
            return
        shown = "\n  ".join(problems[:MAX_PROBLEMS])
        rest = len(problems) - MAX_PROBLEMS
        more = f"\n  and {rest} more" if rest > 0 else ""
        raise CheckpointError(f"{self.path}: this checkpoint does not fit its configuration:\n  {shown}{more}")

    def read(self, part: TensorPart) -> Tensor:
        """The part's region: dequantised to float32 if it is stored quantised, else in the stored dtype.

        Raises CheckpointError for NaN and infinity.
        """
        tensor = self.tensors[part.name]
        if tensor.dtype not in SCALE_TILES:
            return self._finite(tensor, part.region)
        return self._read_quantised(tensor, self.tensors[scale_name(part.name)], part.region)

    def read_stored(self, part: TensorPart) -> tuple[Tensor, Tensor]:
        """(weights, scales) of a quantised part as stored; its region consists of complete scale tiles.

        Raises CheckpointError for NaN and infinity.
        """
        tensor, scale = self.tensors[part.name], self.tensors[scale_name(part.name)]
        rows, (first, stop) = part.region
        tile_rows, tile_columns = SCALE_TILES[tensor.dtype]
        packed = 2 if tensor.dtype == "I8" else 1
        scale_region = (
            (rows[0] // tile_rows, -(-rows[1] // tile_rows)),
            (first // tile_columns, -(-stop // tile_columns)),
        )
        return self._finite(tensor, (rows, (first // packed, stop // packed))), self._finite(scale, scale_region)

    def dtype_of(self, name: str) -> str | None:
        """Stored dtype of a tensor in safetensors' spelling; None if it is missing or its scales are not E8M0."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.dtype not in SCALE_TILES:
            return None if tensor is None else tensor.dtype
        scale = self.tensors.get(scale_name(name))
        return tensor.dtype if scale is not None and scale.dtype == "F8_E8M0" else None

    def _problem(self, part: TensorPart) -> str | None:
        tensor = self.tensors.get(part.name)
        if tensor is None:
            return f"{part.name}: expected shape {list(part.shape)}, found no such tensor"
        expected_dtypes = _allowed_dtypes(part)
        if tensor.dtype not in expected_dtypes:
            return _mismatch(tensor, part.name, f"dtype {' or '.join(expected_dtypes)}", tensor.dtype)
        shape = _stored_shape(part.shape, tensor.dtype)
        if tensor.shape != shape:
            return _mismatch(tensor, part.name, f"shape {list(shape)}", list(tensor.shape))
        return self._scale_problem(part) if tensor.dtype in SCALE_TILES else None

    def _scale_problem(self, part: TensorPart) -> str | None:
        weight, name = self.tensors[part.name], scale_name(part.name)
        shape = tuple(-(-size // tile) for size, tile in zip(part.shape, SCALE_TILES[weight.dtype], strict=True))
        scale = self.tensors.get(name)
        if scale is None:
            return _mismatch(weight, name, f"scales of shape {list(shape)} for {weight.dtype}", "no such tensor")
        if scale.dtype not in _SCALE_DTYPES:
            return _mismatch(scale, name, f"dtype {' or '.join(_SCALE_DTYPES)}", scale.dtype)
        if scale.shape != shape:
            return _mismatch(scale, name, f"shape {list(shape)}", list(scale.shape))
        return None

    def _read_quantised(self, weight: StoredTensor, scale: StoredTensor, region: tuple[Range, ...]) -> Tensor:
        """Read complete scale tiles around the region, dequantise, cut."""
        tile = SCALE_TILES[weight.dtype]
        tiles = tuple((start // size, -(-stop // size)) for (start, stop), size in zip(region, tile, strict=True))
        rows, columns = (
            (first * size, min(stop * size, total))
            for (first, stop), size, total in zip(tiles, tile, _dense_shape(weight), strict=True)
        )
        scales = self._finite(scale, tiles)
        if weight.dtype == "F8_E4M3":
            values = dequantise_fp8(self._finite(weight, (rows, columns)), scales)
        else:
            values = dequantise_fp4(self._finite(weight, (rows, (columns[0] // 2, columns[1] // 2))), scales)
        (first_row, last_row), (first_column, last_column) = region
        return values[first_row - rows[0] : last_row - rows[0], first_column - columns[0] : last_column - columns[0]]

    def value_problem(self, name: str) -> str | None:
        """Read a tensor chunk by chunk; a sentence about its first NaN or infinity, None if there is none."""
        tensor = self.tensors[name]
        per_row = max(1, tensor.num_bytes // max(1, tensor.shape[0])) if tensor.shape else 1
        rows_at_once = max(1, _BYTES_AT_ONCE // per_row)
        try:
            for start in range(0, tensor.shape[0] if tensor.shape else 0, rows_at_once):
                stop = min(start + rows_at_once, tensor.shape[0])
                self._finite(tensor, ((start, stop), *full_region(tensor.shape[1:])))
        except CheckpointError as error:
            return str(error)
        return None

    def _finite(self, tensor: StoredTensor, region: tuple[Range, ...]) -> Tensor:
        """Values of the region. Raises CheckpointError for NaN and infinity."""
        values = self._slice(tensor, region)
        bad = first_bad_value(values)
        if bad is not None:
            place = [start + index for (start, _), index in zip(region, bad, strict=True)]
            found = f"{float(values[bad].float())} at {place}"
            raise CheckpointError(_mismatch(tensor, official_name(tensor.stored_name), "finite numbers", found))
        return values

    def _slice(self, tensor: StoredTensor, region: tuple[Range, ...]) -> Tensor:
        if tensor.file not in self._files:
            self._files[tensor.file] = safe_open(tensor.file, framework="pt")
        stored = self._files[tensor.file].get_slice(tensor.stored_name)
        return stored[tuple(slice(*bounds) for bounds in region)]


def load_target(
    model: DeepSeekV4, checkpoint: Checkpoint, device: torch.device | str = "cpu", keep_quantised: bool = False
) -> None:
    """Fill this rank's parameters; those on the meta device are first allocated on `device`.

    With `keep_quantised`, weights stay quantised if there is an operation for their stored form. Raises CheckpointError
    before anything is allocated.
    """
    _fill(model, model.config, model.group, checkpoint, device, keep_quantised)


def load_drafter(
    module: DSparkModule,
    checkpoint: Checkpoint,
    device: torch.device | str = "cpu",
    shared: tuple[Tensor, Tensor] | None = None,
    keep_quantised: bool = False,
) -> None:
    """Fill the draft stages and share the target's embedding and head.

    `shared` is (embedding, head), [V, d] each, if the process has them already; otherwise they are read.
    """
    embed, head = (_table(name, module.config) for name in ("embed.weight", "head.weight"))
    extra = () if shared else (embed, head)
    _fill(module, module.config, ParallelGroup(), checkpoint, device, keep_quantised, extra)
    if shared is None:
        like = module.stages[0].main_norm.weight
        shared = (checkpoint.read(embed).to(like), checkpoint.read(head).to(like))
    module.share(*shared)


def load_projector(
    module: FeatureProjector, checkpoint: Checkpoint, device: torch.device | str = "cpu", keep_quantised: bool = False
) -> None:
    """Fill the part of the drafter that runs on the verifier."""
    _fill(module, module.config, ParallelGroup(), checkpoint, device, keep_quantised)


def _table(name: str, config: ModelConfig) -> TensorPart:
    shape = (config.vocab_size, config.hidden_size)
    return TensorPart(name, shape, full_region(shape))


def _fill(
    module: nn.Module,
    config: ModelConfig,
    group: ParallelGroup,
    checkpoint: Checkpoint,
    device: torch.device | str,
    keep_quantised: bool,
    extra: tuple[TensorPart, ...] = (),
) -> None:
    plan = list(parts_of(module, config, group, checkpoint.tensors))
    checkpoint.require([*(part for _, part in plan), *extra])
    if any(tensor.is_meta for tensor in module.state_dict().values()):
        if keep_quantised:
            keep_stored(module, config, group, checkpoint.dtype_of)
        module.to_empty(device=device)
    parameters = module.state_dict()
    for name, part in plan:
        if is_quantised(parameters[name]):
            _copy_stored(parameters, name, part, checkpoint)
            continue
        values = checkpoint.read(part)
        _check_values(values, part, checkpoint, config)
        parameters[name][part.target].copy_(values)


def _copy_stored(parameters: dict[str, Tensor], name: str, part: TensorPart, checkpoint: Checkpoint) -> None:
    """Copy weights and scales as bytes, because copies between some of these dtypes convert."""
    owner, _, attribute = name.rpartition(".")
    weights, scales = checkpoint.read_stored(part)
    targets = part.target, scale_target(part, checkpoint.tensors[part.name].dtype)
    for parameter, values, target in zip((name, f"{owner}.{scale_attribute(attribute)}"), (weights, scales), targets):
        parameters[parameter].view(torch.uint8)[target].copy_(values.view(torch.uint8))


def _check_values(values: Tensor, part: TensorPart, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise CheckpointError for a routing table with invalid experts, which would be used as indices later."""
    if not _is_table(part):
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= config.n_routed_experts:
        tensor, expected = checkpoint.tensors[part.name], f"experts 0..{config.n_routed_experts - 1}"
        raise CheckpointError(_mismatch(tensor, part.name, expected, f"{low}..{high}"))


def _is_table(part: TensorPart) -> bool:
    return part.name.endswith(".tid2eid")


def _allowed_dtypes(part: TensorPart) -> tuple[str, ...]:
    if _is_table(part):
        return _TABLE_DTYPES
    quantised = tuple(SCALE_TILES) if part.name.endswith(".weight") and len(part.shape) == 2 else ()
    return _PLAIN_DTYPES + quantised


def _stored_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 2) if dtype == "I8" else shape


def _dense_shape(tensor: StoredTensor) -> tuple[int, ...]:
    return (*tensor.shape[:-1], tensor.shape[-1] * 2) if tensor.dtype == "I8" else tensor.shape


def _mismatch(tensor: StoredTensor, name: str, expected: str, found: object) -> str:
    stored = (
        ""
        if tensor.stored_name == name or official_name(tensor.stored_name) != name
        else (f" (stored as {tensor.stored_name})")
    )
    return f"{tensor.file.name}: {name}{stored}: expected {expected}, found {found}"
