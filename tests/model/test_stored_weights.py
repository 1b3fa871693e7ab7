"""Weights kept quantised: their bytes, their dequantised values, and results computed with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import Serving, random_tokens
from torch import Tensor, nn
from torch.nn import functional as F

from dspark_kernels.formats import decode_scale, dequantise_fp4, dequantise_fp8, quantise_fp8, round_fp8
from dspark_ray.checkpoint.reader import Checkpoint, load_drafter, load_projector, load_target
from dspark_ray.checkpoint.writer import save_checkpoint
from dspark_ray.config import EngineConfig, ModelConfig
from dspark_ray.drafters.dspark import DSparkModule, FeatureProjector
from dspark_ray.drafters.pools import DraftPools
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.layers import Weight
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.ranks.gang import build_engine
from dspark_ray.training.initial import initialise
from dspark_ray.types import Request, SamplingParams, VerificationLimits

# Inputs of all quantised products are multiples of 128. Two ranks cut wq_b at row 192, inside a block of scales, and
# everything else between blocks; one of them holds three experts and the other two.
RAW: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "vocab_size": 61,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 96,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 128,
    "o_groups": 4,
    "o_lora_rank": 64,
    "sliding_window": 8,
    "compress_ratios": [0, 4, 16, 4, 0, 0],
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 4,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "rope_scaling": {"factor": 16, "original_max_position_embeddings": 64},
    "dspark_block_size": 5,
    "dspark_noise_token_id": 60,
    "dspark_target_layer_ids": [2, 3],
    "dspark_markov_rank": 8,
}
CSA_LAYERS = (1, 3)
LINEARS = (
    "attn.wq_a.weight",
    "attn.wq_b.weight",
    "attn.wkv.weight",
    "attn.wo_b.weight",
    "ffn.shared_experts.w1.weight",
    "ffn.shared_experts.w2.weight",
    "ffn.shared_experts.w3.weight",
)
EXPERTS = ("ffn.experts.w13", "ffn.experts.w2")
STORED = (torch.float8_e4m3fn, torch.int8)
TOLERANCE = 1e-4

Tensors = dict[str, Tensor]
Module = DeepSeekV4 | DSparkModule | FeatureProjector
LOADERS: dict[type[Module], Callable[..., None]] = {
    DeepSeekV4: load_target,
    DSparkModule: load_drafter,
    FeatureProjector: load_projector,
}
each_part = pytest.mark.parametrize("part", LOADERS, ids=lambda part: part.__name__)


def save(directory: Path, change: Callable[[Tensors], None] | None = None, **keys: object) -> Path:
    """A quantised checkpoint of a random target and drafter, its files passed through `change`."""
    raw = RAW | keys
    target, drafter = DeepSeekV4(ModelConfig.from_dict(raw)), DSparkModule(ModelConfig.from_dict(raw))
    initialise(target, seed=1)
    initialise(drafter, seed=2)
    with torch.no_grad():
        target.head.weight *= 0.7  # flat enough that shared noise often makes drafter and target agree
    save_checkpoint(directory, target, drafter, raw, quantise=True)
    if change is not None:
        (file,) = directory.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    return directory


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("quantised"))


def load(part: type[Module], path: Path, *, keep: bool, group: ParallelGroup | None = None) -> Any:
    """The part of a checkpoint, or one rank's of it, with quantised weights kept or dequantised."""
    checkpoint = Checkpoint.open(path)
    arguments = (checkpoint.config,) if group is None else (checkpoint.config, group)
    with torch.device("meta"):
        module = part(*arguments)
    LOADERS[part](module, checkpoint, keep_quantised=keep)
    return module.requires_grad_(False)


def kept_names(module: nn.Module) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if tensor.dtype in STORED}


def scales_of(name: str) -> str:
    return name.removesuffix("weight") + "scale" if name.endswith(".weight") else f"{name}_scale"


