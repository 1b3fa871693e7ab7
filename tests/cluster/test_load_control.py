"""Load control on a cluster of three nodes, two of which have a fake NVML library with a scripted GPU."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from byte_tokenizer import BOS
from fake_nvml import compile_library
from nodes import node, running_cluster
from ray.cluster_utils import Cluster
from ray_application import Application, live_actors, running_yaml, wait_until
from small_checkpoint import save_small_checkpoint, tokens_in_process

from dspark_ray.text.tokenizer import Tokenizer

pytestmark = pytest.mark.ray

PROMPT = "two replicas, one text"
MAX_TOKENS = 60

CONFIG = """
applications:
  - name: app
    import_path: deployments.app:build
    route_prefix: /
    args:
      model: {checkpoint}
      served_model_name: small
      engine: {{max_num_seqs: 8, max_num_batched_tokens: 128, max_model_len: 8192, page_size: 32}}
      dspark:
        drafter: {{placement: inline}}
        # Verifies all drafts above the threshold.
        schedule: {{kind: fixed}}
      placement: {{verifier: {{resources: {{CPU: 0.5, GPU: 1}}}}}}
      health: {{check_period_s: 1, check_timeout_s: 5, graceful_shutdown_timeout_s: 2}}
      load_controller:
        policy: {{kind: load_curve, curve: [[0.3, 0.0], [0.6, 0.9]], slew_per_second: 10, smoothing_seconds: 0}}
        # The engine's own load is ignored, so that only the devices differ.
        signals: {{slots: null, queue: null, slowness: null}}
        heartbeat_seconds: 0.2
        valid_heartbeats: 3
    deployments:
      - name: Ingress
        # On the head: Serve answers 500 to requests of an Ingress whose node dies, and other nodes die in this test.
        ray_actor_options: {{num_cpus: 0.1, resources: {{head: 0.1}}}}
      - name: Engine
        num_replicas: 2
"""

DRIVER = """
void fake_reset(void);
int fake_add_gpu(void);
void fake_set(int, const char *, double);
void fake_set_text(int, const char *, const char *);
__attribute__((constructor)) static void describe(void) {{
    fake_reset();
    int gpu = fake_add_gpu();
    fake_set_text(gpu, "name", "NVIDIA H200");
    fake_set_text(gpu, "uuid", "GPU-{name}");
    fake_set(gpu, "utilization", 99);
    fake_set(gpu, "gpm", 1);
    fake_set(gpu, "gpm_02", 90);
    fake_set(gpu, "gpm_05", {tensor_percent});
    fake_set(gpu, "gpm_10", 80);
    fake_set(gpu, "power", {milliwatts});
    fake_set(gpu, "power_limit", 700000);
}}
"""


@dataclass
class Nodes:
    cluster: Cluster
    ids: dict[str, str]
    raylets: dict[str, Any]


def driver_library(folder: Path, name: str, tensor_percent: int, milliwatts: int) -> str:
    """A folder with a driver whose GPU has these values; every node of this machine can so have another GPU."""
    folder.mkdir()
    script = folder / "script.c"
    script.write_text(DRIVER.format(name=name, tensor_percent=tensor_percent, milliwatts=milliwatts))
    compile_library(folder, str(script))
    return str(folder)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    base = tmp_path_factory.mktemp("drivers")
    folders = {
        "idle": driver_library(base / "idle", "idle", tensor_percent=3, milliwatts=200_000),
        "loaded": driver_library(base / "loaded", "loaded", tensor_percent=58, milliwatts=650_000),
    }
    with running_cluster(num_cpus=2, resources={"head": 1}) as cluster:
        raylets = {
            name: cluster.add_node(**node(num_gpus=1, env_vars={"LD_LIBRARY_PATH": folder}))
            for name, folder in folders.items()
        }
        ids = {name: raylet.node_id for name, raylet in raylets.items()}
        yield Nodes(cluster, {"head": cluster.head_node.node_id, **ids}, raylets)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_checkpoint(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> str:
    """The text that one process generates without speculation."""
    tokenizer = Tokenizer.from_directory(checkpoint)
    prompt = [BOS, *tokenizer.encode(PROMPT)]
    return tokenizer.decode(tokens_in_process(checkpoint, prompt, max_tokens=MAX_TOKENS, seed=5, ignore_eos=True))


@pytest.fixture(scope="module")
def app(nodes: Nodes, checkpoint: Path) -> Iterator[Application]:
    with running_yaml(yaml.safe_load(CONFIG.format(checkpoint=checkpoint))) as application:
        yield application


def admin(app: Application, path: str, **query: object) -> dict[str, Any]:
    answer = httpx.get(f"{app.client.base_url}../admin/{path}", params=query, timeout=30)
    return answer.raise_for_status().json()


def tensor_activities(app: Application) -> list[float | None]:
    """Of the GPUs of two nodes; one None until both have answered."""
    nodes = admin(app, "load")["nodes"]
    return [node["devices"][0]["tensor_activity"] for node in nodes] if len(nodes) == 2 else [None]


def nodes_in_sight(app: Application) -> set[str]:
    """Nodes that the controller has probes on; none while a controller that died with its node is replaced (503)."""
    try:
        return {node["node_id"] for node in admin(app, "load")["nodes"]}
    except httpx.HTTPStatusError as error:
        if error.response.status_code != 503:
            raise
        return set()


def say(app: Application) -> str:
    return app.complete(PROMPT, max_tokens=MAX_TOKENS, seed=5, extra_body={"ignore_eos": True}).choices[0].text


def say_at_once(app: Application, count: int = 8) -> list[str]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: say(app), range(count)))


def replicas_by_node(app: Application, nodes: Nodes) -> dict[str, dict[str, Any]]:
    """The controller's state of each replica, by the name of its node."""
    names = {node_id: name for name, node_id in nodes.ids.items()}
    return {names[replica["sample"]["places"][0]["node_id"]]: replica for replica in admin(app, "load")["replicas"]}


