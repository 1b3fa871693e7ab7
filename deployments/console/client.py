"""The HTTP client of the commands that talk to a running server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx


class ServerError(RuntimeError):
    """A server that does not answer, or answers with an error."""


def get_json(url: str, api_key: str | None, timeout_seconds: float) -> Any:
    """The JSON answer of GET `url`. Raises ServerError."""
    # Imported here because it takes a quarter of a second, which `--help` and bad arguments need not wait for.
    import httpx

    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    # Certificates take a tenth of a second to load, also where the URL asks for no TLS. Redirects are not followed, so
    # they cannot lead from there to a server whose certificate would have to be verified.
    verify = not url.startswith("http:")
    try:
        answer = httpx.get(url, headers=headers, timeout=timeout_seconds, verify=verify)
        if answer.is_success:
            return answer.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ServerError(f"{url}: {error or type(error).__name__}") from None
    raise ServerError(f"{url}: {answer.status_code} {_reason(answer)}")


def _reason(answer: httpx.Response) -> str:
    """The message of an answer in our error schema, or HTTP's phrase for the status."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.reason_phrase
