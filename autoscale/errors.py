"""The error of load control and autoscaling. A module of its own because GPU machines read devices without pydantic."""

from __future__ import annotations


class PolicyError(ValueError):
    """An invalid setting of load control or autoscaling; the message has its key, its value and what is valid."""
