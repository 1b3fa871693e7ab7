"""The DSpark module of the official checkpoints (`mtp.*`): stages over one block, then a left-to-right loop.

    [anchor, noise x (G-1)] -> stages, which also see W context keys -> hidden h_k, base logits U_k
    for k: logits_k = U_k + Markov(token_{k-1});  token_k ~ logits_k;
           confidence_k = sigmoid(w . [h_k; W1[token_{k-1}]])

Formulas: docs/dspark.md, Drafter. Letters: R requests, G gamma, W window, T tapped layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dspark_kernels as ops
from dspark_kernels.philox import STREAM_SAMPLE
from dspark_ray.config import ModelConfig
from dspark_ray.drafters.heads import ConfidenceHead, MarkovHead, build_markov_head
from dspark_ray.model.layers import Attention, DecoderLayer, Weight, empty
from dspark_ray.model.parallel import ParallelGroup
from dspark_ray.model.rope import Angles, Rope
from dspark_ray.model.rows import PoolIndex


class Stage(DecoderLayer):
    """One draft stage; the first also projects context features, the last holds the heads."""

    def __init__(self, config: ModelConfig, number: int) -> None:
        super().__init__(config, config.num_hidden_layers + number, ParallelGroup())
        dspark = config.dspark
        assert dspark is not None
        d, m = config.hidden_size, config.hc_mult
        if number == 0:
            self.main_proj = Weight(d, d * len(dspark.target_layer_ids))
            self.main_norm = Weight(d)
        if number == dspark.num_stages - 1:
            self.norm = Weight(d)
            self.hc_head_fn = empty(m, m * d, dtype=torch.float32)
            self.hc_head_base = empty(m, dtype=torch.float32)
            self.hc_head_scale = empty(1, dtype=torch.float32)
            self.markov_head = build_markov_head(dspark.markov_head_type, config.vocab_size, dspark.markov_rank, d)
            self.confidence_head = ConfidenceHead(d, dspark.markov_rank)


def project_features(features: Tensor, main_proj: Weight, main_norm: Weight, eps: float) -> Tensor:
    """Context features [N, T*d] projected to [N, d] (docs/dspark.md, Draft context)."""
    return ops.rms_norm(main_proj(features), main_norm.weight, eps)


class FeatureProjector(nn.Module):
    """main_proj and main_norm, the drafter's part on the verifier, which so sends d numbers per token instead of T*d.

    Tensors have the names of the checkpoint.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.dspark is not None
        self.config = config
        width = config.hidden_size * len(config.dspark.target_layer_ids)
        parts = {"main_proj": Weight(config.hidden_size, width), "main_norm": Weight(config.hidden_size)}
        self.mtp = nn.ModuleList([nn.ModuleDict(parts)])

    def forward(self, features: Tensor) -> Tensor:
        """Context features [N, T*d] projected to [N, d]."""
        main_proj, main_norm = (self.get_submodule(f"mtp.0.{name}") for name in ("main_proj", "main_norm"))
        assert isinstance(main_proj, Weight)
        assert isinstance(main_norm, Weight)
        return project_features(features, main_proj, main_norm, self.config.rms_norm_eps)


@dataclass(frozen=True)
class BlockOutput:
    """Results of the stages for R blocks, before the left-to-right loop."""

    hidden: Tensor
    """[R, G, d] before the final norm, the input of the confidence head."""
    base_logits: Tensor
    """[R, G, V] float32."""


@dataclass(frozen=True)
class Draft:
    """Results of the left-to-right loop: a token and a confidence logit per position."""

    tokens: Tensor
    """[R, G]"""
    logits: Tensor
    """[R, G, V] float32, Markov bias included."""
    confidence_logits: Tensor
    """[R, G] float32, before calibration and sigmoid."""


Choose = Callable[[int, Tensor], Tensor]
"""(position k of the block, logits [R, V]) -> token ids [R]."""

Filters = tuple[Tensor, Tensor, Tensor, int]
"""top_k, top_p, min_p [R] and the widest top_k: arguments of `dspark_kernels.filter_threshold`."""

