"""Starts the application on a cluster of this machine, and inspects its actors."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai
import ray
from ray import serve
from ray._private import state as ray_state
from ray.serve.context import _get_global_client as get_global_client
from ray.serve.schema import ServeDeploySchema
from ray.util import placement_group_table

from deployments.app import build
from deployments.args import AppArgs


@dataclass
class Application:
    """A running application and its client."""

    name: str
    client: openai.OpenAI

    @property
    def model(self) -> str:
        return "small"

    def complete(self, prompt: object = "Once upon", **options: Any) -> openai.types.Completion:
        return self.client.completions.create(model=self.model, prompt=prompt, **options)


@dataclass(frozen=True)
class Actor:
    actor_id: str
    node_id: str
    pid: int


def live_actors(*class_names: str) -> list[Actor]:
    """Actors of these classes on all nodes; unlike Ray's state API, this needs no dashboard."""
    return [
        Actor(actor["ActorID"], actor["Address"]["NodeID"], actor["Pid"])
        for actor in ray_state.actors().values()
        if actor["State"] == "ALIVE" and actor["ActorClassName"] in class_names
    ]


def num_placement_groups() -> int:
    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in {seconds} s"
        time.sleep(0.2)


def deploy(name: str, args: dict[str, Any], **options: Any) -> None:
    """Raises RuntimeError with every deployment's own message."""
    try:
        serve.run(build(AppArgs.model_validate(args)), name=name, **options)
    except RuntimeError as error:
        deployments = serve.status().applications[name].deployments.values()
        raise RuntimeError("\n".join(deployment.message for deployment in deployments)) from error


@contextlib.contextmanager
def running_application(args: dict[str, Any]) -> Iterator[Application]:
    """Start Serve on the connected cluster, on a free port, and shut it down afterwards."""
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        deploy("app", {**args, "served_model_name": "small"})
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300
        ) as client:
            yield Application("app", client)
    finally:
        serve.shutdown()


def deploy_yaml(config: dict[str, Any]) -> None:
    """Apply a YAML file with Serve, without waiting for the deployments."""
    get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))


@contextlib.contextmanager
def running_yaml(config: dict[str, Any]) -> Iterator[Application]:
    """Run a YAML file on the connected cluster, as `serve run FILE` does, on a free port."""
    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        deploy_yaml(config)
        name = config["applications"][0]["name"]
        wait_until(lambda: serve.status().applications[name].status == "RUNNING", 180)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300) as api:
            yield Application(name, api)
    finally:
        serve.shutdown()


@contextlib.contextmanager
def local_ray(directory: str, num_cpus: int, **options: Any) -> Iterator[None]:
    """A cluster of one node, isolated from other tests; `options` are ray.init's."""
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=num_cpus,
        object_store_memory=80 * 2**20,
        _temp_dir=directory,
        log_to_driver=False,
        **options,
    )
    try:
        yield
    finally:
        ray.shutdown()