def files_of(path: Path) -> Tensors:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def in_files(tensors: Tensors, name: str) -> tuple[Tensor, Tensor]:
    """(bytes, bytes of scales) of a parameter, experts stacked as the network keeps them."""
    if name.endswith(EXPERTS):
        prefix, _, kind = name.rpartition(".")
        parts = ("w1", "w3") if kind == "w13" else ("w2",)
        count = sum(key.startswith(prefix) and key.endswith("w2.weight") for key in tensors)
        every = [[f"{prefix}.{expert}.{part}" for part in parts] for expert in range(count)]
    else:
        every = [[name.removesuffix(".weight")]]
    weights, scales = (
        torch.stack([torch.cat([tensors[f"{key}.{end}"].view(torch.uint8) for key in keys]) for keys in every])
        for end in ("weight", "scale")
    )
    return (weights, scales) if name.endswith(EXPERTS) else (weights[0], scales[0])


def decoded(module: nn.Module) -> Tensors:
    """The state as it would be without quantised weights."""
    state = module.state_dict()
    kept = kept_names(module)
    values = {name: tensor for name, tensor in state.items() if name not in {*kept, *map(scales_of, kept)}}
    for name in kept:
        dequantise = dequantise_fp4 if state[name].dtype == torch.int8 else dequantise_fp8
        weight, scale = state[name], state[scales_of(name)]
        pairs = zip(weight, scale, strict=True) if weight.dim() == 3 else [(weight, scale)]
        matrices = torch.stack([dequantise(*pair) for pair in pairs])
        values[name] = matrices if weight.dim() == 3 else matrices[0]
    return values


# --- what is kept -------------------------------------------------------------------------------------------------


def quantised_names(part: type[Module]) -> dict[str, torch.dtype]:
    """Weights of a release that have a quantised product."""
    prefixes = {DeepSeekV4: [f"layers.{n}." for n in range(4)], DSparkModule: ["mtp.0.", "mtp.1."]}.get(part, [])
    names = {prefix + name: torch.float8_e4m3fn for prefix in prefixes for name in LINEARS}
    names |= {prefix + name: torch.int8 for prefix in prefixes for name in EXPERTS}
    if part is DeepSeekV4:
        return names | {f"layers.{layer}.attn.indexer.wq_b.weight": torch.float8_e4m3fn for layer in CSA_LAYERS}
    return names | {"mtp.0.main_proj.weight": torch.float8_e4m3fn}


@each_part
def test_linears_stay_in_fp8_and_experts_in_fp4_byte_by_byte(part: type[Module], path: Path) -> None:
    module, tensors = load(part, path, keep=True), files_of(path)
    state = module.state_dict()
    assert {name: state[name].dtype for name in kept_names(module)} == quantised_names(part)
    for name in kept_names(module):
        weight, scale = in_files(tensors, name)
        assert torch.equal(state[name].view(torch.uint8), weight), name
        assert state[scales_of(name)].dtype == torch.float8_e8m0fnu
        assert torch.equal(state[scales_of(name)].view(torch.uint8), scale), name


@each_part
def test_kept_weights_decode_to_the_dequantised_values_and_others_are_equal(part: type[Module], path: Path) -> None:
    found, expected = decoded(load(part, path, keep=True)), load(part, path, keep=False).state_dict()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        assert torch.equal(found[name], values), name


def test_a_bfloat16_network_keeps_the_same_bytes_and_dequantises_the_rest_to_bfloat16(path: Path) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = load(DeepSeekV4, path, keep=True)
    finally:
        torch.set_default_dtype(before)
    expected = load(DeepSeekV4, path, keep=True).state_dict()
    for name in kept_names(module):
        assert torch.equal(module.state_dict()[name].view(torch.uint8), expected[name].view(torch.uint8)), name
    assert module.layers[0].attn.wo_a.weight.dtype == torch.bfloat16
    assert module.layers[0].attn.attn_sink.dtype == torch.float32


SPLIT_ALONG = {
    "embed.weight": 0,
    "head.weight": 0,
    "attn_sink": 0,
    "wq_b.weight": 0,
    "wo_a.weight": 0,
    "wo_b.weight": 1,
    "experts.w13": 0,
    "experts.w2": 0,
    "shared_experts.w1.weight": 0,
    "shared_experts.w3.weight": 0,
    "shared_experts.w2.weight": 1,
}


