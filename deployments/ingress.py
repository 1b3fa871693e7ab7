"""The HTTP face: parses, tokenises, streams. The one place where failures become status codes.

No `from __future__ import annotations` here: FastAPI reads the routes' annotations.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import Send

from autoscale.controller import Bounds
from deployments.admin import Administration, ControllerClient, add_admin_routes
from deployments.args import AppArgs
from deployments.generation import (
    EngineBusy,
    EngineClient,
    EngineFailed,
    EngineLost,
    Piece,
    RequestRefused,
    ResubmissionPolicy,
    generate_text,
    merge,
)
from deployments.messages import EngineEvent, StepLog
from deployments.protocol import (
    MAX_CHOICES,
    Answer,
    ApiError,
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
    Totals,
    choice_seed,
    invalid,
    join_stats,
    overloaded,
)
from dspark_ray.tokenizer import Tokenizer
from dspark_ray.types import Request, RequestError, SamplingParams, VerificationPolicy

logger = logging.getLogger("ray.serve")

_CONTROLLER_SECONDS = 5.0
"""A load controller that is being restarted is not waited for longer."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes need, none of it Ray's."""

    client: EngineClient
    controller: ControllerClient | None = None
    tokenizer: Tokenizer
    model_name: str
    max_model_len: int
    gamma: int
    bos_token_id: int
    created: int = 0
    retry_after_s: int = 1
    resubmission: ResubmissionPolicy = field(default_factory=ResubmissionPolicy)


@dataclass(frozen=True)
class _Job:
    """One HTTP request, ready to run: a Request per choice."""

    requests: list[Request]
    num_prompt_tokens: int
    answer: Answer


# Routes.


def build_http(service: Service) -> FastAPI:
    """The application that every replica of the Ingress runs."""
    http = FastAPI(title="dspark-ray", version=version("dspark-ray"))
    _add_error_handlers(http, service)

    @http.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest) -> Response:
        _check(service, body)
        prompt = await _encode(service, _render(service, body.messages, **body.chat_options()))
        answer = ChatAnswer(service.model_name, service.tokenizer.token_bytes)
        return await _answer(service, body, _job(service, body, [prompt], answer, default_tokens=None))

    @http.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        _check(service, body)
        prompts = [await _prompt_ids(service, prompt) for prompt in body.prompts()]
        answer = CompletionAnswer(service.model_name, service.tokenizer.token_bytes)
        return await _answer(
            service, body, _job(service, body, prompts, answer, default_tokens=SamplingParams().max_tokens)
        )

    @http.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if body.messages:
            tokens = await _encode(service, _render(service, body.messages))
        elif body.prompt is not None:
            tokens = await _prompt_ids(service, body.prompt)
        else:
            raise invalid("prompt", "expected prompt or messages")
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.max_model_len}

    @http.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service)]}

    @http.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(service, name)
        return _model_card(service)

    @http.get("/health")
    async def health() -> Response:
        return Response(status_code=200 if await service.client.is_healthy() else 503)

    @http.get("/version")
    async def server_version() -> dict[str, str]:
        return {"version": version("dspark-ray")}

    add_admin_routes(http, Administration(service.client, service.controller, partial(_as_api_errors, service)))
    return http


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "dspark-ray",
        "max_model_len": service.max_model_len,
    }


# From a body to requests.


def _check(service: Service, body: GenerationRequest) -> None:
    _check_model(service, body.model)
    body.check()


def _check_model(service: Service, name: str) -> None:
    if name != service.model_name:
        message = f"model={name!r:.200}: this server serves {service.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _render(service: Service, messages: Sequence[Message], **options: Any) -> str:
    return service.tokenizer.apply_chat([message.as_dict() for message in messages], **options)


async def _prompt_ids(service: Service, prompt: str | list[int]) -> list[int]:
    """Token ids of a prompt; text begins a document, token ids are taken as they are."""
    if isinstance(prompt, list):
        return prompt
    token_ids = await _encode(service, prompt)
    begins = token_ids[:1] == [service.bos_token_id]
    return token_ids if begins else [service.bos_token_id, *token_ids]


