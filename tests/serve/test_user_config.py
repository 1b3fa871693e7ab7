"""`serve deploy` changes thresholds, presets and policies of a running application without a restart."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from ray import serve
from ray_application import Actor, Application, deploy_yaml, live_actors, local_ray, running_yaml, wait_until
from small_checkpoint import save_small_checkpoint

pytestmark = pytest.mark.ray

CONFIG = """
applications:
  - name: app
    import_path: deployments.app:build
    route_prefix: /
    args:
      model: {checkpoint}
      served_model_name: small
      engine: {{max_num_seqs: 2, max_num_batched_tokens: 128, max_model_len: 8192, page_size: 32}}
      dspark:
        drafter: {{placement: inline}}
        confidence: {{threshold: 0.05}}
        cost_table: {{path: {checkpoint}/cost_table.json}}
      health: {{check_period_s: 1, check_timeout_s: 5, graceful_shutdown_timeout_s: 5}}
    deployments:
      - name: Engine
        num_replicas: 1
      - name: LoadController
        user_config: {{policy: {{threshold: 0.1}}, heartbeat_seconds: 0.2}}
"""
NUM_TOKENS = 1200


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    checkpoint = save_small_checkpoint(tmp_path_factory.mktemp("small"))
    return yaml.safe_load(CONFIG.format(checkpoint=checkpoint))


@pytest.fixture(scope="module")
def app(config: dict[str, Any]) -> Iterator[Application]:
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory,
        local_ray(directory, 4),
        running_yaml(config) as application,
    ):
        yield application


def replicas() -> set[Actor]:
    return {
        actor for name in ("Engine", "Ingress", "LoadController") for actor in live_actors(f"ServeReplica:app:{name}")
    }


def load(app: Application) -> dict[str, Any]:
    return httpx.get(f"{app.client.base_url}../admin/load", timeout=30).raise_for_status().json()


def threshold(app: Application) -> float | None:
    found = load(app)["replicas"]
    return found[0]["bounds"]["confidence_threshold"] if found else None


def deploy_with(config: dict[str, Any], user_config: dict[str, Any] | None) -> None:
    (application,) = config["applications"]
    engine, controller = application["deployments"]
    changed = {**controller, "user_config": user_config}
    deploy_yaml({"applications": [{**application, "deployments": [engine, changed]}]})


def test_a_threshold_and_a_preset_are_applied_under_a_stream(app, config):
    wait_until(lambda: threshold(app) == 0.1)
    before = replicas()
    assert len(before) == 3
    events, is_going, is_done = [], threading.Event(), threading.Event()

    def listen() -> None:
        options = {"stream": True, "max_tokens": NUM_TOKENS, "stream_options": {"include_usage": True}}
        for event in app.complete("go on", extra_body={"ignore_eos": True}, **options):
            events.append(event)
            is_going.set()
        is_done.set()

    listening = threading.Thread(target=listen)
    listening.start()
    assert is_going.wait(60)
    deploy_with(config, {"policy": {"threshold": 0.4}, "heartbeat_seconds": 0.2})
    wait_until(lambda: threshold(app) == 0.4)
    deploy_with(config, {"preset": "cost", "heartbeat_seconds": 0.2})
    wait_until(lambda: load(app)["policy"] == "load_curve")
    assert not is_done.is_set(), "the stream ended before anything was changed"
    listening.join(240)
    assert events[-1].usage.completion_tokens == NUM_TOKENS
    assert replicas() == before


def test_a_floor_holds_and_a_bad_value_changes_nothing(app, config):
    before = replicas()
    deploy_with(config, {"heartbeat_seconds": 0.2})
    wait_until(lambda: threshold(app) == 0.05)
    deploy_with(config, {"policy": {"threshold": 1.4}, "heartbeat_seconds": 0.2})
    wait_until(lambda: load(app)["problem"] is not None)
    assert load(app)["problem"] == "LoadController.user_config.policy.threshold=1.4: expected less than or equal to 1"
    assert threshold(app) == 0.05
    deploy_with(config, None)
    wait_until(lambda: load(app)["problem"] is None)
    assert replicas() == before
    assert serve.status().applications["app"].status == "RUNNING"
