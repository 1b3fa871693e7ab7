"""The application builder, `deployments.app:build` in every YAML file.

No `from __future__ import annotations` here: with it Serve would not validate the builder's argument.
"""

from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.args import AppArgs
from deployments.http.ingress import Ingress
from deployments.launch.ports import check_not_shared
from deployments.load_controller import LoadControllerReplica
from deployments.replica.engine import EngineReplica
from deployments.replica.gang import actor_options
from deployments.replica.routing import AvoidingRouter

_MAX_HEARTBEATS = 10_000
"""Concurrent heartbeats: each is answered in microseconds, and none should wait for another."""

_CONTROLLER_SHUTDOWN_SECONDS = 2.0


def build(args: AppArgs) -> Application:
    """An Ingress, an Engine whose replicas are gangs of workers, and the load controller.

    Raises PortError where another application listens on Serve's HTTP port.
    """
    check_not_shared()
    health, limits = args.health, args.limits
    controller = None
    if args.load_controller is not None:
        controller = LoadControllerReplica.options(
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=_MAX_HEARTBEATS,
            health_check_period_s=health.check_period_s,
            health_check_timeout_s=health.check_timeout_s,
            # It has no streams to wait for.
            graceful_shutdown_timeout_s=_CONTROLLER_SHUTDOWN_SECONDS,
        ).bind(args.load_controller, args.dspark.confidence.threshold, args.model_name)
    engine = EngineReplica.options(
        ray_actor_options=actor_options(args.placement.replica),
        max_ongoing_requests=args.max_ongoing_requests,
        max_queued_requests=args.max_queued_requests,
        health_check_period_s=health.check_period_s,
        health_check_timeout_s=health.check_timeout_s,
        graceful_shutdown_timeout_s=health.graceful_shutdown_timeout_s,
        request_router_config=RequestRouterConfig.model_validate({"request_router_class": AvoidingRouter}),
        **args.placement_options(),
    ).bind(args, controller)
    return Ingress.options(
        max_ongoing_requests=limits.max_ingress_requests,
        graceful_shutdown_timeout_s=health.graceful_shutdown_timeout_s,
    ).bind(args, engine, controller)
