"""/openapi.json describes what the server does."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from http_server import HTTP, Server

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETION = {"prompt": "abc", "max_tokens": 4}


@pytest.fixture(scope="module")
def schema(shared_server: Server) -> dict[str, Any]:
    return HTTP.get(f"{shared_server.url}/openapi.json").json()


def operations(schema: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (method, path, operation) for path, methods in schema["paths"].items() for method, operation in methods.items()
    ]


def test_every_operation_has_a_summary_and_a_tag(schema):
    for method, path, operation in operations(schema):
        assert operation["summary"], (method, path)
        assert operation["tags"], (method, path)


def test_no_operation_promises_422(schema):
    for method, path, operation in operations(schema):
        assert "422" not in operation["responses"], (method, path)
    assert "HTTPValidationError" not in schema["components"]["schemas"]


def test_every_error_has_the_one_schema(schema):
    for method, path, operation in operations(schema):
        for status, response in operation["responses"].items():
            if status >= "400" and path != "/ready":
                [content] = response["content"].values()
                assert content["schema"]["$ref"].endswith("/ErrorAnswer"), (method, path, status)


def test_every_answer_has_a_model(schema):
    for method, path, operation in operations(schema):
        answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
        models = answer.get("anyOf", [answer])
        assert all("$ref" in model for model in models), (method, path)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_generation_documents_its_refusals(schema, path):
    statuses = schema["paths"][path]["post"]["responses"].keys()
    assert statuses == {"200", "400", "401", "404", "413", "429", "500", "503"}
    assert schema["paths"][path]["post"]["responses"]["200"]["content"].keys() == {
        "application/json",
        "text/event-stream",
    }


def test_keys_are_documented_where_they_count(schema):
    for method, path, operation in operations(schema):
        is_open = path in ("/health", "/ready")
        assert ("security" in operation) != is_open, (method, path)
        assert ("401" in operation["responses"]) != is_open, (method, path)


def test_fields_that_are_left_out_are_documented(schema):
    properties = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert properties["user"]["description"].startswith("Accepted")
    assert properties["best_of"]["enum"] == [None, 1]
    assert properties["top_k"]["anyOf"][0]["maximum"] == 2**31 - 1


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
        ("POST", "/v1/completions", COMPLETION),
        ("POST", "/v1/completions", {**COMPLETION, "logprobs": 2, "n": 2, "return_token_ids": True}),
        ("POST", "/v1/completions", {"prompt": 5}),
        ("POST", "/v1/completions", {**COMPLETION, "model": "other"}),
        ("POST", "/tokenize", {"prompt": "abc"}),
        ("GET", "/v1/models", None),
        ("GET", "/health", None),
        ("GET", "/ready", None),
        ("GET", "/version", None),
        ("GET", "/admin/steps", None),
        ("GET", "/admin/load", None),
        ("POST", "/admin/policy", {}),
    ],
)
def test_answers_have_the_schema_that_is_documented(server, schema, method, path, body):
    answer = HTTP.request(method, f"{server.url}{path}", json=body)
    documented = schema["paths"][path][method.lower()]["responses"][str(answer.status_code)]
    content = documented["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator({**content, "components": schema["components"]}).validate(answer.json())


@pytest.mark.parametrize(
    ("body", "is_valid"),
    [
        ({"role": "user", "content": "hi"}, True),
        ({"role": "user"}, False),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}, True),
        ({"role": "assistant", "content": "a", "name": "bob", "refusal": None, "annotations": [1]}, True),
        ({"role": "assistant", "content": "a", "refusal": "no"}, False),
        ({"role": "pirate", "content": "a"}, False),
    ],
)
def test_the_schema_of_a_message_agrees_with_the_server(server, schema, body, is_valid):
    validator = jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/ChatMessage", "components": schema["components"]}
    )
    assert validator.is_valid(body) == is_valid
    messages = [{"role": "user", "content": "hi"}, body]
    answer = HTTP.post(f"{server.url}/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert (answer.status_code == 200) == is_valid
