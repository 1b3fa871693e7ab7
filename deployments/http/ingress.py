"""The Ingress deployment: the HTTP application, with the Engine and the load controller behind Serve's handles."""

import os

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.args import AppArgs
from deployments.http.clients import HandleClient, HandleController
from deployments.http.resubmission import ResubmissionPolicy
from deployments.http.routes import build_http
from deployments.http.service import Service
from dspark_ray.text.tokenizer import Tokenizer

_HAS_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""Ray's switch for HAProxy, which does not pass on the address of the client."""


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    """Serves HTTP for one model. It keeps no state, so that it can be replaced at any time."""

    def __init__(self, args: AppArgs, engine: DeploymentHandle, controller: DeploymentHandle | None) -> None:
        model_config, engine_config = args.resolve()
        limits = args.limits
        self._service = Service(
            client=HandleClient(engine),
            controller=None if controller is None else HandleController(controller),
            tokenizer=Tokenizer.from_directory(args.checkpoint),
            model_name=args.model_name,
            max_model_len=engine_config.max_model_len,
            gamma=engine_config.gamma,
            bos_token_id=model_config.bos_token_id,
            created=int((args.checkpoint / "config.json").stat().st_mtime),
            retry_after_s=limits.retry_after_s,
            resubmission=ResubmissionPolicy(
                max_losses=limits.max_resubmissions, deadline_seconds=limits.resubmission_deadline_s
            ),
            api_keys=args.api_keys(),
            admin_api_keys=args.admin_api_keys(),
            cors_origins=args.http.cors_origins,
            max_body_bytes=limits.max_body_bytes,
            keep_alive_s=args.http.keep_alive_s,
            tokenizer_threads=args.http.tokenizer_threads,
            max_waiting_prompts=limits.max_waiting_prompts,
            adds_request_id=False,
            sees_clients=os.environ.get(_HAS_HAPROXY, "0") != "1",
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http(self._service)
