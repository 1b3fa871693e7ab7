"""Keys, error messages, request ids, and browsers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from byte_tokenizer import EOS, NUM_TOKENS
from echo_engine import EchoEngine
from http_server import HTTP, Server, running_server
from pydantic import ValidationError

from deployments.args import AppArgs
from deployments.console.cli import main
from deployments.http.interfaces import EngineBusy, EngineFailed
from deployments.http.middleware import KeyGuard
from deployments.replica.messages import EngineLost
from dspark_ray.config import ConfigError
from dspark_ray.text.tokenizer import Tokenizer

USER_ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/echo"),
    ("GET", "/version"),
    ("GET", "/nothing"),
]
ADMIN_ROUTES = [("GET", "/admin/steps"), ("GET", "/admin/load"), ("POST", "/admin/policy"), ("DELETE", "/admin/policy")]


@pytest.fixture(scope="module")
def locked(tokenizer: Tokenizer) -> Iterator[Server]:
    """Has keys for users and for operators."""
    keys = {"api_keys": ["one", "two"], "admin_api_keys": ["boss"]}
    with running_server(tokenizer, EchoEngine(NUM_TOKENS, EOS), **keys) as running:
        yield running


def call(server: Server, method: str, path: str, **headers: str) -> httpx.Response:
    return HTTP.request(method, f"{server.url}{path}", headers=headers)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    return answer.json()["error"]


# Keys.


@pytest.mark.parametrize(("method", "path"), USER_ROUTES + ADMIN_ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("three"),
        {"Authorization": "Bearer"},
        bearer("on"),
        {"Authorization": "Basic one"},
        {"Authorization": "one"},
        {"Authorization": "Bearer \xe9"},
    ],
)
def test_without_a_valid_key_nothing_is_told(locked, method, path, headers):
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = HTTP.request(method, f"{locked.url}{path}", headers=encoded)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert error_of(answer)["type"] == "authentication_error"
    assert error_of(answer)["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["one", "two", "boss"])
def test_each_key_opens_the_routes_of_users(locked, key):
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0) as client:
        assert client.completions.create(model="echo", prompt="abc", max_tokens=4).choices[0].text == "abc"
        assert [model.id for model in client.models.list()] == ["echo"]


def test_the_client_library_knows_the_error(locked):
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="the key is not valid"),
    ):
        client.models.list()


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_administration_takes_its_own_key_alone(locked, method, path):
    assert call(locked, method, path, **bearer("one")).status_code == 401
    assert call(locked, method, path, **bearer("boss")).status_code != 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/openapi.json"])
def test_health_and_the_schema_are_open(locked, path):
    assert call(locked, "GET", path).status_code == 200


def test_a_body_is_not_read_without_a_key(locked):
    answer = HTTP.post(f"{locked.url}/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"X-Real-Ip": "127.0.0.1"},
        {"Via": "1.1 proxy"},
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": "localhost.evil.example"},
    ],
)
@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
def test_without_an_admin_key_administration_is_for_this_machine_alone(server, echo, method, path, headers):
    assert call(server, method, path).status_code not in (401, 403)
    answer = call(server, method, path, **headers)
    assert answer.status_code == 403
    assert "no admin_api_key is configured" in error_of(answer)["message"]
    assert echo.policies == []


@pytest.mark.parametrize(
    ("peer", "host", "status"),
    [
        ("127.0.0.1", "localhost:8000", 200),
        ("127.9.9.9", "127.0.0.1", 200),
        ("::1", "[::1]:8000", 200),
        ("::ffff:127.0.0.1", "localhost", 200),
        ("10.0.0.7", "localhost", 403),
        ("::ffff:10.0.0.7", "localhost", 403),
        ("", "localhost", 403),
        ("unix:", "localhost", 403),
        (None, "localhost", 403),
        ("127.0.0.1", "", 403),
    ],
)
@pytest.mark.parametrize("path", ["/admin/load", "/admin", "/admin/"])
async def test_the_peer_decides(peer, host, status, path):
    assert await guarded(peer, host, path) == status


async def test_a_peer_that_may_be_a_proxy_is_not_this_machine():
    assert await guarded("127.0.0.1", "localhost", "/admin/load", sees_clients=False) == 403


async def test_the_prefix_of_the_application_is_no_part_of_a_path():
    assert await guarded("10.0.0.7", "localhost", "/app/admin/load", root_path="/app") == 403
    assert await guarded("10.0.0.7", "localhost", "/app/health", root_path="/app") == 200


async def guarded(peer: str | None, host: str, path: str, sees_clients: bool = True, root_path: str = "") -> int:
    """The status of a request through a guard without keys."""
    statuses = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "root_path": root_path,
        "headers": [(b"host", host.encode())],
        "client": None if peer is None else (peer, 1234),
    }
    await KeyGuard(app, [], [], sees_clients)(scope, None, send)  # type: ignore[arg-type]
    return statuses[0]


@pytest.mark.parametrize("command", [["explain"], ["top", "--json"]])
def test_the_command_line_carries_the_key_of_its_option_or_variable(locked, capsys, monkeypatch, command):
    monkeypatch.delenv("DSPARK_API_KEY", raising=False)
    here = [*command, "--url", locked.url]
    assert main(here) == 2
    assert "401 expected a key" in capsys.readouterr().err
    assert main([*here, "--api-key", "wrong"]) == 2
    assert "401 the key is not valid" in capsys.readouterr().err
    for arguments, variable in ((["--api-key", "boss"], ""), ([], "boss")):
        monkeypatch.setenv("DSPARK_API_KEY", variable)
        main([*here, *arguments])
        assert "401" not in capsys.readouterr().err


# Keys in the configuration.


def keys_of(source: object) -> list[str]:
    return AppArgs.model_validate({"model": "tiny", "api_key": source}).api_keys()


def test_keys_come_from_the_file_itself_another_file_or_a_variable(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# users\none\n\n  two  \n")
    monkeypatch.setenv("SOME_KEYS", "one, two\n")
    assert keys_of(None) == []
    assert keys_of("one") == ["one"]
    assert keys_of(["one", "two"]) == ["one", "two"]
    assert keys_of({"file": str(file)}) == ["one", "two"]
    assert keys_of({"env": "SOME_KEYS"}) == ["one", "two"]


@pytest.mark.parametrize(
    "source", [[], "", " ", "two words", "schlüssel", {"env": "NOT_SET"}, {"file": "no-such-file"}]
)
def test_a_source_without_good_keys_is_refused_by_name(source):
    with pytest.raises(ConfigError, match=r"^api_key: "):
        keys_of(source)


@pytest.mark.parametrize("source", [5, {"path": "x"}, {"file": "x", "env": "y"}])
def test_another_source_is_refused(source):
    with pytest.raises(ValidationError, match="api_key"):
        keys_of(source)


def test_a_key_is_not_shown():
    args = AppArgs.model_validate({"model": "tiny", "api_key": ["hidden-1"], "admin_api_key": "hidden-2"})
    assert "hidden" not in repr(args)


# Error messages.

SECRET = "Traceback (most recent call last): ServeReplica:Engine() (pid=4242, ip=10.3.4.5) /models/x: my password"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(EngineFailed(SECRET), 500), (EngineBusy(SECRET), 503), (RuntimeError(SECRET), 500)]
)
def test_the_log_has_what_went_wrong_and_the_answer_an_id(server, caplog, error, status, stream):
    server.client.failure = error
    body = {"model": "echo", "prompt": "abc", "stream": stream}
    with caplog.at_level(logging.INFO, "ray.serve"):
        answer = HTTP.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "my-id.7"})
    assert answer.status_code == status
    assert not any(word in answer.text for word in ("Traceback", "4242", "10.3.4.5", "/models", "password"))
    assert error_of(answer)["request_id"] == answer.headers["x-request-id"] == "my-id.7"
    assert "my-id.7" in caplog.text
    assert "my password" in caplog.text


def test_a_failure_in_the_middle_of_a_stream_has_the_id_too(server, caplog):
    server.client.late_failure = EngineFailed(SECRET)
    body = {"model": "echo", "prompt": "abc", "max_tokens": 200, "stream": True}
    with caplog.at_level(logging.INFO, "ray.serve"):
        answer = HTTP.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "my-id.8"})
    last = json.loads(answer.text.strip().rpartition("data: ")[2])
    assert last["error"]["request_id"] == "my-id.8"
    assert "password" not in answer.text
    assert "my password" in caplog.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["my password", 1]}),
        ("/v1/completions", {"prompt": "my password" * 100}),
        ("/v1/completions", {"prompt": "my password \ud800"}),
        ("/v1/chat/completions", {"messages": "my password"}),
        ("/v1/chat/completions", {"messages": ["my password"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": {"my password": 1}}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "my password \ud800"}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ["my password"]}]}]},
        ),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "my password", "refusal": "x"}]}),
    ],
)
def test_an_error_does_not_repeat_the_prompt(server, path, body):
    content = json.dumps({"model": "echo", **body}).encode()
    answer = HTTP.post(f"{server.url}{path}", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "password" not in answer.text


# Request ids.


def test_an_id_is_made_where_none_came(server):
    first, second = (call(server, "GET", "/health").headers["x-request-id"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing", "/v1/completions"])
def test_a_well_formed_id_is_kept(server, path):
    assert call(server, "GET", path, **{"X-Request-Id": "a:B_c-1.2"}).headers["x-request-id"] == "a:B_c-1.2"


@pytest.mark.parametrize("request_id", ["", "x" * 129, "two words", "a\tb", "<script>", "a/b"])
def test_another_id_is_replaced(server, request_id):
    given = call(server, "GET", "/health", **{"X-Request-Id": request_id}).headers["x-request-id"]
    assert given != request_id
    assert len(given) == 32


@pytest.mark.parametrize("stream", [False, True])
def test_the_id_reaches_the_engine(server, echo, stream):
    body = {"model": "echo", "prompt": "abc", "n": 2, "stream": stream}
    for _ in range(2):  # A client may use an id twice.
        HTTP.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "mine"}).raise_for_status()
    assert all(request.request_id.startswith("mine/cmpl-") for request in echo.seen)
    assert len({request.request_id for request in echo.seen}) == 4


# Methods and browsers.


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/completions"), ("OPTIONS", "/v1/models"), ("PUT", "/health")]
)
def test_a_wrong_method_is_told_the_right_ones(server, method, path):
    answer = call(server, method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"]
    assert error_of(answer)["type"] == "invalid_request_error"


def test_all_methods_of_a_path_are_told(server):
    assert call(server, "PUT", "/admin/policy").headers["allow"] == "DELETE, POST"
    assert call(server, "PUT", "/health").headers["allow"] == "GET, HEAD"


def preflight(server: Server, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return call(server, "OPTIONS", "/v1/chat/completions", **headers)


def test_browsers_are_refused_unless_configured(server):
    answer = preflight(server, "https://page.example")
    assert "access-control-allow-origin" not in answer.headers


@pytest.fixture(scope="module")
def browsed(tokenizer: Tokenizer) -> Iterator[Server]:
    origins = ["https://page.example"]
    with running_server(tokenizer, EchoEngine(NUM_TOKENS, EOS), cors_origins=origins, api_keys=["one"]) as running:
        yield running


def test_pages_of_configured_origins_may_call(browsed):
    answer = preflight(browsed, "https://page.example")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    answer = call(browsed, "GET", "/v1/models", Origin="https://page.example", **bearer("one"))
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


def test_pages_of_other_origins_may_not(browsed):
    assert preflight(browsed, "https://evil.example").status_code == 400


def test_a_refusal_can_be_read_by_the_page(browsed):
    answer = call(browsed, "GET", "/v1/models", Origin="https://page.example")
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://page.example"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_form_of_another_page_sets_no_policy(server, echo, content_type):
    """Browsers send these content types to other origins without a preflight request."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = HTTP.post(f"{server.url}/admin/policy", content=b'{"bypass": true}', headers=headers)
    assert answer.status_code == 400
    assert echo.policies == []


def test_a_lost_engine_is_named_by_no_address(server):
    server.client.failure = EngineLost(SECRET)
    answer = HTTP.post(f"{server.url}/v1/completions", json={"model": "echo", "prompt": "abc"})
    assert answer.status_code == 503
    assert "10.3.4.5" not in answer.text
