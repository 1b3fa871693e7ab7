"""Placement of a gang's actors by a YAML file, on a cluster of three nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml
from byte_tokenizer import BOS
from nodes import node, running_cluster
from ray_application import live_actors, num_placement_groups, running_application, wait_until
from small_checkpoint import save_small_checkpoint, tokens_in_process

from dspark_ray.text.tokenizer import Tokenizer

pytestmark = pytest.mark.ray

PROMPT = "three nodes, one text"

ARGS = """
model: {checkpoint}
tensor_parallel_size: 2
engine: {{max_num_seqs: 8, max_num_batched_tokens: 128, max_model_len: 1024, page_size: 32}}
dspark: {{drafter: {{placement: actor}}, cost_table: {{path: {checkpoint}/cost_table.json}}}}
placement:
  strategy: PACK
  verifier:
    - {{resources: {{CPU: 0.5, first: 1}}}}
    - {{resources: {{CPU: 0.5, second: 1}}}}
  drafter: {{resources: {{CPU: 0.5}}, labels: {{role: drafts}}}}
health: {{graceful_shutdown_timeout_s: 2}}
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, str]]:
    """Node ids by their role; the head serves HTTP and has no room for other actors."""
    with running_cluster(resources={"first": 1}, num_cpus=2) as cluster:
        second = cluster.add_node(**node(resources={"second": 1})).node_id
        third = cluster.add_node(**node(labels={"role": "drafts"})).node_id
        yield {"first": cluster.head_node.node_id, "second": second, "drafts": third}


def test_ranks_and_drafter_on_three_nodes_say_what_one_process_says(nodes, tmp_path):
    checkpoint = save_small_checkpoint(tmp_path)
    tokenizer = Tokenizer.from_directory(checkpoint)
    prompt = [BOS, *tokenizer.encode(PROMPT)]
    expected = tokenizer.decode(tokens_in_process(checkpoint, prompt, max_tokens=60, seed=3, ignore_eos=True))
    with running_application(yaml.safe_load(ARGS.format(checkpoint=checkpoint))) as app:
        verifiers = sorted(actor.node_id for actor in live_actors("VerifierWorker"))
        assert verifiers == sorted([nodes["first"], nodes["second"]])
        assert [actor.node_id for actor in live_actors("DrafterWorker")] == [nodes["drafts"]]
        answer = app.complete(PROMPT, max_tokens=60, seed=3, extra_body={"ignore_eos": True})
        assert answer.choices[0].text == expected
        assert answer.metrics["speculative_decoding"]["num_accepted_draft_tokens"] > 0
    wait_until(lambda: num_placement_groups() == 0)
