"""Target and draft module against the official program, driven round by round as an engine would drive them.

Per recorded round: context keys of what was committed -> block -> heads -> verify [anchor, drafts] -> keep as
many drafts as recorded. Rejected positions stay in the target's cache until the text comes by again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import GoldenCase, case_files, case_name
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module

from dspark_ray.cache.shape import CacheShape
from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.config import ModelConfig
from dspark_ray.drafters.dspark import BlockOutput, Draft, DSparkModule, follow_path, greedy
from dspark_ray.model.deepseek_v4 import DeepSeekV4
from dspark_ray.model.rows import Segment, build_rows

TOLERANCE = 1e-4
# The same in cases whose keys are rounded to FP8, although there a sum in another order may push a key over
# the edge between two FP8 values, up to 1/8 apart, which moves all that follows by 1e-3 and more. No looser
# bound would tell that from a wrong formula; noise of 1e-7 after every norm does it in one replay of forty.

# The official program's names of the keys, and ours.
_KEYS = {
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "rope_head_dim": "qk_rope_head_dim",
    "norm_eps": "rms_norm_eps",
    "window_size": "sliding_window",
}
# Keys that only compressed layers read, which no case has.
_UNUSED = {"index_n_heads": 1, "index_head_dim": 1, "index_topk": 1}


def model_config(facts: dict[str, Any]) -> ModelConfig:
    keys = {_KEYS.get(key, key): value for key, value in facts["config"].items()}
    config = ModelConfig.from_dict(_UNUSED | keys | {"model_type": "deepseek_v4"})
    return replace(config, kv_fake_quant=facts["fp8_fake_quant_of_kv_nope"])


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official tensors with the experts of each layer stacked, gate rows before up rows."""
    result, experts = {}, defaultdict(dict)
    for name, tensor in tensors.items():
        layer, found, expert = name.partition(".ffn.experts.")
        if found:
            number, matrix, _ = expert.split(".")
            experts[layer][int(number), matrix] = tensor
        else:
            result[name] = tensor
    for layer, parts in experts.items():
        numbers = sorted({number for number, _ in parts})
        rows = [torch.cat((parts[number, "w1"], parts[number, "w3"])) for number in numbers]
        result[f"{layer}.ffn.experts.w13"] = torch.stack(rows)
        result[f"{layer}.ffn.experts.w2"] = torch.stack([parts[number, "w2"] for number in numbers])
    return result


