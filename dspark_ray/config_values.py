"""Valid values of the keys of a checkpoint's `config.json`, in both dialects. Missing keys are not checked here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

_MOST = 2**31 - 1
_LARGEST = 1e30
"""Larger than any number of a network; the comparison also rejects NaN, infinity and integers beyond float64."""


def wrong_values(raw: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """(key, value, expectation) of every key with an invalid value."""
    for key, (is_right, expected) in _EXPECTED.items():
        if key in raw and not is_right(raw[key]):
            yield key, raw[key], expected
    for key, inner in _NESTED.items():
        yield from _wrong_inside(key, raw.get(key), inner)


def _wrong_inside(key: str, raw: object, inner: Mapping[str, _Rule]) -> Iterator[tuple[str, object, str]]:
    if raw is None:
        return
    if not isinstance(raw, dict):
        yield key, raw, "an object, or null"
        return
    for name, (is_right, expected) in inner.items():
        if name in raw and not is_right(raw[name]):
            yield f"{key}.{name}", raw[name], expected


_Rule = tuple[Callable[[Any], bool], str]


def _whole(low: int, high: int = _MOST) -> _Rule:
    expected = f"a whole number from {low} to {high}" if high < _MOST else f"a whole number, {low} or more"
    return lambda value: type(value) is int and low <= value <= high, expected


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _above_zero() -> _Rule:
    return lambda value: _is_number(value) and value > 0, "a finite number above 0"


def _list_of(rule: _Rule, words: str, shortest: int = 0) -> _Rule:
    return (
        lambda value: isinstance(value, list) and len(value) >= shortest and all(map(rule[0], value)),
        f"a list of {words}",
    )


def _one_of(*values: str) -> _Rule:
    return lambda value: value in values, f"one of {', '.join(values)}"


def _ids(value: object) -> bool:
    one = _whole(0)[0]
    return one(value) or (isinstance(value, list) and len(value) > 0 and all(map(one, value)))


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
    "dspark_block_size",
    "dspark_markov_rank",
    "n_mtp_layers",
)
_NUMBERS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta")

_EXPECTED: dict[str, _Rule] = {
    **dict.fromkeys(_POSITIVE, _whole(1)),
    **dict.fromkeys(_NUMBERS, _above_zero()),
    **dict.fromkeys(("num_hash_layers", "bos_token_id", "dspark_noise_token_id"), _whole(0)),
    "eos_token_id": (_ids, "a token id, or a list of them"),
    "norm_topk_prob": (lambda value: type(value) is bool, "true or false"),
    "partial_rotary_factor": (lambda value: _is_number(value) and 0 < value <= 1, "a number in (0, 1]"),
    "compress_ratios": _list_of(_whole(0), "whole numbers, one per layer and stage"),
    "layer_types": _list_of((lambda value: isinstance(value, str), ""), "strings, one per layer"),
    "mlp_layer_types": _list_of((lambda value: isinstance(value, str), ""), "strings, one per layer"),
    "dspark_target_layer_ids": _list_of(_whole(0), "layers, at least one", shortest=1),
    "dspark_markov_head_type": _one_of("vanilla", "gated", "rnn"),
}
_YARN: dict[str, _Rule] = {
    "factor": _above_zero(),
    "original_max_position_embeddings": _whole(1),
    "beta_fast": _above_zero(),
    "beta_slow": _above_zero(),
}
_OBJECT: _Rule = (lambda value: isinstance(value, dict), "an object")
_NESTED: dict[str, dict[str, _Rule]] = {
    "rope_scaling": _YARN,
    "rope_parameters": {"main": _OBJECT, "compress": _OBJECT},
    "compress_rates": {},
}
