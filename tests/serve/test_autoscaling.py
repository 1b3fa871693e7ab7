"""The autoscaling policy in a YAML file: one replica, two under load, one again; thresholds first, replicas second."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from ray import serve
from ray_application import Application, deploy_yaml, local_ray, running_yaml, wait_until
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
        schedule: {{kind: fixed}}
      health: {{check_period_s: 1, check_timeout_s: 5, graceful_shutdown_timeout_s: 5}}
      load_controller:
        policy: {{kind: load_curve, curve: [[0.2, 0.0], [0.8, 0.5]], slew_per_second: 0.25, smoothing_seconds: 0}}
        # Other processes of the machine must not affect this test.
        signals: {{cpu: null, slowness: null}}
        heartbeat_seconds: 0.25
    deployments:
      - name: Engine
        autoscaling_config:
          min_replicas: 1
          max_replicas: 2
          upscale_delay_s: 1
          downscale_delay_s: 2
          look_back_period_s: 1
          # Serve 2.60 calls this deprecated for an environment variable that it reads before this file.
          metrics_interval_s: 0.25
          policy:
            policy_function: autoscale.policies:SpeculationAwarePolicy
            policy_kwargs: {{target_occupancy: 1.0, overload_occupancy: 50, spend_first: 0.9, release_below: 0.2}}
"""

LINE = re.compile(r"^\w+ (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .* -- (.*)$")


@pytest.fixture(scope="module")
def session() -> Iterator[Path]:
    """Where the cluster of this module keeps its logs."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory, local_ray(directory, 4):
        yield Path(directory, "session_latest")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def app(session: Path, checkpoint: Path) -> Iterator[Application]:
    with running_yaml(yaml.safe_load(CONFIG.format(checkpoint=checkpoint))) as application:
        yield application


def num_replicas() -> int:
    states = serve.status().applications["app"].deployments["Engine"].replica_states
    return states.get("RUNNING", 0)


def log_lines(session: Path, *words: str) -> list[tuple[str, str]]:
    """(time, text) of Serve's log lines with all of these words, in order."""
    lines = [
        match.groups()
        for path in (session / "logs" / "serve").glob("*.log")
        for match in map(LINE.match, path.read_text().splitlines())
        if match is not None and all(word in match[2] for word in words)
    ]
    return sorted(lines)


def test_thresholds_rise_first_then_a_replica_comes_and_goes(app, session):
    assert num_replicas() == 1
    is_enough = threading.Event()

    def keep_asking() -> int:
        num_answers = 0
        while not is_enough.is_set():
            answer = app.complete("more", max_tokens=160, extra_body={"ignore_eos": True})
            assert answer.usage.completion_tokens == 160
            num_answers += 1
        return num_answers

    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(keep_asking) for _ in range(6)]
        try:
            wait_until(lambda: num_replicas() == 2, 120)
        finally:
            is_enough.set()
        assert all(answer.result() > 0 for answer in answers)
    wait_until(lambda: num_replicas() == 1, 120)

    first_rise = log_lines(session, "policy", "threshold 0.000 -> 0.")[0]
    held = log_lines(session, "app#Engine: 1 replicas recommended", "hold: thresholds rise first")[0]
    added = log_lines(session, "app#Engine: ", "scale up: thresholds have risen")[0]
    removed = log_lines(session, "app#Engine: ", "scale down: thresholds are low")
    idle = log_lines(session, "app#Engine: 0 replicas recommended", "idle: no request runs or waits")
    assert first_rise < added
    assert held < added
    assert max(removed + idle) > added


def test_with_nobody_there_the_last_replica_goes_and_a_request_brings_it_back(app, checkpoint):
    config = yaml.safe_load(CONFIG.format(checkpoint=checkpoint))
    config["applications"][0]["deployments"][0]["autoscaling_config"] |= {"min_replicas": 0}
    deploy_yaml(config)
    wait_until(lambda: num_replicas() == 0, 120)
    assert httpx.get(f"{app.client.base_url}../ready", timeout=30).status_code == 200
    assert app.complete("again", max_tokens=8, extra_body={"ignore_eos": True}).usage.completion_tokens == 8
    assert num_replicas() == 1


def test_invalid_kwargs_end_the_deployment_with_a_message(app, checkpoint):
    config = yaml.safe_load(CONFIG.format(checkpoint=checkpoint))
    (bad,) = config["applications"]
    bad |= {"name": "bad", "route_prefix": "/bad"}
    bad["deployments"][0]["autoscaling_config"]["policy"]["policy_kwargs"]["spend_first"] = 1.5
    deploy_yaml(config)
    wait_until(lambda: serve.status().applications["bad"].status == "DEPLOY_FAILED", 120)
    message = serve.status().applications["bad"].deployments["Engine"].message
    assert "policy_kwargs.spend_first=1.5: expected less than or equal to 1" in message
