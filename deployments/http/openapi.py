"""/openapi.json, made true: FastAPI documents answers that this server does not give.

No `from __future__ import annotations` in modules with FastAPI: it reads annotations.
"""

from typing import Any

from fastapi import FastAPI

_VALIDATION_SCHEMAS = ("HTTPValidationError", "ValidationError")


def describe(http: FastAPI) -> None:
    """Let the application's schema show what it answers: wrong fields are 400 in OpenAI's schema and never 422."""
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
