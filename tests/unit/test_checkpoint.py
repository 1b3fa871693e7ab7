"""Checkpoints written by this package and by transformers, read fully and in slices, valid and broken."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dspark_kernels.formats import (
    decode_scale,
    dequantise_fp4,
    dequantise_fp8,
    quantise_fp4,
    quantise_fp8,
)
from dspark_ray.checkpoint.inspect import describe
from dspark_ray.checkpoint.layout import FP8_WEIGHTS, local_name, official_name
from dspark_ray.checkpoint.reader import Checkpoint, CheckpointError, load_drafter, load_projector, load_target
from dspark_ray.checkpoint.writer import save_checkpoint
from dspark_ray.config import ModelConfig
from dspark_ray.drafters.dspark import DSparkModule, FeatureProjector
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.training.initial import initialise

# Two ranks cut wq_b at row 96 and the shared expert at column 96: inside blocks of 128, and not of 32 for wo_b.
RAW: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 61,
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 48,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 144,
    "o_groups": 2,
    "o_lora_rank": 72,
    "sliding_window": 8,
    "compress_ratios": [0, 4, 128, 4, 0, 0],
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 4,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "dspark_block_size": 3,
    "dspark_noise_token_id": 60,
    "dspark_target_layer_ids": [1, 3],
    "dspark_markov_rank": 8,
}
CONFIG = ModelConfig.from_dict(RAW)


@torch.no_grad()
def scramble(module: nn.Module, seed: int) -> None:
    """Values whose loss, misplacement or second rounding changes results; all fit into bfloat16."""
    initialise(module, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        parameter.copy_(parameter.to(torch.bfloat16))


def build(group: ParallelGroup | None = None) -> DeepSeekV4:
    return DeepSeekV4(CONFIG, group)


@pytest.fixture(scope="module")
def target() -> DeepSeekV4:
    model = build()
    scramble(model, seed=1)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def drafter() -> DSparkModule:
    module = DSparkModule(CONFIG)
    scramble(module, seed=2)
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, target: DeepSeekV4, drafter: DSparkModule) -> Path:
    path = tmp_path_factory.mktemp("plain")
    save_checkpoint(path, target, drafter, RAW, max_shard_bytes=500_000)
    return path


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, target: DeepSeekV4, drafter: DSparkModule) -> Path:
    path = tmp_path_factory.mktemp("quantised")
    save_checkpoint(path, target, drafter, RAW, quantise=True)
    return path


def loaded_target(path: Path, group: ParallelGroup | None = None) -> DeepSeekV4:
    with torch.device("meta"):
        model = build(group)
    load_target(model, Checkpoint.open(path))
    return model


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by the name in its file."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(source: Path, directory: Path, change: Any) -> Path:
    """A checkpoint in one file without an index, its tensors passed through `change`."""
    tensors = stored_tensors(source)
    changed = change(tensors) or tensors
    save_file(changed, directory / "model.safetensors")
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    wanted = expected.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name


def joined(name: str, parts: list[Tensor]) -> Tensor:
    """The whole of what ranks hold: by the layout's sharded dimension, or the first where all are the same."""
    local = local_name(name)
    if local in ("attn.wo_b.weight", "ffn.shared_experts.w2.weight"):
        return torch.cat(parts, dim=1)
    sharded = ("embed.", "head.", "attn.attn_sink", "attn.wq_b.", "attn.wo_a.", "ffn.experts.", "ffn.shared_experts.")
    if local.startswith(sharded):
        return torch.cat(parts)
    assert all(torch.equal(part, parts[0]) for part in parts), name
    return parts[0]


# --- what we write, we read ---------------------------------------------------------------------------------------


def test_a_written_target_is_read_back_unchanged(plain: Path, target: DeepSeekV4) -> None:
    assert_same_state(loaded_target(plain), target)


def test_a_written_drafter_is_read_back_unchanged(plain: Path, drafter: DSparkModule) -> None:
    with torch.device("meta"):
        module = DSparkModule(CONFIG)
    load_drafter(module, Checkpoint.open(plain))
    assert_same_state(module, drafter)