def joined(name: str, parts: list[Tensor]) -> Tensor:
    """The whole of what ranks hold; scales lie as their weights do."""
    weight = name.removesuffix("_scale").replace(".scale", ".weight")
    if ".indexer." not in name:
        for ending, dim in SPLIT_ALONG.items():
            if weight.endswith(ending):
                return torch.cat(parts, dim)
    assert all(torch.equal(part, parts[0]) for part in parts), name
    return parts[0]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def test_ranks_hold_slices_and_dequantise_what_they_cut_through(path: Path) -> None:
    whole = load(DeepSeekV4, path, keep=True)
    ranks = [load(DeepSeekV4, path, keep=True, group=ParallelGroup(rank, 2)) for rank in range(2)]
    cut = {f"layers.{layer}.attn.wq_b.weight" for layer in range(4)}
    for rank in ranks:
        assert kept_names(rank) == kept_names(whole) - cut
    states = [rank.state_dict() for rank in ranks]
    assert states[0].keys() == states[1].keys() == whole.state_dict().keys() - {scales_of(name) for name in cut}
    plain = decoded(whole)
    for name in states[0]:
        expected = plain[name] if name in cut else as_bytes(whole.state_dict()[name])
        assert torch.equal(joined(name, [as_bytes(state[name]) for state in states]), expected), name


# --- what is computed ---------------------------------------------------------------------------------------------


def rounded(x: Tensor) -> Tensor:
    """x as the official program hands it to a quantised product."""
    values, scale = round_fp8(x, 128)
    return (values.float() * scale).flatten(-2).to(x.dtype)


def moe_of_rounded_inputs(
    hidden: Tensor, weights: Tensor, experts: Tensor, w13: Tensor, w2: Tensor, limit: float, *_: object
) -> Tensor:
    """Dense experts, one after another, whose products see rounded inputs."""
    out = torch.zeros(hidden.shape)
    for expert in range(len(w13)):
        rows, places = torch.where(experts == expert)
        if len(rows):
            gate, up = F.linear(rounded(hidden[rows]), w13[expert]).chunk(2, dim=1)
            inner = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weights[rows, places, None]
            out[rows] += F.linear(rounded(inner), w2[expert])
    return out


@contextmanager
def rounding(plain: nn.Module, kept: nn.Module) -> Iterator[None]:
    """Inside, dequantised `plain` rounds the inputs of all products that `kept` has quantised weights for."""
    handles = [
        module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        for name, module in plain.named_modules()
        if isinstance(module, Weight) and f"{name}.weight" in kept_names(kept)
    ]
    experts_stay = any(name.endswith(EXPERTS) for name in kept_names(kept))
    with pytest.MonkeyPatch.context() as patch:
        if experts_stay:
            patch.setattr("dspark_kernels.moe", moe_of_rounded_inputs)
        yield
    for handle in handles:
        handle.remove()


def target_outputs(model: DeepSeekV4) -> Tensor:
    """Logits and features of a prompt in two pieces and three blocks of six, each rejected by half."""
    serving, text = Serving(model, gamma=5), random_tokens(40, RAW["vocab_size"], seed=3)
    pieces = [(0, text[:19]), (19, text[19:23]), *((start, text[start : start + 6]) for start in (23, 26, 29))]
    outputs = [serving.output({0: piece}) for piece in pieces]
    return torch.cat([torch.cat((model.logits(output.hidden), output.context_features), dim=1) for output in outputs])


