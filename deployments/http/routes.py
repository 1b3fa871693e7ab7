"""The routes for users, and the FastAPI application with all routes.

No `from __future__ import annotations` in modules with FastAPI: it reads annotations.
"""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response

from deployments.http.admin import admin_routes
from deployments.http.answers import ChatCompletion, Completion, Health, ModelCard, ModelList, Tokens, Version
from deployments.http.chat_requests import ChatRequest, TokenizeRequest
from deployments.http.errors import add_error_handlers, documented, request_id_of
from deployments.http.jobs import chat_job, check_model, completion_job, conversation_ids, prompts_ids
from deployments.http.middleware import BEARER, BodyLimit, KeyGuard, RequestIds
from deployments.http.requests import CompletionRequest
from deployments.http.service import Service
from deployments.http.sse import respond

_VALIDATION_SCHEMAS = ("HTTPValidationError", "ValidationError")


def build_http(service: Service) -> FastAPI:
    """The application that every Ingress replica runs."""
    http = FastAPI(title="dspark-ray", version=version("dspark-ray"))
    # The middleware that is added last sees a request first.
    http.add_middleware(BodyLimit, limit=service.max_body_bytes)
    http.add_middleware(
        KeyGuard,
        api_keys=service.api_keys,
        admin_keys=service.admin_api_keys,
        sees_clients=service.sees_clients,
    )
    http.add_middleware(RequestIds, adds_header=service.adds_request_id)
    if service.cors_origins:
        http.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    routers = [_health_routes(service), _model_routes(service), _generation_routes(service), admin_routes(service)]
    for router in routers:
        http.include_router(router)
    add_error_handlers(http, [route for router in routers for route in router.routes])
    _document_errors(http)
    return http


def _health_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Whether this process answers")
    async def health() -> Health:
        return Health(status="alive")

    @router.head("/ready", include_in_schema=False)
    @router.get(
        "/ready",
        response_model=Health,
        responses={503: {"model": Health}},
        summary="Whether an engine can take requests",
    )
    async def ready() -> Response:
        is_ready = await service.readiness.is_ready()
        state = Health(status="ready" if is_ready else "not ready")
        return JSONResponse(state.model_dump(), status_code=200 if is_ready else 503)

    return router


def _model_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["models"], dependencies=[Depends(BEARER)], responses=documented())
    card = ModelCard(id=service.model_name, created=service.created, max_model_len=service.max_model_len)

    @router.get("/v1/models", summary="List the model that is served")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @router.get("/v1/models/{name:path}", responses=documented(404), summary="Describe a model")
    async def model(name: str) -> ModelCard:
        check_model(service, name)
        return card

    @router.get("/version", summary="This server's version")
    async def server_version() -> Version:
        return Version(version=version("dspark-ray"))

    return router


def _generation_routes(service: Service) -> APIRouter:
    router = APIRouter(dependencies=[Depends(BEARER)], responses=documented(400, 404, 413, 500, 503))

    @router.post(
        "/v1/chat/completions",
        tags=["generation"],
        summary="Answer a conversation",
        responses=documented(429) | _generated(ChatCompletion),
    )
    async def chat_completions(body: ChatRequest, request: HttpRequest) -> Response:
        return await respond(service, await chat_job(service, body, request_id_of(request.scope)))

    @router.post(
        "/v1/completions",
        tags=["generation"],
        summary="Continue one or several prompts",
        responses=documented(429) | _generated(Completion),
    )
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        return await respond(service, await completion_job(service, body, request_id_of(request.scope)))

    @router.post("/tokenize", tags=["models"], summary="Count and show the tokens of a prompt")
    async def tokenize(body: TokenizeRequest) -> Tokens:
        check_model(service, body.model)
        if body.prompt is not None:
            [tokens] = await prompts_ids(service, [body.prompt], body.add_special_tokens)
        else:
            tokens = await conversation_ids(service, body)
        return Tokens(tokens=tokens, count=len(tokens), max_model_len=service.max_model_len)

    return router


def _generated(model: type) -> dict[int | str, dict[str, Any]]:
    """The response of a generation route: JSON, or server-sent events with `stream`."""
    event = {
        "type": "object",
        "properties": {"data": {"type": "string", "description": "A chunk or an error in JSON; at last [DONE]."}},
        "required": ["data"],
    }
    events = {"itemSchema": event}
    return {200: {"model": model, "content": {"text/event-stream": events}, "description": "The generated text."}}


def _document_errors(http: FastAPI) -> None:
    """Remove the 422 that FastAPI documents for wrong fields: this application answers 400 in OpenAI's schema."""
    generated = http.openapi

    def openapi() -> dict[str, Any]:
        if http.openapi_schema is None:
            http.openapi_schema = _without_422(generated())
        return http.openapi_schema

    http.openapi = openapi  # type: ignore[method-assign]


def _without_422(schema: dict[str, Any]) -> dict[str, Any]:
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in _VALIDATION_SCHEMAS:
        schema["components"]["schemas"].pop(name, None)
    return schema