def test_the_drafter_gets_the_targets_whole_embedding_and_head(plain: Path, target: DeepSeekV4) -> None:
    module = DSparkModule(CONFIG)
    load_drafter(module, Checkpoint.open(plain))
    assert module._shared is not None
    assert torch.equal(module._shared[0], target.embed.weight)
    assert torch.equal(module._shared[1], target.head.weight)


def test_the_drafter_takes_tables_that_the_process_already_holds(plain: Path, target: DeepSeekV4) -> None:
    module = DSparkModule(CONFIG)
    load_drafter(module, Checkpoint.open(plain), shared=(target.embed.weight, target.head.weight))
    assert module._shared is not None
    assert module._shared[0] is target.embed.weight


def test_the_projector_reads_its_two_tensors(plain: Path, drafter: DSparkModule) -> None:
    with torch.device("meta"):
        projector = FeatureProjector(CONFIG)
    load_projector(projector, Checkpoint.open(plain))
    assert torch.equal(projector.mtp[0].main_proj.weight, drafter.stages[0].main_proj.weight)


def test_loading_casts_to_the_models_dtype_but_keeps_float32_parameters(plain: Path) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build()
    finally:
        torch.set_default_dtype(before)
    load_target(model, Checkpoint.open(plain))
    assert model.layers[0].attn.wq_a.weight.dtype == torch.bfloat16
    assert model.layers[0].attn.attn_sink.dtype == torch.float32


@pytest.mark.parametrize("fixture", ["plain", "quantised"])
def test_slices_of_two_ranks_make_the_whole(fixture: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    whole = loaded_target(path).state_dict()
    ranks = [loaded_target(path, ParallelGroup(rank, 2, None)).state_dict() for rank in range(2)]
    for name, expected in whole.items():
        assert torch.equal(joined(name, [rank[name] for rank in ranks]), expected), name


def test_only_a_whole_target_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank 1 of 2"):
        save_checkpoint(tmp_path, build(ParallelGroup(1, 2, None)), None, RAW)


# --- the files ----------------------------------------------------------------------------------------------------


def test_the_index_names_the_file_of_every_tensor(plain: Path) -> None:
    index = json.loads((plain / "model.safetensors.index.json").read_text())
    files = sorted(plain.glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored_tensors(plain).values())


def test_a_weight_and_its_scale_are_in_the_same_shard(
    tmp_path: Path, target: DeepSeekV4, drafter: DSparkModule
) -> None:
    save_checkpoint(tmp_path, target, drafter, RAW, max_shard_bytes=50_000, quantise=True)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    scales = [name for name in weight_map if name.endswith(".scale") and "hc_" not in name]
    assert scales
    assert all(weight_map[name] == weight_map[name.replace(".scale", ".weight")] for name in scales)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("embed.weight", torch.bfloat16),
        ("layers.1.attn.wq_a.weight", torch.bfloat16),
        ("layers.1.attn.attn_sink", torch.float32),
        ("layers.1.attn.compressor.ape", torch.float32),
        ("layers.1.hc_attn_fn", torch.float32),
        ("layers.1.ffn.gate.bias", torch.float32),
        ("layers.0.ffn.gate.tid2eid", torch.int64),
        ("layers.3.ffn.experts.2.w3.weight", torch.bfloat16),
        ("mtp.1.hc_head_fn", torch.float32),
    ],
)
def test_plain_tensors_have_the_dtypes_of_a_release(plain: Path, name: str, dtype: torch.dtype) -> None:
    assert stored_tensors(plain)[name].dtype == dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("layers.1.attn.wo_a.weight", torch.float8_e4m3fn),
        ("layers.1.attn.wo_a.scale", torch.float8_e8m0fnu),
        ("layers.1.attn.indexer.wq_b.weight", torch.float8_e4m3fn),
        ("layers.1.attn.compressor.wkv.weight", torch.bfloat16),
        ("layers.1.ffn.experts.0.w1.weight", torch.int8),
        ("layers.1.ffn.experts.0.w1.scale", torch.float8_e8m0fnu),
        ("mtp.0.main_proj.weight", torch.float8_e4m3fn),
    ],
)
def test_quantised_tensors_have_the_dtypes_of_a_release(quantised: Path, name: str, dtype: torch.dtype) -> None:
    assert stored_tensors(quantised)[name].dtype == dtype