@torch.no_grad()
def drafter_outputs(module: DSparkModule) -> Tensor:
    """Hidden states, base logits and confidences of three blocks behind contexts of 0, 3 and 20 tokens."""
    pools = DraftPools(module, num_slots=3)
    slots, starts = torch.tensor([2, 0, 1]), torch.tensor([0, 3, 20])
    owners = slots.repeat_interleave(starts)
    positions = torch.cat([torch.arange(int(start)) for start in starts])
    features = torch.randn(len(owners), 2 * RAW["hidden_size"], generator=torch.Generator().manual_seed(4))
    where = pools.context_slot_mapping(owners, positions)
    for kept in (slice(0, 15), slice(15, None)):  # a ring takes each of its rows once per write
        module.store_context(module.project(features)[kept], positions[kept], pools.tensors, where[kept])
    anchors = torch.tensor([5, 17, 40])
    block = module.cached_block(anchors, starts, pools.tensors, pools.index(slots, starts))
    tokens, confidences = module.sample(block, anchors, starts, torch.zeros(3).double(), slots, module.gamma)
    parts = (block.hidden, block.base_logits, confidences.unsqueeze(2), tokens.unsqueeze(2).float())
    return torch.cat(parts, dim=2)


@torch.no_grad()
def projector_outputs(module: FeatureProjector) -> Tensor:
    return module(torch.randn(7, 2 * RAW["hidden_size"], generator=torch.Generator().manual_seed(5)))


OUTPUTS: dict[type[Module], Callable[..., Tensor]] = {
    DeepSeekV4: target_outputs,
    DSparkModule: drafter_outputs,
    FeatureProjector: projector_outputs,
}


def assert_computes_with_rounded_inputs(part: type[Module], path: Path) -> None:
    kept, plain = load(part, path, keep=True), load(part, path, keep=False)
    with rounding(plain, kept):
        expected = OUTPUTS[part](plain)
    torch.testing.assert_close(OUTPUTS[part](kept), expected, atol=TOLERANCE, rtol=0)


@each_part
def test_a_quantised_network_equals_a_dequantised_one_with_rounded_inputs(part: type[Module], path: Path) -> None:
    assert_computes_with_rounded_inputs(part, path)


@each_part
def test_rounding_the_inputs_makes_a_difference(part: type[Module], path: Path) -> None:
    """Otherwise the comparison with rounded inputs would not test the rounding."""
    kept, plain = load(part, path, keep=True), load(part, path, keep=False)
    assert (OUTPUTS[part](kept) - OUTPUTS[part](plain)).abs().max() > 100 * TOLERANCE


# --- what cannot stay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "plain"),
    [
        ({"hidden_size": 160}, ["attn.wq_a.weight", "attn.wkv.weight", "ffn.shared_experts.w1.weight", *EXPERTS]),
        ({"q_lora_rank": 96}, ["attn.wq_b.weight", "attn.indexer.wq_b.weight"]),
        ({"o_lora_rank": 40}, ["attn.wo_b.weight"]),
        ({"moe_intermediate_size": 96, "n_shared_experts": 1}, ["ffn.shared_experts.w2.weight", *EXPERTS]),
        ({"moe_intermediate_size": 192}, list(EXPERTS)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_weights_whose_inputs_do_not_fill_groups_of_128_are_dequantised(
    keys: dict[str, int], plain: list[str], tmp_path: Path
) -> None:
    path = save(tmp_path, **keys)
    kept = kept_names(load(DeepSeekV4, path, keep=True))
    assert kept, "some can stay in each of these networks"
    assert not [name for name in kept if name.endswith(tuple(plain))]
    assert_computes_with_rounded_inputs(DeepSeekV4, path)


def to_fp8_experts(*endings: str) -> Callable[[Tensors], None]:
    """Experts as base checkpoints keep them, those whose names end so."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".experts." in name and name.endswith(tuple(endings))]:
            weight = dequantise_fp4(tensors[name], tensors[scales_of(name)])
            tensors[name], tensors[scales_of(name)] = quantise_fp8(weight)

    return change


def to_float32_scales(*endings: str) -> Callable[[Tensors], None]:
    """Scales as base checkpoints keep them, those of weights whose names end so."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(tuple(endings)) and scales_of(name) in tensors]:
            tensors[scales_of(name)] = decode_scale(tensors[scales_of(name)])

    return change


def test_fp8_experts_of_a_base_checkpoint_stay_too(tmp_path: Path) -> None:
    path = save(tmp_path, to_fp8_experts("w1.weight", "w2.weight", "w3.weight"))
    experts = load(DeepSeekV4, path, keep=True).layers[2].ffn.experts
    assert experts.w13.dtype == experts.w2.dtype == torch.float8_e4m3fn
    assert experts.w13_scale.shape == (5, 2, 1)
    assert torch.equal(
        experts.w13[4].view(torch.uint8), in_files(files_of(path), "layers.2.ffn.experts.w13")[0][4].view(torch.uint8)
    )
    for part in (DeepSeekV4, DSparkModule):
        assert_computes_with_rounded_inputs(part, path)


def test_weights_with_float32_scales_are_all_dequantised(tmp_path: Path) -> None:
    path = save(tmp_path, to_float32_scales(".weight"))
    for part in LOADERS:
        kept, plain = load(part, path, keep=True), load(part, path, keep=False)
        assert not kept_names(kept)
        assert torch.equal(OUTPUTS[part](kept), OUTPUTS[part](plain))


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (to_float32_scales("experts.3.w2.weight"), {}),
        (to_float32_scales("experts.0.w1.weight"), {}),
        (to_fp8_experts("experts.2.w2.weight"), {}),
        (to_fp8_experts("w1.weight", "w2.weight", "w3.weight"), {"moe_intermediate_size": 192}),
    ],
    ids=["float32 scales in w2", "float32 scales in w1", "one FP8 matrix", "FP8 blocks across gate and up"],
)
def test_experts_of_a_layer_stay_together_or_not_at_all(
    change: Callable[[Tensors], None], keys: dict[str, int], tmp_path: Path
) -> None:
    path = save(tmp_path, change, **keys)
    kept = load(DeepSeekV4, path, keep=True)
    for layer in kept.layers:
        assert layer.ffn.experts.w13.dtype == layer.ffn.experts.w2.dtype == torch.float32
    assert_computes_with_rounded_inputs(DeepSeekV4, path)


