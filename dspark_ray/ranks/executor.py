"""Forwards on all ranks: rank 0 sends a command, all ranks run it, and rank 0 gets the result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspark_ray.cache.tensors import CacheTensors
from dspark_ray.drafters.dspark import FeatureProjector
from dspark_ray.engine.target import ForwardCommand, ForwardResult
from dspark_ray.model.deepseek_v4 import DeepSeekV4, TargetOutput
from dspark_ray.model.rows import Segment, build_rows
from dspark_ray.ranks.channel import Broadcast
from dspark_ray.runner.decode import TargetGraphs
from dspark_ray.sampling.sampler import Sampler


class TargetRank:
    """Model, cache and sampler of one rank."""

    def __init__(
        self,
        model: DeepSeekV4,
        cache: CacheTensors,
        projector: FeatureProjector | None,
        graphs: TargetGraphs | None = None,
    ) -> None:
        """`graphs`, of the same model and cache, replay the steps that fit them."""
        self.model, self.cache, self._project, self._graphs = model, cache, projector, graphs
        self._sampler = Sampler(model.group, model.first_token, model.config.vocab_size)

    @torch.inference_mode()
    def run(self, command: ForwardCommand) -> ForwardResult | None:
        """Forward and sample; the result is None on all ranks but 0."""
        device = self.model.norm.weight.device
        output = self._forward(command.segments)
        sampled = torch.from_numpy(command.sampled_rows).to(device)
        samples = self._sampler.sample(self.model.logits(output.hidden[sampled]), command.sampling)
        if samples is None:
            return None
        return ForwardResult(samples, output.context_features if command.wants_context_features else None)

    def _forward(self, segments: tuple[Segment, ...]) -> TargetOutput:
        if self._graphs is not None and self._graphs.fits(segments):
            return self._graphs.run(segments)
        return self.model(build_rows(segments, self.cache.shape, self.model.norm.weight.device), self.cache)

    @torch.inference_mode()
    def record_graphs(self) -> None:
        """Record all decode steps. Call it on all ranks together, because all-reduces are recorded too."""
        if self._graphs is not None:
            self._graphs.record_all()

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """Row counts to which decode steps are padded; empty without graphs."""
        return self._graphs.sizes if self._graphs is not None else ()

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        """Context features [n, T*d] projected to [n, d], on the CPU; on rank 0 only."""
        assert self._project is not None, "the model has no drafter, or this is not rank 0"
        return self._project(features).cpu()


class LocalTarget:
    """A target of one rank."""

    def __init__(self, rank: TargetRank) -> None:
        self._rank = rank

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        return self._rank.graph_sizes

    def run(self, command: ForwardCommand) -> ForwardResult:
        result = self._rank.run(command)
        assert result is not None
        return result

    def project(self, features: Tensor) -> Tensor:
        return self._rank.project(features)

    def start(self) -> None:
        """Nothing to do: there is no other rank."""

    def keep_alive(self) -> None:
        """Nothing to do: there is no other rank."""

    def close(self) -> None:
        """Nothing to do: there is no other rank."""


class LeadingTarget(LocalTarget):
    """Rank 0 of several; sends every command to the others first."""

    def __init__(self, rank: TargetRank, channel: Broadcast) -> None:
        super().__init__(rank)
        self._channel = channel

    def run(self, command: ForwardCommand) -> ForwardResult:
        self._channel.send(command)
        return super().run(command)

    def start(self) -> None:
        """Tell the others that serving starts: from now on long silence means that rank 0 is dead."""
        self._channel.send(_START)

    def keep_alive(self) -> None:
        self._channel.send(_KEEP_ALIVE)

    def close(self) -> None:
        self._channel.send(_CLOSE)


class Follower:
    """A rank other than 0; runs the commands of rank 0."""

    def __init__(self, rank: TargetRank, channel: Broadcast, on_start: Callable[[], None]) -> None:
        """`on_start` is called when rank 0 begins to serve."""
        self._rank, self._channel, self._on_start = rank, channel, on_start

    def run(self) -> None:
        """Run until rank 0 closes; raises when rank 0 has died or is silent beyond the gang's timeout."""
        while (message := self._channel.receive()) != _CLOSE:
            if message == _START:
                self._on_start()
            elif message != _KEEP_ALIVE:
                self._rank.run(message)


_START, _KEEP_ALIVE, _CLOSE = "start", "keep alive", "close"