def test_the_configuration_has_the_quantisation(plain: Path, quantised: Path) -> None:
    assert json.loads((plain / "config.json").read_text()) == RAW
    assert json.loads((quantised / "config.json").read_text())["expert_dtype"] == "fp4"


def test_a_plain_copy_of_a_quantised_release_has_no_quantisation_config(tmp_path: Path, target: DeepSeekV4) -> None:
    save_checkpoint(tmp_path, target, None, RAW | {"quantization_config": {}, "expert_dtype": "fp4"})
    assert json.loads((tmp_path / "config.json").read_text()) == RAW


# --- quantisation -------------------------------------------------------------------------------------------------


def test_a_quantised_checkpoint_loads_to_the_dequantised_values(quantised: Path, target: DeepSeekV4) -> None:
    found = loaded_target(quantised)
    assert torch.equal(
        found.layers[1].attn.wq_b.weight, dequantise_fp8(*quantise_fp8(target.layers[1].attn.wq_b.weight))
    )
    expected = dequantise_fp4(*quantise_fp4(target.layers[1].ffn.experts.w2[2]))
    assert torch.equal(found.layers[1].ffn.experts.w2[2], expected)


def test_float32_scales_and_fp8_experts_of_base_checkpoints_load(quantised: Path, tmp_path: Path) -> None:
    name, expected = "layers.1.ffn.experts.0.w2", torch.linspace(-3, 3, 160 * 192).view(160, 192)

    def change(tensors: dict[str, Tensor]) -> None:
        values, scale = quantise_fp8(expected)
        tensors[f"{name}.weight"], tensors[f"{name}.scale"] = values, decode_scale(scale)

    found = loaded_target(rewrite(quantised, tmp_path, change)).layers[1].ffn.experts.w2[0]
    assert torch.equal(found, dequantise_fp8(*quantise_fp8(expected)))


def test_fp8_keeps_values_it_can_represent() -> None:
    weight = torch.randint(-15, 16, (200, 130), generator=torch.Generator().manual_seed(0)) * 0.25
    assert torch.equal(dequantise_fp8(*quantise_fp8(weight)), weight)


def test_fp4_keeps_values_it_can_represent() -> None:
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 0.0])
    weight = torch.stack((steps, steps.flip(0))).repeat(1, 4) * torch.tensor([[0.25], [8.0]])
    assert torch.equal(dequantise_fp4(*quantise_fp4(weight)), weight)


def test_the_first_element_is_in_the_low_nibble() -> None:
    packed, scale = torch.tensor([[0x51, *[0] * 15]], dtype=torch.int8), torch.ones(1, 1)
    assert dequantise_fp4(packed, scale)[0, :2].tolist() == [0.5, 3.0]


def test_scale_bytes_are_powers_of_two_and_255_is_not_a_number() -> None:
    scale = decode_scale(torch.tensor([0, 127, 130, 255], dtype=torch.uint8).view(torch.float8_e8m0fnu))
    assert scale[:3].tolist() == [2.0**-127, 1.0, 8.0]
    assert scale[3].isnan()


def test_quantising_zeros_gives_zeros() -> None:
    assert not dequantise_fp8(*quantise_fp8(torch.zeros(3, 5))).any()
    assert not dequantise_fp4(*quantise_fp4(torch.zeros(3, 32))).any()


def test_scales_never_clip_the_largest_value() -> None:
    for largest in (448.0, 449.0, 447.0, 6.0, 6.1):
        weight = torch.full((1, 32), largest)
        assert (dequantise_fp8(*quantise_fp8(weight)) - weight).abs().max() <= largest / 16
        assert (dequantise_fp4(*quantise_fp4(weight)) - weight).abs().max() <= largest / 4


# --- other programs' checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs() -> DeepseekV4ForCausalLM:
    config = DeepseekV4Config(
        **{key: RAW[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "q_lora_rank")},
        **{key: RAW[key] for key in ("o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_topk")},
        **{key: RAW[key] for key in ("index_head_dim", "n_routed_experts", "num_experts_per_tok")},
        moe_intermediate_size=RAW["moe_intermediate_size"],
        num_hidden_layers=4,
        qk_rope_head_dim=16,
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
    )
    model = DeepseekV4ForCausalLM(config).float()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                tensor.copy_(torch.randint(0, 3, tensor.shape, generator=generator))
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def their_checkpoint(tmp_path_factory: pytest.TempPathFactory, theirs: DeepseekV4ForCausalLM) -> Path:
    path = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        ("embed.weight", "model.embed_tokens.weight"),
        ("head.weight", "lm_head.weight"),
        ("norm.weight", "model.norm.weight"),
        ("hc_head_scale", "model.hc_head.hc_scale"),
        ("layers.1.attn.kv_norm.weight", "model.layers.1.self_attn.kv_norm.weight"),
        ("layers.1.attn.compressor.norm.weight", "model.layers.1.self_attn.compressor.kv_norm.weight"),
        ("layers.1.attn.compressor.ape", "model.layers.1.self_attn.compressor.position_bias"),
        ("layers.1.attn.indexer.wq_b.weight", "model.layers.1.self_attn.compressor.indexer.q_b_proj.weight"),
        ("layers.2.attn.attn_sink", "model.layers.2.self_attn.sinks"),
        ("layers.0.ffn.gate.tid2eid", "model.layers.0.mlp.gate.tid2eid"),
        ("layers.1.ffn.gate.bias", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("layers.3.ffn.experts.w13", "model.layers.3.mlp.experts.gate_up_proj"),
        ("layers.3.ffn.experts.w2", "model.layers.3.mlp.experts.down_proj"),
        ("layers.3.hc_ffn_base", "model.layers.3.ffn_hc.base"),
    ],
)
def test_what_transformers_saves_is_read(
    theirs: DeepseekV4ForCausalLM, their_checkpoint: Path, ours: str, name: str
) -> None:
    checkpoint = Checkpoint.open(their_checkpoint)
    model = DeepSeekV4(checkpoint.config)
    load_target(model, checkpoint)
    assert torch.equal(model.state_dict()[ours], theirs.state_dict()[name])


def test_transformers_reads_what_we_write(plain: Path, target: DeepSeekV4) -> None:
    model, info = DeepseekV4ForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not info["missing_keys"]
    found = model.state_dict()["model.layers.3.mlp.experts.gate_up_proj"]
    assert torch.equal(found.float(), target.layers[3].ffn.experts.w13)


def test_official_names_stay_as_they_are(quantised: Path) -> None:
    names = list(stored_tensors(quantised))
    assert [official_name(name) for name in names] == names


def test_aliases_of_official_names_are_read(quantised: Path, tmp_path: Path, target: DeepSeekV4) -> None:
    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {}
        for name, tensor in tensors.items():
            name = name.replace("embed.", "embed_tokens.").replace("hc_head_", "hc_head.hc_")
            name = name.replace(".attn.kv_norm.", ".attn.norm.").replace(".scale", ".weight_scale_inv")
            renamed["lm_head.weight" if name == "head.weight" else f"model.{name}"] = tensor
        return renamed

    found = loaded_target(rewrite(quantised, tmp_path, rename))
    assert_same_state(found, loaded_target(quantised))


def test_fused_experts_are_read_in_slices(plain: Path, tmp_path: Path, target: DeepSeekV4) -> None:
    def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in tensors.items() if ".ffn.experts." not in name}
        for number, layer in enumerate(target.layers):
            kept[f"layers.{number}.ffn.experts.gate_up_proj"] = layer.ffn.experts.w13
            kept[f"layers.{number}.ffn.experts.down_proj"] = layer.ffn.experts.w2
        return kept

    rank = loaded_target(rewrite(plain, tmp_path, fuse), ParallelGroup(1, 2, None))
    assert torch.equal(rank.layers[2].ffn.experts.w13, target.layers[2].ffn.experts.w13[2:])


