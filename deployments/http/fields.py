"""Types of request fields, and the treatment of fields that this server does not implement."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dspark_ray.types import (
    MAX_DRAFT_TOKENS,
    MAX_INT64,
    MAX_TOKEN_ID,
    MIN_INT64,
    RequestError,
)

logger = logging.getLogger("ray.serve")

_WHOLE = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_DECIMAL = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?", re.ASCII)

MAX_FIELDS = 100
"""Per object, as each unknown field would become an error of its own."""


def _integral(value: Any) -> Any:
    """Some clients write 16.0 or "16" for 16."""
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _decimal(value: Any) -> Any:
    """Some clients write "0.5" for 0.5."""
    return float(value) if isinstance(value, str) and _DECIMAL.fullmatch(value) else value


def _integral_items(values: Any) -> Any:
    if not isinstance(values, list) or float not in set(map(type, values)):
        return values
    are_integral = all(value.is_integer() for value in values if isinstance(value, float))
    return list(map(_integral, values)) if are_integral else values


def _encodable(text: str) -> str:
    """Raises ValueError for lone surrogates, which JSON can spell but no encoding can represent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected valid Unicode, got half of a surrogate pair") from None
    return text


# In `Annotated`, bounds come before these, or the JSON schema would lack them.
ENCODABLE = AfterValidator(_encodable)
INTEGRAL = BeforeValidator(_integral)
DECIMAL = BeforeValidator(_decimal)
INTEGRAL_ITEMS = BeforeValidator(_integral_items)
"""For lists of integers: calls a function per list, and per item only where some items are floats."""

Text = Annotated[str, ENCODABLE]
Seed = Annotated[int, Field(ge=MIN_INT64, le=MAX_INT64), INTEGRAL]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[Finite, Field(ge=0, le=1), DECIMAL]
DraftTokens = Annotated[int, Field(ge=0, le=MAX_DRAFT_TOKENS), INTEGRAL]


@cache
def note_ignored(kind: str) -> None:
    """Log once per kind, as clients send the same fields with every request."""
    logger.info("requests have %s, which is accepted and changes nothing", kind)


class Schema(BaseModel):
    """An object of a request. Null means absent, as in OpenAI's API; unknown fields are refused.

    `_IGNORED` fields cannot change the text and are accepted. `_ONLY` fields would change the answer in ways that are
    not implemented; only the listed values, which ask for nothing, are accepted.
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=lambda schema, cls: cls._describe(schema))

    _IGNORED: ClassVar[frozenset[str]] = frozenset()
    _ONLY: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, data: Any) -> Any:
        """Remove ignored fields. Raises RequestError for a field that asks for something that is not implemented."""
        if not isinstance(data, Mapping):
            return data
        if len(data) > MAX_FIELDS:
            raise RequestError("", f"{len(data)} fields: expected at most {MAX_FIELDS}")
        for name in cls._ONLY.keys() & data.keys():
            if data[name] is not None and data[name] not in cls._ONLY[name]:
                raise RequestError(name, f"{name}: this server does not support it; {_expected(cls._ONLY[name])}")
        for name in cls._IGNORED & data.keys():
            note_ignored(f"the field {name}")
        left_out = cls._IGNORED | cls._ONLY.keys()
        return {key: value for key, value in data.items() if value is not None and key not in left_out}

    @classmethod
    def _describe(cls, schema: dict[str, Any]) -> None:
        """Add the ignored and the restricted fields to the JSON schema."""
        properties = schema.setdefault("properties", {})
        for name in sorted(cls._IGNORED):
            properties[name] = {"description": "Accepted; changes nothing."}
        for name, values in sorted(cls._ONLY.items()):
            allowed = [None, *(value for value in values if value is not None)]
            properties[name] = {"enum": allowed, "description": "Not supported: only values that ask for nothing."}


def _expected(values: tuple[Any, ...]) -> str:
    return " or ".join(["expected null", *(f"{value!r}" for value in values)])


class LimitsSchema(Schema):
    """The limits that requests and operators may set; absent ones limit nothing."""

    confidence_threshold: Share | None = None
    max_draft_tokens: DraftTokens | None = None
