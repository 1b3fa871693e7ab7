"""The whole application on a random model: Ingress, replica, two verifier ranks and a drafter as Ray actors."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from byte_tokenizer import BOS
from ray import serve
from ray_application import (
    Application,
    deploy,
    live_actors,
    local_ray,
    num_placement_groups,
    running_application,
    wait_until,
)
from small_checkpoint import COST_TABLE, ENGINE, save_small_checkpoint, tokens_in_process

from dspark_ray.text.tokenizer import Tokenizer

pytestmark = pytest.mark.ray

WORKERS = ("VerifierWorker", "DrafterWorker")
PROMPT = "def main(arguments):"


def gang_args(checkpoint: Path, **fields: object) -> dict[str, object]:
    return {
        "model": str(checkpoint),
        "tensor_parallel_size": 2,
        "engine": ENGINE,
        # Not in the user's home folder.
        "dspark": {"cost_table": {"path": str(checkpoint / COST_TABLE)}},
        "placement": {"verifier": {"resources": {"CPU": 0.5}}, "drafter": {"resources": {"CPU": 0.5}}},
        "health": {"check_period_s": 1, "check_timeout_s": 5, "graceful_shutdown_timeout_s": 2},
        **fields,
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory, local_ray(directory, 4):
        yield


@pytest.fixture(scope="module")
def app(cluster: None, checkpoint: Path) -> Iterator[Application]:
    with running_application(gang_args(checkpoint)) as application:
        yield application


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> str:
    """A sampled text from one process without speculation."""
    tokenizer = Tokenizer.from_directory(checkpoint)
    prompt = [BOS, *tokenizer.encode(PROMPT)]
    return tokenizer.decode(tokens_in_process(checkpoint, prompt, max_tokens=40, seed=7, ignore_eos=True))


def sampled(app: Application, **options: object) -> openai.types.Completion:
    return app.complete(PROMPT, max_tokens=40, seed=7, extra_body={"ignore_eos": True}, **options)


def test_the_text_is_that_of_one_process_without_speculation(app, reference):
    assert sampled(app).choices[0].text == reference


def test_a_stream_says_the_same(app, reference):
    chunks = list(sampled(app, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == reference
    assert chunks[-1].usage.completion_tokens == 40


def test_speculation_took_place(app):
    metrics = sampled(app).metrics["speculative_decoding"]
    assert metrics["num_spec_tokens"] == 5
    assert metrics["num_draft_tokens"] > 0
    assert sum(metrics["acceptance_histogram"]) == metrics["num_spec_steps"]


def latest_steps(app: Application, last: int) -> list[dict[str, Any]]:
    answer = httpx.get(f"{app.client.base_url}../admin/steps", params={"last": last}, timeout=30)
    return answer.raise_for_status().json()["steps"]


def load(app: Application) -> dict[str, Any]:
    return httpx.get(f"{app.client.base_url}../admin/load", timeout=30).raise_for_status().json()


def test_the_steps_add_up_to_what_the_request_says(app):
    before = latest_steps(app, 1)[0]["step"]
    metrics = sampled(app).metrics["speculative_decoding"]
    steps = [step for step in latest_steps(app, 1000) if step["step"] > before]
    assert sum(step["budget"] for step in steps) == metrics["num_admitted_draft_tokens"]
    assert sum(step["num_accepted"] for step in steps) == metrics["num_accepted_draft_tokens"]
    assert sum(step["num_decoding"] for step in steps) == metrics["num_spec_steps"]
    assert all(step["predicted_target_seconds"] > 0 for step in steps)


def test_the_controller_sees_the_node_and_the_replica(app):
    wait_until(lambda: len(load(app)["replicas"]) == 1)
    wait_until(lambda: len(load(app)["nodes"]) == 1)
    view = load(app)
    assert view["policy"] == "fixed"
    assert view["nodes"][0]["devices"][0]["kind"] in ("cpu", "gpu")
    assert len(view["replicas"][0]["sample"]["places"]) == 1  # three actors on one node
    sampled(app)
    wait_until(lambda: load(app)["replicas"][0]["sample"]["num_steps"] == 0)


def test_an_operators_policy_changes_the_steps_and_not_the_text(app, reference):
    url = f"{app.client.base_url}../admin/policy"
    answer = httpx.post(url, json={"bypass": True, "valid_seconds": 60}, timeout=30).raise_for_status().json()
    assert len(answer["replicas"]) == 1
    try:
        wait_until(lambda: sampled(app).choices[0].text == reference and latest_steps(app, 1)[0]["bypass"] == "policy")
        last = latest_steps(app, 1)[0]
        assert last["num_drafted"] == 0
        assert last["policy_version"] == load(app)["replicas"][0]["version"]
    finally:
        httpx.delete(url, timeout=30).raise_for_status()
    wait_until(lambda: sampled(app).choices[0].text == reference and latest_steps(app, 1)[0]["bypass"] != "policy")


def test_a_chat_is_answered(app):
    messages = [{"role": "user", "content": "hello"}]
    answer = app.client.chat.completions.create(
        model=app.model, messages=messages, max_tokens=8, logprobs=True, top_logprobs=2, temperature=0
    )
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in answer.choices[0].logprobs.content)


def test_choices_differ_and_a_seed_repeats_them(app):
    first, second = (sampled(app, n=2).choices for _ in range(2))
    assert [choice.text for choice in first] == [choice.text for choice in second]
    assert first[0].text != first[1].text


def test_a_stop_string_ends_the_text_before_it(app, reference):
    stop = reference[9:11]
    answer = sampled(app, stop=stop)
    assert answer.choices[0].text == reference[: reference.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_the_engine_refuses_what_only_it_can_know(app):
    with pytest.raises(openai.BadRequestError) as caught:
        app.complete([100_000])
    assert caught.value.param == "prompt"


def test_sixteen_clients_are_served_at_once(app, reference):
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: sampled(app).choices[0].text, range(16)))
    assert answers == [reference] * 16


def test_health_and_models_answer(app):
    assert httpx.get(f"{app.client.base_url}../ready", timeout=30).status_code == 200
    assert [model.id for model in app.client.models.list()] == ["small"]


def test_a_client_that_leaves_frees_its_sequences(app):
    # The engine has eight slots: if earlier sequences were not freed, one of these would wait for thousands of rounds.
    endless = {"ignore_eos": True, "speculative": {"enabled": False}}
    for _ in range(20):
        with app.complete(PROMPT, max_tokens=8000, stream=True, timeout=20, extra_body=endless) as stream:
            assert next(iter(stream)).choices


def test_a_killed_drafter_costs_the_gang_but_not_the_stream(app, reference):
    whole = app.complete(PROMPT, max_tokens=300, seed=7, extra_body={"ignore_eos": True}).choices[0].text
    assert whole.startswith(reference[:20])
    before = {actor.actor_id for actor in live_actors(*WORKERS)}
    stream = app.complete(PROMPT, max_tokens=300, seed=7, stream=True, extra_body={"ignore_eos": True})
    text = next(stream).choices[0].text
    os.kill(live_actors("DrafterWorker")[-1].pid, signal.SIGKILL)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole
    after = {actor.actor_id for actor in live_actors(*WORKERS)}
    assert len(after) == 3
    assert not after & before


def test_the_gang_owns_one_placement_group(app):
    wait_until(lambda: num_placement_groups() == 1)
    assert len(live_actors("VerifierWorker")) == 2
    assert len(live_actors("DrafterWorker")) == 1


def test_a_bad_checkpoint_is_named_in_the_status(app, tmp_path):
    with pytest.raises(RuntimeError, match="no such file; expected a checkpoint folder"):
        deploy("bad", gang_args(tmp_path / "nowhere"), route_prefix="/bad")
    serve.delete("bad")


def test_nothing_is_left_behind(cluster, app):
    # Last in this file: it takes the application down.
    serve.delete(app.name)
    wait_until(lambda: num_placement_groups() == 0)
    wait_until(lambda: not live_actors(*WORKERS))
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