async def _encode(service: Service, text: str) -> list[int]:
    """Long texts take long, so they are encoded beside the event loop."""
    return await asyncio.to_thread(service.tokenizer.encode, text)


def _job(
    service: Service,
    body: GenerationRequest,
    prompts: list[list[int]],
    answer: Answer,
    default_tokens: int | None,
) -> _Job:
    """`default_tokens` is the length of an answer that asks for none; None takes what the model has room for."""
    if len(prompts) * body.num_choices > MAX_CHOICES:
        raise invalid("n", f"{len(prompts)} prompts with n={body.num_choices}: expected at most {MAX_CHOICES} in all")
    requests: list[Request] = []
    for prompt in prompts:
        max_tokens = _max_tokens(service, body.asked_tokens(), len(prompt), default_tokens)
        sampling, speculative = body.sampling(max_tokens), body.speculation()
        for choice in range(body.num_choices):
            requests.append(
                Request(
                    request_id=f"{answer.id}-{len(requests)}",
                    prompt_token_ids=tuple(prompt),
                    sampling=replace(sampling, seed=choice_seed(sampling.seed, choice)),
                    speculative=speculative,
                )
            )
    return _Job(requests, sum(map(len, prompts)), answer)


def _max_tokens(service: Service, asked: int | None, num_prompt_tokens: int, default: int | None) -> int:
    room = service.max_model_len - num_prompt_tokens
    if room < 1:
        raise invalid(
            "prompt",
            f"the prompt has {num_prompt_tokens} tokens: expected at most {service.max_model_len - 1},"
            f" max_model_len={service.max_model_len} less one to generate",
        )
    if asked is not None and asked > room:
        raise invalid(
            "max_tokens",
            f"max_tokens={asked} behind a prompt of {num_prompt_tokens} tokens: expected at most {room},"
            f" max_model_len={service.max_model_len}",
        )
    if asked is not None:
        return asked
    return room if default is None else min(default, room)


# From pieces to an answer.


class _Tally:
    """Counts what passes, for usage and statistics."""

    def __init__(self, job: _Job, gamma: int) -> None:
        self._job, self._gamma = job, gamma
        self._num_open, self._num_tokens = len(job.requests), 0
        self._stats: list[Any] = []

    def add(self, piece: Piece) -> None:
        self._num_tokens += piece.num_tokens
        if piece.finish_reason is not None:
            self._num_open -= 1
        if piece.stats is not None:
            self._stats.append(piece.stats)

    @property
    def is_complete(self) -> bool:
        return self._num_open == 0

    def totals(self) -> Totals:
        return Totals(self._job.num_prompt_tokens, self._num_tokens, join_stats(self._stats), self._gamma)


async def _answer(service: Service, body: GenerationRequest, job: _Job) -> Response:
    pieces = merge(
        [generate_text(service.client, service.tokenizer, request, service.resubmission) for request in job.requests]
    )
    tally = _Tally(job, service.gamma)
    if body.stream:
        return await _stream(service, body, job, tally, pieces)
    return await _collect(service, job, tally, pieces)


async def _collect(service: Service, job: _Job, tally: _Tally, pieces: AsyncGenerator[tuple[int, Piece]]) -> Response:
    choices: list[list[Piece]] = [[] for _ in job.requests]
    with _as_api_errors(service):
        async with aclosing(pieces):
            async for index, piece in pieces:
                tally.add(piece)
                choices[index].append(piece)
    totals = tally.totals()
    whole = job.answer.whole([Piece.join(choice) for choice in choices], totals)
    return Response(_to_json(whole, metrics=totals.metrics()), media_type="application/json")


async def _stream(
    service: Service,
    body: GenerationRequest,
    job: _Job,
    tally: _Tally,
    pieces: AsyncGenerator[tuple[int, Piece]],
) -> Response:
    """Waits for the first piece, so that what fails before it still gets a status of its own."""
    try:
        with _as_api_errors(service):
            first = await anext(pieces)
    except BaseException:
        await pieces.aclose()
        raise
    return EventStream(_events(service, body, job, tally, first, pieces), pieces)


