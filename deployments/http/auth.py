"""Who may call: API keys, and the loopback rule of the administration routes."""

import hmac
import ipaddress
import logging
import re
from collections.abc import Sequence

from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.http.errors import ApiError, error_response, path_of, request_id_of

logger = logging.getLogger("ray.serve")

BEARER = HTTPBearer(auto_error=False, description="One of the keys of `api_key` or `admin_api_key`, where any is set.")
"""For /openapi.json; KeyGuard checks the key before a body is read, which a dependency of a route cannot."""
_OPEN_PATHS = frozenset({"/health", "/ready", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"})
_FORWARDING = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers of proxies: the peer is then not the client."""
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class KeyGuard:
    """401 without a valid key where there are any; 403 for administration from elsewhere where it has no key.

    With `api_keys` every path but those of health checks and of the schema asks for one; an admin key is good
    everywhere. Without `admin_keys`, administration is for processes of this machine. `sees_clients` tells whether the
    peer of a connection is the client itself.
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
    # Every key is compared in full, so that the time taken tells nothing.
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
    """The name that was called has to be a loopback name too: a web page can make a browser call any name."""
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
