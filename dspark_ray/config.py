"""Configuration that is fixed for the life of an engine: the model's shape, and how the engine runs it.

Letters used throughout the package for shapes:
  N flattened rows (tokens) of a forward     R requests in a step       G gamma, drafted positions per request
  D head_dim        Dr rotary dims           d hidden size              H attention heads
  m hyper-connection streams                 W sliding window           V vocabulary
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dspark_ray.config_values import wrong_values

AttentionKind = Literal["sliding", "csa", "hca"]
MarkovHeadType = Literal["vanilla", "gated", "rnn"]
VerificationMode = Literal["coupled", "rejection"]
ScheduleKind = Literal["causal", "lagged", "full", "fixed"]

KEY_GROUP = 64
"""Channels of a key that share a scale: dspark_kernels.formats.KEY_GROUP. That module imports torch, which programs
that only read a configuration do without."""

CSA_RATIO = 4
"""The compression ratio whose layers overlap windows and select entries with the lightning indexer."""

# Keys of networks that look like DeepSeek-V4 but are not (V4.1, vision): see docs/architecture.md.
_UNSUPPORTED_KEYS = ("kv_source_layer_ids", "hc_pre_from_prev_sublayer", "engram_config")

_LAYER_TYPE_TO_KIND: dict[str, AttentionKind] = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}


class ConfigError(ValueError):
    """A configuration that cannot be served; the message names the key, its value and what would be right."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN parameters, applied on compressed layers only and without a magnitude factor."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DSparkConfig:
    """The draft module that ships inside a checkpoint (`dspark_*` keys and `mtp.*` tensors)."""

    gamma: int
    """Block positions, equal to drafted tokens per round (`dspark_block_size`)."""
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    """0-based target layers whose output streams, averaged, feed the drafter."""
    markov_rank: int
    num_stages: int
    markov_head_type: MarkovHeadType = "vanilla"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a DeepSeek-V4 network, read from either dialect of `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    """One entry per target layer: 0 sliding, 4 CSA, larger HCA."""
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    norm_topk_prob: bool = True
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 1048576
    bos_token_id: int = 0
    eos_token_ids: tuple[int, ...] = (1,)
    """Every one of them ends a text."""
    kv_fake_quant: bool = False
    """Round stored keys to FP8 outside their rotary part. A checkpoint with a quantization_config was trained so."""
    dspark: DSparkConfig | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The `config.json` this was read from, for writing it back."""

    def __post_init__(self) -> None:
        self._require(len(self.compress_ratios) == self.num_hidden_layers, "compress_ratios", "one entry per layer")
        bad = [ratio for ratio in self.compress_ratios if ratio in (1, 2) or ratio < 0]
        self._require(not bad, "compress_ratios", "0, 4 or a larger ratio per layer")
        divides = self.o_groups > 0 and self.num_attention_heads % self.o_groups == 0
        self._require(divides, "o_groups", f"a divisor of num_attention_heads={self.num_attention_heads}")
        rope = self.qk_rope_head_dim
        fits = rope % 2 == 0 and rope <= self.head_dim
        self._require(fits, "qk_rope_head_dim", f"an even number, at most head_dim={self.head_dim}")
        self._require(self.num_experts_per_tok <= self.n_routed_experts, "num_experts_per_tok", "<= n_routed_experts")
        self._require(self.bos_token_id < self.vocab_size, "bos_token_id", "an id below vocab_size")
        self._require(max(self.eos_token_ids) < self.vocab_size, "eos_token_id", "ids below vocab_size")
        if self.dspark is not None:
            last = max(self.dspark.target_layer_ids)
            self._require(last < self.num_hidden_layers, "dspark_target_layer_ids", "ids below num_hidden_layers")
            is_known = self.dspark.noise_token_id < self.vocab_size
            self._require(is_known, "dspark_noise_token_id", "an id below vocab_size")

    def _require(self, condition: bool, key: str, expected: str) -> None:
        if not condition:
            value = self.raw[key] if key in self.raw else getattr(self, key)
            raise ConfigError(f"config.json: {key}={_shown(value)}: expected {expected}")

    @property
    def eos_token_id(self) -> int:
        """The first end-of-sequence id."""
        return self.eos_token_ids[0]

    def attention_kind(self, layer: int) -> AttentionKind:
        """Kind of target layer `layer`; draft stages (`layer >= num_hidden_layers`) are sliding."""
        ratio = self.compress_ratio(layer)
        return "sliding" if ratio == 0 else "csa" if ratio == CSA_RATIO else "hca"

    def compress_ratio(self, layer: int) -> int:
        """Tokens per compressed entry of `layer`, 0 where it has none."""
        return self.compress_ratios[layer] if layer < self.num_hidden_layers else 0

    @property
    def gamma(self) -> int:
        """Drafted positions per request, 0 without a draft module."""
        return self.dspark.gamma if self.dspark else 0

    @staticmethod
    def from_file(path: Path | str) -> ModelConfig:
        """Read `config.json` of a checkpoint folder (or the file itself).

        Raises ConfigError for a missing or malformed file and for networks this package does not implement.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"{path}: no such file; expected a checkpoint folder with a config.json") from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: expected an object with the keys of DeepSeek-V4, found {_shown(raw)}")
        try:
            return ModelConfig.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path.parent}/{error}") from None

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> ModelConfig:
        """Translate the official dialect (`compress_ratios`) or the one transformers saves (`layer_types`).

        Raises ConfigError, which names the key.
        """
        _refuse_other_networks(raw)
        for key, value, expected in wrong_values(raw):
            raise ConfigError(f"config.json: {key}={_shown(value)}: expected {expected}")
        try:
            return _translate(raw)
        except KeyError as error:
            raise ConfigError(f"config.json: key {error.args[0]!r} is missing") from None


def _shown(value: object) -> str:
    """A value as JSON, shortened to about 100 characters."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _refuse_other_networks(raw: dict[str, Any]) -> None:
    if raw.get("model_type") != "deepseek_v4":
        raise ConfigError(f"config.json: model_type={raw.get('model_type')!r}: expected 'deepseek_v4'")
    for key in _UNSUPPORTED_KEYS:
        if raw.get(key):
            raise ConfigError(f"config.json: {key}={raw[key]!r}: this is not a DeepSeek-V4 text model")
    if any(key.startswith("engram_") for key in raw) or raw.get("vision_n_layers", 0):
        raise ConfigError("config.json: engram or vision layers: this is not a DeepSeek-V4 text model")
    for key, expected in (("scoring_func", "sqrtsoftplus"), ("hidden_act", "silu")):
        if raw.get(key, expected) != expected:
            raise ConfigError(f"config.json: {key}={raw[key]!r}: expected {expected!r}")


def _translate(raw: dict[str, Any]) -> ModelConfig:
    num_layers = raw["num_hidden_layers"]
    ratios = _compress_ratios(raw)
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_hidden_layers=num_layers,
        num_attention_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        qk_rope_head_dim=_rope_head_dim(raw),
        q_lora_rank=raw["q_lora_rank"],
        o_groups=raw["o_groups"],
        o_lora_rank=raw["o_lora_rank"],
        sliding_window=raw["sliding_window"],
        compress_ratios=tuple(ratios[:num_layers]),
        index_n_heads=raw["index_n_heads"],
        index_head_dim=raw["index_head_dim"],
        index_topk=raw["index_topk"],
        n_routed_experts=raw["n_routed_experts"],
        n_shared_experts=raw.get("n_shared_experts", 1),
        num_experts_per_tok=raw["num_experts_per_tok"],
        moe_intermediate_size=raw["moe_intermediate_size"],
        num_hash_layers=_num_hash_layers(raw),
        routed_scaling_factor=raw["routed_scaling_factor"],
        norm_topk_prob=raw.get("norm_topk_prob", True),
        swiglu_limit=raw.get("swiglu_limit", 10.0),
        hc_mult=raw.get("hc_mult", 4),
        hc_sinkhorn_iters=raw.get("hc_sinkhorn_iters", 20),
        hc_eps=raw.get("hc_eps", 1e-6),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        **_rope(raw),
        max_position_embeddings=raw.get("max_position_embeddings", 1048576),
        bos_token_id=raw.get("bos_token_id", 0),
        eos_token_ids=_eos_token_ids(raw.get("eos_token_id", 1)),
        kv_fake_quant=_rounds_keys(raw),
        dspark=_dspark(raw, num_stages=len(ratios) - num_layers),
        raw=dict(raw),
    )


def _eos_token_ids(raw: int | list[int]) -> tuple[int, ...]:
    return tuple(raw) if isinstance(raw, list) else (raw,)


def _compress_ratios(raw: dict[str, Any]) -> list[int]:
    if "compress_ratios" in raw:
        return list(raw["compress_ratios"])
    rates = raw.get("compress_rates", {})
    defaults = {"sliding": 0, "csa": CSA_RATIO, "hca": 128}
    ratios = []
    for layer_type in raw["layer_types"]:
        if layer_type not in _LAYER_TYPE_TO_KIND:
            raise ConfigError(
                f"config.json: layer_types has {layer_type!r}: expected one of {sorted(_LAYER_TYPE_TO_KIND)}"
            )
        ratios.append(rates.get(layer_type, defaults[_LAYER_TYPE_TO_KIND[layer_type]]))
    return ratios


def _rope_head_dim(raw: dict[str, Any]) -> int:
    if "qk_rope_head_dim" in raw:
        return int(raw["qk_rope_head_dim"])
    return round(raw["head_dim"] * raw["partial_rotary_factor"])


def _rounds_keys(raw: dict[str, Any]) -> bool:
    """The official networks were trained with quantised weights and with rounded keys. Keys whose channels are not a
    whole number of groups cannot be rounded."""
    return bool(raw.get("quantization_config")) and (raw["head_dim"] - _rope_head_dim(raw)) % KEY_GROUP == 0


def _num_hash_layers(raw: dict[str, Any]) -> int:
    if "num_hash_layers" in raw:
        return int(raw["num_hash_layers"])
    kinds = raw.get("mlp_layer_types", [])
    count = kinds.count("hash_moe")
    if "hash_moe" in kinds[count:]:
        raise ConfigError(f"config.json: mlp_layer_types={kinds!r}: expected all 'hash_moe' before any 'moe'")
    return count


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    nested = raw.get("rope_parameters") or {}
    main, compress = nested.get("main", {}), nested.get("compress", {})
    scaling = raw.get("rope_scaling") or (compress if compress.get("rope_type") == "yarn" else None)
    return {
        "rope_theta": raw.get("rope_theta", main.get("rope_theta", 10000.0)),
        "compress_rope_theta": raw.get("compress_rope_theta", compress.get("rope_theta", 160000.0)),
        "rope_scaling": scaling
        and RopeScaling(
            factor=scaling["factor"],
            original_max_position_embeddings=scaling["original_max_position_embeddings"],
            beta_fast=scaling.get("beta_fast", 32.0),
            beta_slow=scaling.get("beta_slow", 1.0),
        ),
    }


def _dspark(raw: dict[str, Any], num_stages: int) -> DSparkConfig | None:
    # num_nextn_predict_layers is 1 even where three stages ship, so only the dspark_* keys tell.
    if "dspark_block_size" not in raw:
        return None
    stages = raw.get("n_mtp_layers", num_stages)
    if stages < 1:
        raise ConfigError(
            f"config.json: compress_ratios has {num_stages} entries beyond num_hidden_layers:"
            " expected one per DSpark stage"
        )
    return DSparkConfig(
        gamma=raw["dspark_block_size"],
        noise_token_id=raw["dspark_noise_token_id"],
        target_layer_ids=tuple(raw["dspark_target_layer_ids"]),
        markov_rank=raw["dspark_markov_rank"],
        num_stages=stages,
        markov_head_type=raw.get("dspark_markov_head_type", "vanilla"),
    )


DType = Literal["float32", "bfloat16"]
CacheDType = Literal["auto", "fp8"]
KeyDType = Literal["float32", "bfloat16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a checkpoint, as the user wrote it; `for_model` turns it into a ResolvedConfig."""

    max_num_seqs: int = 32
    """Most sequences that run together; each holds one slot of every ring."""
    max_num_batched_tokens: int = 512
    """Most rows of one target forward: verify blocks first, then prefill chunks in the remaining rows."""
    max_model_len: int = 2048
    """Prompt plus generated tokens of one request."""
    num_pages: int | None = None
    """Pages of the compressed cache; None gives every slot room for max_model_len."""
    page_size: int = 128
    """Positions per page; a multiple of every compression ratio in the model."""
    max_waiting: int = 256
    """Requests accepted beyond max_num_seqs; further ones are refused."""
    gamma: int | None = None
    """Most drafted tokens per request and round; None takes the checkpoint's block size."""
    verification: VerificationMode = "coupled"
    """`coupled` keeps a draft where it is the token that the target draws, so that drafts do not change the text;
    `rejection` keeps it with probability min(1, p/q), so that drafts do not change the distribution of texts."""
    speculation: bool = True
    dtype: DType = "float32"
    """Of activations, caches and weights that are not kept quantised."""
    device: str = "cpu"
    keep_quantised: bool | None = None
    """Keep FP8 and FP4 weights as the checkpoint stores them, in half or a quarter of the memory and of its traffic,
    instead of dequantising them when they are read. None does so on GPUs only."""
    kv_cache_dtype: CacheDType = "auto"
    """`fp8` rounds keys outside their rotary part and takes little more than half of bfloat16's memory. `auto` is `fp8`
    on GPUs where the checkpoint was trained with rounded keys (`ModelConfig.kv_fake_quant`), else `dtype`."""
    enforce_eager: bool = False
    """Launch every kernel of a decode step, instead of replaying a CUDA graph. No effect on a CPU."""
    rejection_top_k: int = 64
    """Entries of the truncated draft distribution that `rejection` draws from and sends."""
    schedule: ScheduleKind | None = None
    """How verify lengths are chosen; None takes `full` with coupled and `lagged` with rejection verification."""
    schedule_lag: int = 2
    """Age, in rounds, of the confidences that set the budget of `lagged`."""
    bypass: bool = True
    """Draft for no request while drafting costs more than it brings."""
    confidence_threshold: float = 0.0
    """Drafted positions whose survival is below this are not verified under any schedule."""
    sts_path: str | None = None
    """Temperatures of the confidences (SGLang's STS JSON); None takes sts.json of the checkpoint, if there is one."""
    calibrate_online: bool = True
    """Refit the temperatures to the outcomes of drafts where that lowers the calibration error."""
    cost_table: str | None = None
    """A cost table to use instead of profiling at start-up, in this package's format or either of SGLang's."""
    cost_directory: str | None = None
    """Folder in which profiled cost tables are saved for the next start; None profiles at every start."""

    def __post_init__(self) -> None:
        positive = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "page_size", "max_waiting")
        for name in (*positive, "schedule_lag"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a positive number")
        if not 0.0 <= self.confidence_threshold <= 1.0:
            raise ConfigError(f"confidence_threshold={self.confidence_threshold}: expected a number in [0, 1]")
        if self.verification == "rejection" and self.schedule == "full":
            raise ConfigError(
                "schedule='full' with verification='rejection': a search over current confidences sees drafted tokens"
                " before it decides on them, which bends the output (paper, appendix A): expected causal, lagged or"
                " fixed, or verification='coupled'"
            )

    def for_model(self, model: ModelConfig) -> ResolvedConfig:
        """Decide what depends on the checkpoint or the device, and check the two configurations against each other.

        Raises ConfigError.
        """
        gamma = model.gamma if self.gamma is None else self.gamma
        if not 0 <= gamma <= model.gamma:
            # With more positions than it was trained with, the drafter's output changes at every position.
            raise ConfigError(f"gamma={gamma}: expected 0..{model.gamma}, the checkpoint's dspark_block_size")
        if not self.speculation:
            gamma = 0  # otherwise rows, pages and graphs would be reserved for drafts
        if self.max_model_len > model.max_position_embeddings:
            raise ConfigError(
                f"max_model_len={self.max_model_len}: the checkpoint allows {model.max_position_embeddings}"
            )
        for ratio in set(model.compress_ratios) - {0}:
            if self.page_size % ratio:
                raise ConfigError(f"page_size={self.page_size}: expected a multiple of compression ratio {ratio}")
        if self.kv_cache_dtype == "fp8":
            _check_packed_keys(model)
        pages_per_sequence = -(-self.max_model_len // self.page_size)
        num_pages = self.num_pages if self.num_pages is not None else pages_per_sequence * self.max_num_seqs
        if num_pages < pages_per_sequence:
            raise ConfigError(
                f"num_pages={num_pages}: one request of max_model_len={self.max_model_len} needs {pages_per_sequence}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs * (1 + gamma):
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: expected at least max_num_seqs*(1+gamma)"
                f" = {self.max_num_seqs * (1 + gamma)}"
            )
        on_gpu = self.device.startswith("cuda")
        fp8_keys = self.kv_cache_dtype == "fp8" or (model.kv_fake_quant and on_gpu)
        decided = {
            "gamma": gamma,
            "num_pages": num_pages,
            "schedule": self.schedule or ("full" if self.verification == "coupled" else "lagged"),
            "keep_quantised": on_gpu if self.keep_quantised is None else self.keep_quantised,
            "kv_cache_dtype": "fp8" if fp8_keys else self.dtype,
        }
        return ResolvedConfig(**{field.name: getattr(self, field.name) for field in fields(EngineConfig)} | decided)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """An EngineConfig with everything decided that a checkpoint or a device decides; what engines are built from."""

    gamma: int = field()
    num_pages: int = field()
    schedule: ScheduleKind = field()
    keep_quantised: bool = field()
    kv_cache_dtype: KeyDType = field()  # type: ignore[assignment]
    """The type in which keys are stored."""


def _check_packed_keys(model: ModelConfig) -> None:
    """Raise ConfigError where keys cannot be stored in FP8."""
    plain = model.head_dim - model.qk_rope_head_dim
    if plain % KEY_GROUP:
        raise ConfigError(
            f"kv_cache_dtype='fp8': keys have {plain} channels outside their rotary part: expected a multiple of"
            f" {KEY_GROUP}"
        )