async def _events(
    service: Service,
    body: GenerationRequest,
    job: _Job,
    tally: _Tally,
    first: tuple[int, Piece],
    rest: AsyncGenerator[tuple[int, Piece]],
) -> AsyncGenerator[str]:
    """Server-sent events; a failure in the middle becomes an event with an error."""
    try:
        with _as_api_errors(service):
            for line in _piece_events(body, job, tally, *first):
                yield line
            async for index, piece in rest:
                for line in _piece_events(body, job, tally, index, piece):
                    yield line
    except ApiError as error:
        yield _event(json.dumps(error.body()))
        return
    if body.include_usage:
        totals = tally.totals()
        yield _event(_to_json(job.answer.last_chunk(totals), metrics=totals.metrics()))
    yield _event("[DONE]")


def _piece_events(body: GenerationRequest, job: _Job, tally: _Tally, index: int, piece: Piece) -> Iterator[str]:
    tally.add(piece)
    if piece.is_silent:
        return
    extra = {}
    if tally.is_complete and not body.include_usage:
        extra["metrics"] = tally.totals().metrics()
    yield _event(_to_json(job.answer.chunk(index, piece), **extra))


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _to_json(answer: BaseModel, **extra: Any) -> str:
    for name, value in extra.items():
        setattr(answer, name, value)
    return answer.model_dump_json(exclude_unset=True)


class EventStream(StreamingResponse):
    """Ends its source with itself: when the client leaves, the sequences are freed at once."""

    def __init__(self, events: AsyncGenerator[str], source: AsyncGenerator[Any]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._source = events, source

    async def stream_response(self, send: Send) -> None:
        # A generator that was never started does not run its own clean-up.
        async with aclosing(self._source), aclosing(self._events):
            await super().stream_response(send)


# Failures.


@contextmanager
def _as_api_errors(service: Service) -> Iterator[None]:
    """What can go wrong behind the ingress, in HTTP's words."""
    try:
        yield
    except RequestRefused as error:
        if error.refusal.reason == "queue_full":
            raise overloaded(429, error.refusal.message, service.retry_after_s) from None
        raise invalid(error.refusal.param, error.refusal.message) from None
    except EngineBusy as error:
        raise overloaded(503, str(error), service.retry_after_s) from None
    except EngineLost as error:
        logger.error("a request was given up: %s", error)
        raise overloaded(503, "the engine was lost and no other took over", service.retry_after_s) from error
    except EngineFailed as error:
        logger.error("request %s was given up: %s", error.request_id, error)
        message = f"internal error (request id {error.request_id})"
        raise ApiError(500, message, kind="internal_server_error") from error


def _add_error_handlers(http: FastAPI, service: Service) -> None:
    @http.exception_handler(ApiError)
    async def answer_api_error(_: HttpRequest, error: ApiError) -> Response:
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @http.exception_handler(RequestError)
    async def answer_request_error(request: HttpRequest, error: RequestError) -> Response:
        return await answer_api_error(request, invalid(error.param, str(error)))

    @http.exception_handler(RequestValidationError)
    async def answer_validation_error(request: HttpRequest, error: RequestValidationError) -> Response:
        return await answer_api_error(request, _first_problem(error))

    @http.exception_handler(HTTPException)
    async def answer_http_exception(request: HttpRequest, error: HTTPException) -> Response:
        return await answer_api_error(request, ApiError(error.status_code, str(error.detail)))

    @http.exception_handler(Exception)
    async def answer_bug(request: HttpRequest, error: Exception) -> Response:
        logger.error("unexpected", exc_info=error)
        message = f"unexpected {type(error).__name__}; the server's log says more"
        return await answer_api_error(request, ApiError(500, message, kind="internal_server_error"))


def _first_problem(error: RequestValidationError) -> ApiError:
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return invalid(cause.param, str(cause))
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['ctx']['error']}", code="invalid_json")
    param = _param(problem["loc"], error.body)
    if problem["type"] == "extra_forbidden":
        return invalid(param, f"{param}: this server does not know this field")
    if problem["type"] == "missing":
        return invalid(param, f"{param}: this field is required")
    return invalid(param, f"{param}={problem['input']!r:.200}: {problem['msg']}")


