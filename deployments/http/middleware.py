"""What happens to every HTTP request before a route sees it: an id, a check of its key, a limit of its body."""

import hmac
import ipaddress
import logging
import re
import secrets
from collections.abc import Sequence

from fastapi.security import HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.errors import ApiError, error_response, internal_error, path_of, request_id_of

logger = logging.getLogger("ray.serve")

_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
BEARER = HTTPBearer(auto_error=False, description="One of the keys of `api_key` or `admin_api_key`, where any is set.")
"""For /openapi.json; KeyGuard checks the key before a body is read, which a dependency of a route cannot."""
_OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})
_FORWARDING = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers that proxies add: the peer is then not the client."""
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class RequestIds:
    """Gives each request an id, the client's X-Request-Id where it is well formed, and answers unexpected exceptions.

    With `adds_header` the answer carries the id too; Serve's proxy adds that header itself.
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
    """Answers 413 to a body of more than `limit` bytes; without reading it where Content-Length is given.

    Starlette's middleware would answer in plain text instead of the error schema.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > self._limit):
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


class KeyGuard:
    """Answers 401 to requests without a valid key, and 403 to administration from other machines without admin keys.

    With `api_keys`, every path except health checks and the schema needs one of them or an admin key. Without
    `admin_keys`, only processes of this machine may use the /admin routes. `sees_clients` tells whether the peer of a
    connection is the client itself.
    """

    def __init__(
        self, app: ASGIApp, api_keys: Sequence[str], admin_keys: Sequence[str], sees_clients: bool = True
    ) -> None:
        self._app, self._sees_clients = app, sees_clients
        self._api_keys = [key.encode() for key in (*api_keys, *admin_keys)] if api_keys else []
        self._admin_keys = [key.encode() for key in admin_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
            return
        logger.warning("request %s was refused: %s", request_id_of(scope), problem.message)
        await error_response(problem, scope)(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        path, headers = path_of(scope), Headers(scope=scope)
        if path in _OPEN_PATHS:
            return None
        if path == "/admin" or path.startswith("/admin/"):
            return self._admin_problem(scope, headers)
        return _key_problem(headers, self._api_keys) if self._api_keys else None

    def _admin_problem(self, scope: Scope, headers: Headers) -> ApiError | None:
        if self._admin_keys:
            return _key_problem(headers, self._admin_keys)
        if self._sees_clients and _comes_from_this_machine(scope, headers):
            return None
        message = "administration answers on the loopback interface only, because no admin_api_key is configured"
        return ApiError(403, message, kind="permission_error", code="forbidden")


def _key_problem(headers: Headers, keys: Sequence[bytes]) -> ApiError | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip().encode(errors="replace") if scheme.lower() == "bearer" else b""
    # Every key is compared in full, so that the time taken reveals nothing.
    if sum(hmac.compare_digest(given, key) for key in keys):
        return None
    message = "expected a key in the header `Authorization: Bearer KEY`" if not given else "the key is not valid"
    return ApiError(
        401,
        message,
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _comes_from_this_machine(scope: Scope, headers: Headers) -> bool:
    """The Host header must be a loopback name too: web pages can make a browser call other names that resolve here."""
    peer = scope.get("client") or ("", 0)
    name = re.sub(r":\d+$", "", headers.get("host", ""))
    is_forwarded = any(header in headers for header in _FORWARDING)
    return _is_loopback(str(peer[0])) and name in _LOOPBACK_NAMES and not is_forwarded


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback
