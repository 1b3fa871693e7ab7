"""Types of settings that YAML files give, with their ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, Strict

SETTINGS = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
"""Of every dataclass of settings: an unknown key is an error, and so is a number that is not finite. Defaults are
checked too, as they may not fit the fields that are given."""

Number = Annotated[float, Strict()]
"""A float or an int; neither a bool, which YAML makes of `yes`, nor a string."""
Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Whole = Annotated[int, Strict()]