KeysOf = Callable[[int, Tensor, Angles], tuple[Tensor, Tensor]]
"""(stage, normed rows [R*G, d], angles) -> keys [P, D] and, per request, the index [R, W + G] of keys it sees."""


class DSparkModule(nn.Module):
    """Stages and heads. `embed` and `head` [V, d] are the target's and not in the module's state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.dspark is None:
            raise ValueError("the checkpoint has no DSpark module: config.json lacks dspark_block_size")
        self.config, self.gamma = config, config.dspark.gamma
        self.noise_token_id = config.dspark.noise_token_id
        self.mtp = nn.ModuleList(Stage(config, number) for number in range(config.dspark.num_stages))
        self._rope: Rope | None = None
        self._shared: tuple[Tensor, Tensor] | None = None

    @property
    def stages(self) -> Sequence[Stage]:
        """The draft stages in order."""
        return list(self.mtp)  # type: ignore[arg-type]

    @property
    def rope(self) -> Rope:
        """Frequency tables on the weights' device."""
        if self._rope is None:
            self._rope = Rope(self.config, self.stages[0].main_norm.weight.device)
        return self._rope

    def share(self, embed: Tensor, head: Tensor) -> None:
        """Use the target's embedding and LM head, [V, d] each, which a tuple keeps out of the state."""
        self._shared = (embed, head)

    def project(self, features: Tensor) -> Tensor:
        """Context features [N, T*d] projected to [N, d]; when serving, the verifier's FeatureProjector does it."""
        first = self.stages[0]
        return project_features(features, first.main_proj, first.main_norm, self.config.rms_norm_eps)

    def context_keys(self, projected: Tensor, positions: Tensor) -> list[Tensor]:
        """Per stage the context keys [N, D] of committed tokens at `positions`, without the stages' norms and mHC."""
        angles = self.rope.angles(positions, compressed=False)
        return [stage.attn.keys(projected, angles) for stage in self.stages]

    def store_context(
        self, projected: Tensor, positions: Tensor, pools: Sequence[Tensor], slot_mapping: Tensor
    ) -> None:
        """Write `context_keys` into rows slot_mapping [N] of the stages' pools."""
        angles = self.rope.angles(positions, compressed=False)
        for stage, pool in zip(self.stages, pools, strict=True):
            stage.attn.store_keys(projected, angles, pool, slot_mapping)

    def block(self, anchors: Tensor, starts: Tensor, context: Sequence[Tensor], visible: Tensor) -> BlockOutput:
        """Run the stages over the blocks of R requests without a cache: the differentiable form, for training.

        anchors [R] are token ids at positions starts [R]; context [R, W, D] per stage are keys where visible [R, W].
        Every position of a block sees the same context and the whole block.
        """
        shown = torch.cat((visible, visible.new_ones(len(visible), self.gamma)), dim=1)
        flat = torch.arange(shown.numel(), device=visible.device).view_as(shown)
        index = torch.where(shown, flat, -1)  # [R, W + G] into the flattened keys

        def keys_of(stage: int, hidden: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
            own = self.stages[stage].attn.keys(hidden, angles).unflatten(0, (-1, self.gamma))
            return torch.cat((context[stage].to(own.dtype), own), dim=1).flatten(0, 1), index

        return self._run(anchors, starts, keys_of)

    def cached_block(self, anchors: Tensor, starts: Tensor, pools: Sequence[Tensor], index: PoolIndex) -> BlockOutput:
        """As `block`, with the context in pools [P, D], one per stage: the form for serving.

        `index` has the pool rows of the R*G block rows and the keys [R, W + G] that each request sees.
        """

        def keys_of(stage: int, hidden: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
            self.stages[stage].attn.store_keys(hidden, angles, pools[stage], index.slot_mapping)
            return pools[stage], index.keys

        return self._run(anchors, starts, keys_of)

    def _run(self, anchors: Tensor, starts: Tensor, keys_of: KeysOf) -> BlockOutput:
        assert self._shared is not None, "call share() first"
        embed, head = self._shared
        num_requests, gamma, config = len(anchors), self.gamma, self.config
        noise = anchors.new_full((num_requests, gamma - 1), self.noise_token_id)
        token_ids = torch.cat((anchors.unsqueeze(1), noise), dim=1).flatten()
        positions = (starts.unsqueeze(1) + torch.arange(gamma, device=starts.device)).flatten()
        angles = self.rope.angles(positions, compressed=False)
        streams = embed[token_ids].unsqueeze(1).repeat(1, config.hc_mult, 1)
        for number, stage in enumerate(self.stages):

            def attend(hidden: Tensor, number: int = number, attention: Attention = stage.attn) -> Tensor:
                query = attention.query(attention.q_latent(hidden), angles)
                keys, index = keys_of(number, hidden, angles)
                # The G queries of a request see the same keys, so they are passed as G times as many heads.
                values = ops.sparse_attention(
                    query.unflatten(0, (num_requests, gamma)).flatten(1, 2),
                    keys,
                    index,
                    None,
                    None,
                    attention.attn_sink.repeat(gamma),
                    config.head_dim**-0.5,
                )
                values = values.unflatten(1, (gamma, -1)).flatten(0, 1)
                return attention.output(ops.rope(values, angles.cos, angles.sin, inverse=True))

            streams = stage(streams, token_ids, attend)
        last = self.stages[-1]
        hidden = ops.mhc_head(
            streams,
            last.hc_head_fn,
            last.hc_head_base,
            last.hc_head_scale,
            config.hc_eps,
            config.rms_norm_eps,
        )
        logits = ops.linear_float32(ops.rms_norm(hidden, last.norm.weight, config.rms_norm_eps), head)
        return BlockOutput(*(x.unflatten(0, (num_requests, gamma)) for x in (hidden, logits)))

    @property
    def is_vanilla(self) -> bool:
        """Whether the Markov bias depends on the previous token only, so that `sample` can be used."""
        return type(self.stages[-1].markov_head) is MarkovHead

    def sample(
        self,
        block: BlockOutput,
        anchors: Tensor,
        starts: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        num_positions: int,
        filters: Filters | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(tokens [R, G], confidence logits [R, G]) of the first G positions, with the noise of coupled verification.

        Equals `run_heads` with a coupled `DraftChooser`, in one operation.
        """
        last = self.stages[-1]
        assert isinstance(last.markov_head, MarkovHead)
        w1, w2 = last.markov_head.markov_w1.weight, last.markov_head.markov_w2.weight
        logits = block.base_logits[:, :num_positions]
        tokens, _ = ops.markov_sample(logits, anchors, w1, w2, temperatures, seeds, starts + 1, STREAM_SAMPLE, filters)
        previous = torch.cat((anchors.unsqueeze(1), tokens[:, :-1]), dim=1)
        return tokens, last.confidence_head(block.hidden[:, :num_positions], w1[previous])

    def run_heads(self, block: BlockOutput, anchors: Tensor, choose: Choose, num_positions: int | None = None) -> Draft:
        """The left-to-right loop over `num_positions`, or the whole block: bias, confidence, choice."""
        last = self.stages[-1]
        markov, previous = last.markov_head, anchors
        state = markov.initial_state(len(anchors), block.hidden)
        tokens, logits, confidences = [], [], []
        for k in range(self.gamma if num_positions is None else num_positions):
            embedding = markov.embed(previous)
            bias, state = markov.step(embedding, block.hidden[:, k], state)
            step_logits = block.base_logits[:, k] + bias
            confidences.append(last.confidence_head(block.hidden[:, k], embedding))
            previous = choose(k, step_logits)
            tokens.append(previous)
            logits.append(step_logits)
        return Draft(torch.stack(tokens, 1), torch.stack(logits, 1), torch.stack(confidences, 1))


def greedy(k: int, logits: Tensor) -> Tensor:
    """A `Choose` that takes the most probable token."""
    return logits.argmax(-1)


def follow_path(path: Tensor) -> Choose:
    """A `Choose` that takes the given tokens [R, G]: teacher forcing, recorded paths."""
    return lambda k, logits: path[:, k]
