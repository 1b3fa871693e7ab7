"""Markov and confidence heads against the published evaluator, given the hidden states it recorded.

That drafter keeps its confidence head on the hidden state after the final norm and gives it a bias.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TypeVar

import pytest
import torch
from golden_files import GoldenCase, case_files, case_name
from torch import Tensor, nn

from dspark_ray.drafters.dspark import BlockOutput, Choose, Draft, DSparkModule, follow_path, greedy
from dspark_ray.drafters.heads import ConfidenceHead, RNNMarkovHead, build_markov_head

TOLERANCE = 1e-4
Module = TypeVar("Module", bound=nn.Module)


class Heads:
    """The heads of one case, run by the loop of the drafter they would be part of."""

    def __init__(self, case: GoldenCase) -> None:
        self.case = case
        config = case.facts["draft_config"]
        vocab_size, hidden_size = case.tensors["target.lm_head.weight"].shape
        rank = config["markov_rank"]
        self.markov_head = filled(
            build_markov_head(config["markov_head_type"], vocab_size, rank, hidden_size),
            case.group("draft.markov_head."),
        )
        self.confidence_head = filled(
            ConfidenceHead(hidden_size, rank, bias=True), case.group("draft.confidence_head.")
        )
        self.stages = [SimpleNamespace(markov_head=self.markov_head, confidence_head=self.confidence_head)]
        self.gamma = config["block_size"]

    @torch.no_grad()
    def draft(self, recorded: dict[str, Tensor], choose: Choose) -> Draft:
        """Draft on from the recorded block of a round."""
        block = BlockOutput(hidden=recorded["block_hidden"], base_logits=recorded["base_logits"])
        return DSparkModule.run_heads(self, block, recorded["draft_input_ids"][:, 0], choose)  # type: ignore[arg-type]


def filled(module: Module, tensors: dict[str, Tensor]) -> Module:
    """`module` with exactly these weights."""
    module.load_state_dict(tensors)
    return module


@pytest.fixture(scope="module", params=case_files("qwen3_dspark_*/golden.json"), ids=case_name)
def heads(request: pytest.FixtureRequest) -> Heads:
    return Heads(GoldenCase.load(request.param))


def rounds(heads: Heads) -> list[dict[str, Tensor]]:
    return [heads.case.group(f"round{number}.") for number in range(heads.case.num_rounds)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def test_greedy_drafts_are_the_recorded_tokens(heads: Heads) -> None:
    for recorded in rounds(heads):
        assert heads.draft(recorded, greedy).tokens.tolist() == recorded["greedy_tokens"].tolist()


def test_logits_and_confidences_of_greedy_drafts_equal_the_recorded_ones(heads: Heads) -> None:
    for recorded in rounds(heads):
        draft = heads.draft(recorded, greedy)
        close(draft.logits, recorded["greedy_corrected_logits"])
        close(draft.confidence_logits, recorded["confidence_logits"])


def test_logits_and_confidences_along_a_given_path_equal_the_recorded_ones(heads: Heads) -> None:
    for recorded in rounds(heads):
        draft = heads.draft(recorded, follow_path(recorded["fixed_path.tokens"]))
        close(draft.logits, recorded["fixed_path.corrected_logits"])
        close(draft.confidence_logits, recorded["fixed_path.confidence_logits"])


def test_a_recurrent_head_follows_its_published_recurrence() -> None:
    """No golden case records this head's hidden states, so the formulas are written out here once more."""
    vocab_size, rank, width, gamma = 11, 3, 4, 5
    torch.manual_seed(0)
    head = RNNMarkovHead(vocab_size, rank, width)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    hidden, tokens = torch.randn(gamma, width), [3, 8, 0, 8, 2]
    weight, bias = head.joint_proj.weight, head.joint_proj.bias
    s, state = torch.zeros(rank), head.initial_state(1, hidden)
    for h, token in zip(hidden, tokens, strict=True):
        e = head.markov_w1.weight[token]
        z = weight @ torch.cat((s, e, h)) + bias
        keep = torch.sigmoid(z[:rank])
        s = keep * s + (1 - keep) * torch.tanh(z[rank : 2 * rank])
        expected = head.markov_w2.weight @ torch.tanh(z[2 * rank :])
        actual, state = head.step(head.embed(torch.tensor([token])), h.unsqueeze(0), state)
        torch.testing.assert_close(actual[0], expected, atol=1e-6, rtol=1e-5)
