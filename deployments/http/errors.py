"""Failures as HTTP answers, all in OpenAI's error schema.

No `from __future__ import annotations` in modules with FastAPI: it reads annotations.
"""

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute
from starlette.types import Scope

from deployments.http.interfaces import EngineBusy, EngineFailed, RequestRefused
from deployments.replica.messages import EngineLost
from dspark_ray.types import RequestError

logger = logging.getLogger("ray.serve")

CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
_MAX_SHOWN = 100
"""Characters of a wrong value that an error message quotes."""
_TEXT_FIELDS = ("prompt", "messages", "content", "text", "arguments", "reasoning", "reasoning_content", "api_key")
"""Fields whose values are never quoted, as error messages end up in logs."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    """The wrong field."""
    code: str | None
    request_id: str
    """The server's log has the details under this id."""


class ErrorAnswer(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An answer in OpenAI's error schema."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.kind, self.param, self.code = message, kind, param, code

    def body(self, request_id: str) -> dict[str, Any]:
        detail = ErrorDetail(
            message=_writable(self.message),
            type=self.kind,
            param=None if self.param is None else _writable(self.param),
            code=self.code,
            request_id=request_id,
        )
        return {"error": detail.model_dump()}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """400: the value of the field `param` is not valid."""
    return ApiError(400, message, param=param, code=code)


def overloaded(status: int, message: str, retry_after: int) -> ApiError:
    """429 or 503: the same request may be accepted in `retry_after` seconds."""
    kind = "rate_limit_error" if status == 429 else "service_unavailable_error"
    return ApiError(status, message, kind=kind, code="overloaded", headers={"Retry-After": str(retry_after)})


def internal_error(request_id: str) -> ApiError:
    """500. The cause is only in the log, as exceptions quote paths, addresses and prompts."""
    message = f"internal error (request id {request_id})"
    return ApiError(500, message, kind="internal_server_error", code="internal_error")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these errors besides 401."""
    always = () if 401 in statuses else (401,)
    return {status: {"model": ErrorAnswer, "description": _DESCRIPTIONS[status]} for status in (*always, *statuses)}


_DESCRIPTIONS = {
    400: "A field is wrong; `param` names it.",
    401: "A key is missing or wrong.",
    403: "The administration routes answer on the loopback interface only, unless there is an admin key.",
    404: "There is no such model or replica.",
    413: "The body is larger than the server accepts.",
    429: "The queue is full; `Retry-After` has the seconds until the next try.",
    500: "Internal error; the server's log has the details under the request id.",
    503: "No engine can take the request now; `Retry-After` has the seconds until the next try.",
}


def request_id_of(scope: Scope) -> str:
    """The id that RequestIds gave this request."""
    return str(scope.get("state", {}).get("request_id") or secrets.token_hex(16))


def path_of(scope: Scope) -> str:
    """The path after the application's prefix, as routes see it."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def error_response(error: ApiError, scope: Scope) -> Response:
    return JSONResponse(error.body(request_id_of(scope)), status_code=error.status_code, headers=error.headers)


@contextmanager
def as_api_errors(request_id: str, retry_after_s: int) -> Iterator[None]:
    """Map engine errors to HTTP errors."""
    try:
        yield
    except RequestRefused as error:
        if error.refusal.reason == "queue_full":
            raise overloaded(429, error.refusal.message, retry_after_s) from None
        raise invalid(error.refusal.param, error.refusal.message) from None
    except EngineBusy as error:
        logger.warning("request %s: no engine could take it: %s", request_id, error)
        raise overloaded(503, "no engine has room for another request", retry_after_s) from error
    except EngineLost as error:
        logger.error("request %s was given up: %s", request_id, error)
        raise overloaded(503, "the engine was lost and no other took over", retry_after_s) from error
    except EngineFailed as error:
        logger.error("request %s failed: %s", request_id, error)
        raise internal_error(request_id) from error


def add_error_handlers(http: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """`routes` are all routes of the application; the header Allow is made from them."""

    @http.exception_handler(ApiError)
    async def answer_api_error(request: HttpRequest, error: ApiError) -> Response:
        return error_response(error, request.scope)

    @http.exception_handler(RequestError)
    async def answer_request_error(request: HttpRequest, error: RequestError) -> Response:
        return error_response(invalid(error.param, str(error)), request.scope)

    @http.exception_handler(RequestValidationError)
    async def answer_validation_error(request: HttpRequest, error: RequestValidationError) -> Response:
        return error_response(_first_problem(error), request.scope)

    @http.exception_handler(HTTPException)
    async def answer_http_exception(request: HttpRequest, error: HTTPException) -> Response:
        message = f"{request.method} on this path: {error.detail}"
        headers = {"Allow": _methods(routes, request)} if error.status_code == 405 else error.headers
        return error_response(ApiError(error.status_code, message, headers=headers), request.scope)


def _methods(routes: Sequence[BaseRoute], request: HttpRequest) -> str:
    """Methods of all routes with this path; Starlette lists those of the first route only."""
    path = path_of(request.scope)
    here = [route for route in routes if isinstance(route, APIRoute) and route.path_regex.match(path)]
    return ", ".join(sorted({method for route in here for method in route.methods or ()}))


def _first_problem(error: RequestValidationError) -> ApiError:
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {problem['ctx']['error']}", code="invalid_json")
    param = _param(problem["loc"], error.body)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        inside = f"{param}." if param and cause.param else param and f"{param}: "
        return invalid(".".join(filter(None, (param, cause.param))) or None, inside + str(cause))
    param = param or "body"
    if problem["type"] == "extra_forbidden":
        return invalid(param, f"{param}: this server does not know this field")
    if problem["type"] == "missing":
        return invalid(param, f"{param}: this field is required")
    return invalid(param, f"{param}{_shown(param, problem['input'])}: {problem['msg']}")


def _shown(param: str, value: Any) -> str:
    """`=value` for a short value that is not the user's text, else nothing."""
    if not isinstance(value, str | int | float | bool | None):
        return ""
    last = param.rpartition(".")[2].partition("[")[0]
    if isinstance(value, str) and last in _TEXT_FIELDS:
        return ""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"=<an integer of {value.bit_length()} bits>"
    return f"={value!r:.{_MAX_SHOWN}}"


def _param(location: Sequence[Any], body: Any) -> str:
    """A path such as messages[0].content from pydantic's location.

    A location starts with "body" and also has names of types, which are left out; one in the query is (query, name).
    Keys of logit_bias are not shown.
    """
    if location[0] != "body":
        return str(location[1])
    names, value = [], body
    for part in location[1:]:
        if not isinstance(value, dict if isinstance(part, str) else list):
            continue
        names.append(f"[{part}]" if isinstance(part, int) else f".{part}")
        if part == "logit_bias":
            break
        value = value.get(part) if isinstance(value, dict) else value[part]
    return "".join(names).removeprefix(".")


def _writable(text: str) -> str:
    """Without lone surrogates, which JSON can spell but no answer can encode."""
    return text.encode(errors="replace").decode()
