"""The training loss and its gradients against those of the published training program."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from golden_files import case_files
from safetensors.torch import load_file
from torch import Tensor

from dspark_ray.training.loss import DraftLoss, LossWeights, draft_loss

TOLERANCE = 1e-4  # relative


@dataclass(frozen=True)
class LossCase:
    """Recorded logits of one Markov head, and their losses."""

    name: str
    weights: LossWeights
    tensors: dict[str, Tensor]

    def recorded(self, name: str) -> Tensor:
        return self.tensors[f"out.{name}"]

    def loss(self, weights: LossWeights, draft_logits: Tensor, confidence_logits: Tensor) -> DraftLoss:
        """The loss of all blocks, [2, 5] flattened."""
        blocks = (
            draft_logits,
            self.recorded("aligned_target_logits"),
            confidence_logits,
            self.recorded("target_ids"),
            self.recorded("eval_mask"),
        )
        return draft_loss(*(block.flatten(0, 1) for block in blocks), weights)

    def recorded_loss(self, weights: LossWeights | None = None) -> DraftLoss:
        draft_logits, confidence_logits = self.recorded("draft_logits"), self.recorded("confidence_logits")
        return self.loss(weights or self.weights, draft_logits, confidence_logits)


def cases() -> Iterator[LossCase]:
    for path in case_files("dspark_loss/*.json"):
        facts = json.loads(path.read_text())
        config = facts["config"]
        weights = LossWeights(
            cross_entropy=config["ce_loss_alpha"],
            l1=config["l1_loss_alpha"],
            confidence=config["confidence_head_alpha"],
            decay=config["loss_decay_gamma"],
        )
        for name, case in facts["cases"].items():
            file: Path = path.parent / case["file"]
            if file.exists():
                yield LossCase(name, weights, load_file(file))


@pytest.fixture(params=list(cases()), ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> LossCase:
    return request.param


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.view(actual.shape), rtol=TOLERANCE, atol=1e-7)


def test_the_total_equals_the_recorded_one(case: LossCase) -> None:
    close(case.recorded_loss().total, case.tensors["loss.total"])


def test_the_total_without_decay_equals_the_recorded_one(case: LossCase) -> None:
    weights = LossWeights(case.weights.cross_entropy, case.weights.l1, case.weights.confidence, decay=None)
    close(case.recorded_loss(weights).total, case.tensors["loss.total_without_decay"])


def test_the_parts_equal_the_recorded_ones(case: LossCase) -> None:
    loss = case.recorded_loss()
    close(loss.cross_entropy_sum, case.tensors["loss.ce_loss_num"])
    close(loss.l1_sum, case.tensors["loss.l1_loss_num"])
    close(loss.confidence_sum, case.tensors["loss.confidence_loss_num"])
    for part in ("ce", "l1", "confidence"):
        close(loss.weight_sum, case.tensors[f"loss.{part}_loss_den"])


def test_accept_rates_equal_the_recorded_ones_where_positions_count(case: LossCase) -> None:
    counts = case.recorded("eval_mask")
    close(case.recorded_loss().accept_rate[counts.flatten(0, 1)], case.recorded("accept_rate")[counts])


def test_the_gradient_of_the_markov_output_equals_the_recorded_one(case: LossCase) -> None:
    if case.name != "vanilla":
        pytest.skip("only the vanilla bias is linear in W2 and the previous token alone")
    logits = case.recorded("draft_logits").requires_grad_()
    case.loss(case.weights, logits, case.recorded("confidence_logits")).total.backward()
    anchors = case.tensors["in.input_ids"].gather(1, case.recorded("anchor_positions"))
    labels = case.recorded("target_ids")
    previous = torch.cat((anchors.unsqueeze(-1), labels[..., :-1]), dim=-1)
    embeddings = case.tensors["draft.markov_head.markov_w1.weight"][previous]
    assert logits.grad is not None
    gradient = torch.einsum("bakv,bakr->vr", logits.grad, embeddings)
    close(gradient, case.tensors["grad.markov_head.markov_w2.weight"])


def test_the_gradient_of_the_confidence_bias_equals_the_recorded_one(case: LossCase) -> None:
    confidence_logits = case.recorded("confidence_logits").requires_grad_()
    case.loss(case.weights, case.recorded("draft_logits"), confidence_logits).total.backward()
    assert confidence_logits.grad is not None
    close(confidence_logits.grad.sum(), case.tensors["grad.confidence_head.proj.bias"])