def test_modules_of_other_drafting_methods_are_ignored(plain: Path, tmp_path: Path, target: DeepSeekV4) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["mtp.0.e_proj.weight"] = torch.ones(2, 2)

    path = rewrite(plain, tmp_path, add)
    assert_same_state(loaded_target(path), target)
    assert describe(path).unused_tensors == 1


# --- broken checkpoints -------------------------------------------------------------------------------------------


def broken(plain: Path, directory: Path, name: str, value: Tensor | None) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name)
        if value is not None:
            tensors[name] = value

    return rewrite(plain, directory, change)


def test_a_missing_tensor_is_named_with_its_shape(plain: Path, tmp_path: Path) -> None:
    path = broken(plain, tmp_path, "layers.2.attn.wkv.weight", None)
    with pytest.raises(CheckpointError, match=r"layers\.2\.attn\.wkv\.weight: expected shape \[48, 160\], found no"):
        loaded_target(path)


def test_a_misshapen_tensor_is_named_with_file_and_both_shapes(plain: Path, tmp_path: Path) -> None:
    path = broken(plain, tmp_path, "norm.weight", torch.ones(3))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: norm\.weight: expected shape \[160\], found \[3\]"):
        loaded_target(path)


def test_a_tensor_of_a_foreign_dtype_is_refused(plain: Path, tmp_path: Path) -> None:
    path = broken(plain, tmp_path, "norm.weight", torch.ones(160, dtype=torch.int64))
    with pytest.raises(CheckpointError, match=r"norm\.weight: expected dtype F32 or BF16 or F16, found I64"):
        loaded_target(path)


def test_a_quantised_weight_without_scales_is_refused(quantised: Path, tmp_path: Path) -> None:
    path = broken(quantised, tmp_path, "layers.0.attn.wq_a.scale", None)
    with pytest.raises(CheckpointError, match=r"layers\.0\.attn\.wq_a\.scale: expected scales of shape \[2, 2\]"):
        loaded_target(path)


def test_misshapen_scales_are_refused(quantised: Path, tmp_path: Path) -> None:
    path = broken(quantised, tmp_path, "layers.0.attn.wq_a.scale", torch.ones(1, 1))
    with pytest.raises(CheckpointError, match=r"wq_a\.scale: expected shape \[2, 2\], found \[1, 1\]"):
        loaded_target(path)


def test_a_routing_table_that_names_no_expert_is_refused(plain: Path, tmp_path: Path) -> None:
    path = broken(plain, tmp_path, "layers.0.ffn.gate.tid2eid", torch.full((61, 2), 3))
    with pytest.raises(CheckpointError, match=r"tid2eid: expected experts 0\.\.2, found 3\.\.3"):
        loaded_target(path)


def test_at_most_ten_problems_are_listed(plain: Path, tmp_path: Path) -> None:
    path = rewrite(plain, tmp_path, lambda tensors: {"norm.weight": tensors["norm.weight"]})
    with pytest.raises(CheckpointError) as caught:
        loaded_target(path)
    assert str(caught.value).count("found no such tensor") == 10
    assert "more" in str(caught.value).splitlines()[-1]


def test_a_bad_checkpoint_leaves_the_model_unallocated(plain: Path, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build()
    with pytest.raises(CheckpointError):
        load_target(model, Checkpoint.open(broken(plain, tmp_path, "norm.weight", None)))
    assert model.norm.weight.is_meta


def test_a_drafter_of_a_checkpoint_without_one_is_refused(tmp_path: Path, target: DeepSeekV4) -> None:
    save_checkpoint(tmp_path, target, None, RAW)
    with pytest.raises(CheckpointError, match=r"mtp\.0\.attn"):
        load_drafter(DSparkModule(CONFIG), Checkpoint.open(tmp_path))


def test_a_file_cut_short_is_named(plain: Path, tmp_path: Path) -> None:
    path = rewrite(plain, tmp_path, lambda tensors: None)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected \d+ bytes, found \d+"):
        Checkpoint.open(path)


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 10**15), struct.pack("<Q", 4) + b"nope"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {"norm.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors.*no such file"):
        Checkpoint.open(tmp_path)


