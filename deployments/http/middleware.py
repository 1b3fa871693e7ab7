"""What happens to every HTTP request before a route sees it: an id, a limit of its body."""

import logging
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.errors import ApiError, error_response, internal_error

logger = logging.getLogger("ray.serve")

_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """Gives each request an id, the client's X-Request-Id where it is well formed, and answers unexpected exceptions.

    The answer carries it too, where `adds_header` (Serve's proxy adds it itself).
    """

    def __init__(self, app: ASGIApp, adds_header: bool) -> None:
        self._app, self._adds_header = app, adds_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                if self._adds_header:
                    MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s: %s %r raised", request_id, scope["method"], scope["path"])
            if not has_started:
                await error_response(internal_error(request_id), scope)(scope, receive, send_with_id)


def _request_id(asked: str | None) -> str:
    return asked if asked is not None and _VALID_ID.fullmatch(asked) else secrets.token_hex(16)


class BodyLimit:
    """413 for a body of more than `limit` bytes, before it is read where its length was announced.

    Starlette's own middleware answers in plain text; this one in the error schema.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and (len(announced) > 18 or int(announced) > self._limit):
            await error_response(self._too_large(), scope)(scope, receive, send)
            return
        num_bytes = 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, receive_within_limit, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has too many bytes: expected at most {self._limit}", code="body_too_large")