def steps_by_threshold(app: Application, since: float) -> dict[float, list[dict[str, Any]]]:
    """Steps of both replicas that drafted; Serve chooses which replica answers, so both are asked for until found."""
    logs: dict[str, list[dict[str, Any]]] = {}
    deadline = time.monotonic() + 60
    while len(logs) < 2:
        assert time.monotonic() < deadline, "one replica never answered"
        log = admin(app, "steps", last=1000)
        logs[log["replica"]] = log["steps"]
    found: dict[float, list[dict[str, Any]]] = {}
    for step in (step for steps in logs.values() for step in steps):
        if step["ended_at"] > since and step["num_drafted"] > 0:
            found.setdefault(round(step["confidence_threshold"], 3), []).append(step)
    return found


def budget(steps: list[dict[str, Any]]) -> float:
    return sum(step["budget"] for step in steps) / sum(step["num_drafted"] for step in steps)


def test_every_node_with_a_gang_has_its_probe(app, nodes):
    wait_until(lambda: None not in tensor_activities(app))  # A rate takes two samples.
    view = admin(app, "load")
    assert {actor.node_id for actor in live_actors("NodeProbe")} == {nodes.ids["loaded"], nodes.ids["idle"]}
    devices = {node["node_id"]: node["devices"][0] for node in view["nodes"]}
    assert devices[nodes.ids["loaded"]]["uuid"] == "GPU-loaded"
    assert devices[nodes.ids["loaded"]]["tensor_activity"] == pytest.approx(0.58)
    assert devices[nodes.ids["idle"]]["tensor_activity"] == pytest.approx(0.03)
    assert view["probe_errors"] == {}


def test_the_replica_on_the_loaded_node_has_a_higher_threshold(app, nodes):
    wait_until(lambda: len(admin(app, "load")["replicas"]) == 2)
    wait_until(lambda: replicas_by_node(app, nodes)["loaded"]["bounds"]["confidence_threshold"] == pytest.approx(0.9))
    idle = replicas_by_node(app, nodes)["idle"]
    assert (idle["bounds"]["confidence_threshold"], idle["saturation"]["value"]) == (0.0, 0.0)
    wait_until(lambda: replicas_by_node(app, nodes)["loaded"]["saturation"]["limiting"] == "tensor")


def test_it_verifies_fewer_tokens_and_says_the_same(app, reference):
    started = time.time()
    assert say_at_once(app) == [reference] * 8
    wait_until(lambda: len(steps_by_threshold(app, started)) == 2)
    steps = steps_by_threshold(app, started)
    assert budget(steps[0.9]) < 0.5 * budget(steps[0.0])


def test_without_the_controller_texts_go_on_and_thresholds_expire(app, nodes, reference):
    started = time.time()
    (controller,) = live_actors("ServeReplica:app:LoadController")
    with ThreadPoolExecutor(1) as pool:
        texts = pool.submit(lambda: [text for _ in range(4) for text in say_at_once(app)])
        os.kill(controller.pid, signal.SIGKILL)
        assert texts.result() == [reference] * 32
    # Another one is there by now, and the engines had followed their own schedule in between: version 0 is theirs.
    wait_until(lambda: replicas_by_node(app, nodes)["loaded"]["bounds"]["confidence_threshold"] == pytest.approx(0.9))
    own = [step for step in steps_by_threshold(app, started)[0.0] if step["policy_version"] == 0]
    assert own
    (other,) = live_actors("ServeReplica:app:LoadController")
    assert other.actor_id != controller.actor_id
    wait_until(lambda: len(live_actors("NodeProbe")) == 2)


def test_a_node_that_dies_takes_its_probe_along_and_nothing_else(app, nodes, reference):
    wait_until(lambda: len(admin(app, "load")["nodes"]) == 2)
    nodes.cluster.remove_node(nodes.raylets["loaded"], allow_graceful=False)
    left = {nodes.ids["idle"]}
    wait_until(lambda: nodes_in_sight(app) == left)
    wait_until(lambda: admin(app, "load")["probe_errors"] == {})
    assert {actor.node_id for actor in live_actors("NodeProbe")} == left
    assert say(app) == reference
    wait_until(lambda: list(replicas_by_node(app, nodes)) == ["idle"])