def test_a_network_with_stored_weights_is_not_written(path: Path, tmp_path: Path) -> None:
    """The names and dtypes of its state are not those of a checkpoint."""
    plain = load(DeepSeekV4, path, keep=False)
    for target, drafter in ((load(DeepSeekV4, path, keep=True), None), (plain, load(DSparkModule, path, keep=True))):
        with pytest.raises(ValueError, match="kept quantised"):
            save_checkpoint(tmp_path, target, drafter, RAW)
    assert not list(tmp_path.iterdir())


# --- an engine ----------------------------------------------------------------------------------------------------

ENGINE = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 96, "page_size": 32, "schedule": "fixed"}


def texts(path: Path, keep: bool | None, speculate: bool, temperature: float) -> tuple[list[list[int]], int]:
    """Texts of three requests, and their number of outputs."""
    engine = build_engine(path, EngineConfig(keep_quantised=keep, **ENGINE))  # type: ignore[arg-type]
    said: dict[str, list[int]] = {}
    for number in range(3):
        sampling = SamplingParams(temperature=temperature, max_tokens=24, ignore_eos=True, seed=number)
        prompt = tuple(random_tokens(5 + 8 * number, RAW["vocab_size"], seed=number))
        speculative = VerificationLimits(bypass=not speculate)
        engine.add_request(
            Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling, speculative=speculative)
        )
        said[str(number)] = []
    num_outputs = 0
    while engine.has_unfinished():
        for output in engine.step().sequences:
            said[output.request_id].extend(output.token_ids)
            num_outputs += bool(output.token_ids)
    return list(said.values()), num_outputs


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_an_engine_with_quantised_weights_has_one_text_with_and_without_speculation(
    path: Path, temperature: float
) -> None:
    speculated, few = texts(path, keep=True, speculate=True, temperature=temperature)
    plain, many = texts(path, keep=True, speculate=False, temperature=temperature)
    assert speculated == plain
    assert [len(text) for text in plain] == [24, 24, 24]
    assert few < many == 72, "no draft was ever right"


def test_an_engine_on_a_cpu_dequantises_unless_it_is_told_otherwise(path: Path) -> None:
    assert texts(path, None, True, 1.0) == texts(path, False, True, 1.0) != texts(path, True, True, 1.0)