class Replay:
    """A target and a drafter that replay the rounds of one recording."""

    def __init__(self, path: Path) -> None:
        self.case = GoldenCase.load(path)
        self.config = config = model_config(self.case.facts)
        self.target = DeepSeekV4(config)
        target_weights = load_file(path.parent / "weights_target.safetensors")
        self.target.load_state_dict(stacked(target_weights))
        self.drafter = DSparkModule(config)
        self.drafter.load_state_dict(stacked(load_file(path.parent / "weights_mtp.safetensors")))
        self.drafter.share(target_weights["embed.weight"], target_weights["head.weight"])
        self.batch = len(self.case.tensors["prompt_ids"])
        num_tokens = self.case.tensors["prompt_ids"].numel()
        self.shape = CacheShape.of(config, self.drafter.gamma, 128, num_slots=self.batch, max_rows=num_tokens)
        self.cache = CacheTensors(config, self.shape, num_pages=1)
        window = torch.zeros(self.batch, config.sliding_window, config.head_dim)
        self.rings = [window.clone() for _ in self.drafter.stages]
        self.computed: dict[str, Tensor] = {}
        self._inside_block: dict[str, Tensor] = {}
        for number, stage in enumerate(self.drafter.stages):
            stage.register_forward_hook(self._recorder(f"stage{number}.", self._after_stage))
            stage.ffn.register_forward_hook(self._recorder(f"stage{number}.", self._after_ffn))
            stage.ffn.gate.register_forward_hook(self._recorder(f"stage{number}.", self._after_gate))

    @torch.no_grad()
    def run(self) -> dict[str, Tensor]:
        """Prefill and every recorded round; all tensors computed, under the names of the recording."""
        prompt = self.case.tensors["prompt_ids"]
        features, logits = self._forward_target(0, prompt)
        self._commit(0, features)
        self._keep("prefill.", main_hidden=features, target_logits_last=logits[:, -1], **self._ring_names())
        self.length = prompt.shape[1]
        for number in range(self.case.num_rounds):
            self._round(f"round{number}.", features[:, -1:])
            features = self._verify(f"round{number}.")
        return self.computed

    def _round(self, name: str, newest_features: Tensor) -> None:
        recorded = self.case.group(name)
        main_x = self.drafter.project(newest_features.flatten(0, 1)).unflatten(0, (self.batch, -1))
        starts = torch.full((self.batch,), self.length)
        visible = torch.arange(self.config.sliding_window) < starts.unsqueeze(1)
        block = self.drafter.block(recorded["anchor"], starts, self.rings, visible)
        self._keep(name, main_hidden=newest_features, main_x=main_x, **self._ring_names())
        self._keep(name, head_hidden=block.hidden, base_logits=block.base_logits, **self._inside_block)
        self._keep_drafts(name, block, recorded)

    def _keep_drafts(self, name: str, block: BlockOutput, recorded: dict[str, Tensor]) -> None:
        anchors = recorded["anchor"]
        draft: Draft = self.drafter.run_heads(block, anchors, greedy)
        self._keep(
            f"{name}greedy_",
            output_ids=torch.cat((anchors.unsqueeze(1), draft.tokens), dim=1),
            corrected_logits=draft.logits,
            confidence_logits=draft.confidence_logits,
        )
        path = recorded["fixed_path.tokens"]
        forced = self.drafter.run_heads(block, anchors, follow_path(path))
        self._keep(
            f"{name}fixed_path.",
            corrected_logits=forced.logits,
            confidence_logits=forced.confidence_logits,
            survival=torch.sigmoid(forced.confidence_logits).cumprod(-1),
        )

    def _verify(self, name: str) -> Tensor:
        """Target forward of the anchor and all drafts; features [B, n, T*d] of the tokens recorded as accepted."""
        recorded = self.case.group(name)
        if "committed_ids" not in recorded:
            return torch.empty(0)  # the last round is only drafted
        committed = recorded["committed_ids"]
        count = committed.shape[1]
        block = torch.cat((committed, recorded["greedy_output_ids"][:, count:]), dim=1)
        features, logits = (rows[:, :count] for rows in self._forward_target(self.length, block))
        self._keep(f"{name}committed_", main_hidden=features, target_logits=logits)
        self._keep(name, next_anchor=logits[:, -1].argmax(-1))
        self._commit(self.length, features)
        self.length += count
        return features

    def _forward_target(self, start: int, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, n, T*d], logits [B, n, V]) of token_ids [B, n]."""
        segments = [Segment(slot, start, ids, pages=[]) for slot, ids in enumerate(token_ids.tolist())]
        output = self.target(build_rows(segments, self.shape), self.cache)
        assert output.context_features is not None
        logits = self.target.logits(output.hidden)
        return output.context_features.unflatten(0, token_ids.shape), logits.unflatten(0, token_ids.shape)

    def _commit(self, start: int, features: Tensor) -> None:
        """Context keys of [B, n] tokens from position `start` on, the youngest of them into the rings."""
        window = self.config.sliding_window
        positions = torch.arange(start, start + features.shape[1])[-window:]
        main_x = self.drafter.project(features[:, -window:].flatten(0, 1))
        keys = self.drafter.context_keys(main_x, positions.repeat(self.batch))
        for ring, stage_keys in zip(self.rings, keys, strict=True):
            ring[:, positions % window] = stage_keys.unflatten(0, (self.batch, -1))

    def _ring_names(self) -> dict[str, Tensor]:
        return {f"stage{number}.ring": ring.clone() for number, ring in enumerate(self.rings)}

    def _keep(self, prefix: str, **tensors: Tensor) -> None:
        self.computed |= {prefix + name: tensor for name, tensor in tensors.items()}

    def _recorder(self, prefix: str, parts: Callable[..., dict[str, Tensor]]) -> Callable[..., None]:
        """A forward hook that keeps what `parts` makes of a module's inputs and output."""

        def record(module: Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            self._inside_block |= {prefix + name: tensor for name, tensor in parts(inputs, output).items()}

        return record

    def _after_stage(self, inputs: tuple[Tensor, ...], streams: Tensor) -> dict[str, Tensor]:
        return {"out": self._by_request(streams)}

    def _after_ffn(self, inputs: tuple[Tensor, ...], out: Tensor) -> dict[str, Tensor]:
        return {"ffn_norm_out": self._by_request(inputs[0]), "ffn_out": self._by_request(out)}

    def _after_gate(self, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        weights, experts = in_order_of_experts(*output)
        return {"gate_weights": weights, "gate_indices": experts}

    def _by_request(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.batch, -1))


def in_order_of_experts(weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Routing [N, K] sorted by expert: the order of chosen experts has no meaning."""
    order = experts.argsort(dim=-1)
    return weights.gather(-1, order), experts.gather(-1, order)


# Recorded tensors that are the replay's input, and those that no module of ours hands out.
INPUTS = {"prompt_ids", "start_pos", "anchor", "committed_ids", "fixed_path.tokens"}
NOT_REACHED = {"attn_norm_out", "attn_out", "head_norm_out", "greedy_margin"}


@dataclass(frozen=True)
class Comparison:
    """A recording and its replay."""

    recorded: dict[str, Tensor]
    computed: dict[str, Tensor]

    def assert_equal(self, *endings: str) -> None:
        """Every tensor whose name ends so, in all rounds: integers exactly, floats to TOLERANCE."""
        names = [name for name in self.computed if name.endswith(endings)]
        assert names, endings
        for name in names:
            torch.testing.assert_close(
                self.computed[name],
                self.recorded[name],
                atol=TOLERANCE,
                rtol=0,
                msg=lambda details, name=name: f"{name}: {details}",
            )


@pytest.fixture(scope="module", params=case_files("v4_dspark/*.json"), ids=case_name)
def replay(request: pytest.FixtureRequest) -> Replay:
    return Replay(request.param)


@pytest.fixture(scope="module")
def comparison(replay: Replay) -> Comparison:
    recorded = dict(replay.case.tensors)
    for name in [name for name in recorded if name.endswith("gate_indices")]:
        weights = name.replace("indices", "weights")
        recorded[weights], recorded[name] = in_order_of_experts(recorded[weights], recorded[name])
    return Comparison(recorded, replay.run())


def test_the_target_gives_the_recorded_logits(comparison: Comparison) -> None:
    comparison.assert_equal("target_logits_last", "committed_target_logits", "next_anchor")


def test_the_target_gives_the_recorded_features(comparison: Comparison) -> None:
    comparison.assert_equal("main_hidden")


def test_projected_features_equal_the_recorded_ones(comparison: Comparison) -> None:
    comparison.assert_equal("main_x")


def test_rings_of_context_keys_equal_the_recorded_ones(comparison: Comparison) -> None:
    comparison.assert_equal(".ring")


def test_stages_choose_the_recorded_experts(comparison: Comparison) -> None:
    comparison.assert_equal("gate_indices", "gate_weights")


def test_stages_give_the_recorded_streams(comparison: Comparison) -> None:
    comparison.assert_equal("ffn_norm_out", "ffn_out", ".out")


def test_blocks_give_the_recorded_hidden_states_and_base_logits(comparison: Comparison) -> None:
    comparison.assert_equal("head_hidden", "base_logits")


def test_greedy_drafts_are_the_recorded_tokens(comparison: Comparison) -> None:
    comparison.assert_equal("greedy_output_ids")


def test_logits_with_the_markov_bias_equal_the_recorded_ones(comparison: Comparison) -> None:
    comparison.assert_equal("corrected_logits")


def test_confidences_equal_the_recorded_ones(comparison: Comparison) -> None:
    comparison.assert_equal("confidence_logits", "survival")


def test_every_recorded_tensor_is_compared(comparison: Comparison) -> None:
    left_out = {
        name
        for name in set(comparison.recorded) - set(comparison.computed)
        if not name.endswith((*INPUTS, *NOT_REACHED))
    }
    assert not left_out
    assert set(comparison.computed) <= set(comparison.recorded)