def _param(location: Sequence[Any], body: Any) -> str:
    """messages[0].content from pydantic's location, whose first part is the body and whose last may name a type.

    Locations in the query are (query, name).
    """
    if location[0] == "query":
        return str(location[1])
    names, value = [], body
    for part in location[1:]:
        if not isinstance(value, dict if isinstance(part, str) else list):
            break
        names.append(f"[{part}]" if isinstance(part, int) else f".{part}")
        value = value.get(part) if isinstance(value, dict) else value[part]
    return "".join(names).removeprefix(".") or "body"


# Ray.


class HandleClient:
    """An EngineClient over Serve: any replica of the Engine deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle, self._stream_handle = handle, handle.options(stream=True)

    async def generate(
        self, request: Request, on_trial: bool = False, avoid: str | None = None
    ) -> AsyncGenerator[EngineEvent]:
        stream = self._stream_handle.generate.remote(request, on_trial=on_trial, avoid=avoid)
        try:
            with _translating():
                async for output in stream:  # type: ignore[union-attr]
                    yield output
        finally:
            # Cancelling reaches the generator in the replica, which then aborts the sequence.
            stream.cancel()

    async def is_healthy(self) -> bool:
        """Whether the Engine deployment has a running replica, or none because nobody asks: a request brings one."""
        application = serve.get_replica_context().app_name
        status = (await asyncio.to_thread(serve.status)).applications[application].deployments["Engine"]
        running = status.replica_states.get("RUNNING", 0)  # type: ignore[call-overload]  # a str enum
        return running > 0 or status.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")

    async def steps(self, last: int) -> StepLog:
        with _translating():
            return await self._handle.steps.remote(last)

    async def set_policy(self, policy: VerificationPolicy) -> str:
        with _translating():
            return await self._handle.set_policy.remote(policy)


class HandleController:
    """A ControllerClient over Serve."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def view(self) -> dict[str, Any]:
        return await self._answer(self._handle.view.remote())

    async def override(self, bounds: Bounds, seconds: float | None, replica: str | None) -> list[str]:
        return await self._answer(self._handle.override.remote(bounds, seconds, replica))

    async def end_override(self, replica: str | None) -> None:
        await self._answer(self._handle.end_override.remote(replica))

    async def _answer(self, asked: Awaitable[Any]) -> Any:
        try:
            with _translating():
                return await asyncio.wait_for(asked, _CONTROLLER_SECONDS)
        except TimeoutError as error:
            raise EngineBusy(f"the load controller did not answer in {_CONTROLLER_SECONDS} s") from error


@contextmanager
def _translating() -> Iterator[None]:
    """Ray's exceptions in the words of an EngineClient."""
    try:
        yield
    except (RayError, RayServeException) as error:
        raise _translated(error) from error


def _translated(error: Exception) -> Exception:
    """A dead process is a lost engine; an exception of living code is a failure of its own."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, EngineLost):
        return EngineLost(cause.reason, cause.in_flight)
    if isinstance(error, BackPressureError):
        return EngineBusy(error.message)
    died = isinstance(error, RayActorError)
    raised = isinstance(error, (RayTaskError, TaskCancelledError, RayServeException))
    return EngineLost(str(error)) if died or not raised else EngineFailed(str(error))


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    """Serves HTTP for one model; holds no state that a request needs to outlive it."""

    def __init__(self, args: AppArgs, engine: DeploymentHandle, controller: DeploymentHandle | None) -> None:
        model_config, engine_config = args.resolve()
        self._service = Service(
            client=HandleClient(engine),
            controller=None if controller is None else HandleController(controller),
            tokenizer=Tokenizer.from_directory(args.checkpoint),
            model_name=args.model_name,
            max_model_len=engine_config.max_model_len,
            gamma=engine_config.gamma or 0,
            bos_token_id=model_config.bos_token_id,
            created=int((args.checkpoint / "config.json").stat().st_mtime),
            retry_after_s=args.limits.retry_after_s,
            resubmission=ResubmissionPolicy(
                max_losses=args.limits.max_resubmissions,
                deadline_seconds=args.limits.resubmission_deadline_s,
            ),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_http(self._service)