def test_an_index_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    save_file({"norm.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    index = {"weight_map": {"head.weight": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"head\.weight: expected in a\.safetensors"):
        Checkpoint.open(tmp_path)


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"norm.weight": torch.ones(2), "model.norm.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"expected one tensor for 'norm\.weight'"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found neither"):
        Checkpoint.open(tmp_path)


# --- description --------------------------------------------------------------------------------------------------


def test_a_description_counts_the_models_parameters(plain: Path, target: DeepSeekV4) -> None:
    assert describe(plain).parameters == sum(parameter.numel() for parameter in target.parameters())


def test_quantised_weights_count_as_many_parameters_as_plain_ones(plain: Path, quantised: Path) -> None:
    assert describe(quantised).parameters == describe(plain).parameters
    assert describe(quantised).drafter == describe(plain).drafter


def test_active_parameters_leave_out_unchosen_experts_and_the_embedding(plain: Path, target: DeepSeekV4) -> None:
    description = describe(plain)
    unchosen = sum(layer.ffn.experts.w13[0].numel() + layer.ffn.experts.w2[0].numel() for layer in target.layers)
    assert description.active_parameters == description.parameters - unchosen - target.embed.weight.numel()


def test_a_description_counts_layers_by_kind(plain: Path) -> None:
    kinds = {"sliding": 1, "CSA": 2, "HCA": 1, "hash MoE": 1, "learned MoE": 3}
    assert describe(plain).layers == kinds


def test_bytes_by_part_and_by_dtype_add_up_to_the_files_tensors(quantised: Path) -> None:
    description = describe(quantised)
    assert sum(description.bytes_by_part.values()) == description.num_bytes
    assert sum(description.bytes_by_dtype.values()) == description.num_bytes


def test_a_good_checkpoint_has_no_problems(quantised: Path) -> None:
    assert describe(quantised).problems == ()


def test_a_description_lists_the_problems_of_loading(plain: Path, tmp_path: Path) -> None:
    path = broken(plain, tmp_path, "mtp.1.norm.weight", None)
    assert describe(path).problems == ("mtp.1.norm.weight: expected shape [160], found no such tensor",)


def test_a_description_is_json_and_aligned_text(plain: Path) -> None:
    description = describe(plain)
    assert json.loads(json.dumps(description.to_dict()))["drafter"]["gamma"] == 3
    lines = description.format().splitlines()
    column = lines[0].index(str(plain))
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)


def shapes_of_the_flash_release() -> Iterator[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        config = ModelConfig.from_dict(FLASH)
        for module in (DeepSeekV4(config), DSparkModule(config)):
            yield from ((name, tuple(tensor.shape)) for name, tensor in module.state_dict().items())


FLASH = RAW | {
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "num_hash_layers": 3,
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}


def test_the_layout_gives_the_published_tensor_count_and_bytes_of_flash() -> None:
    count = size = 0
    for name, shape in shapes_of_the_flash_release():
        local, elements = local_name(name), math.prod(shape)
        if local.startswith("ffn.experts."):
            matrices = shape[0] * (2 if local.endswith("w13") else 1)
            count, size = count + 2 * matrices, size + elements // 2 + elements // 32
        elif local in FP8_WEIGHTS:
            count, size = count + 2, size + elements + elements // 128**2
        elif local.endswith("tid2eid"):
            count, size = count + 1, size + elements * 8
        else:
            is_float32 = local.startswith("hc_") or local.endswith(("attn_sink", "ape", "gate.bias"))
            count, size = count + 1, size + elements * (4 if is_float32 else 2)
    assert (count, size) == (72_317, 166_878_536_440)
