"""Verification bounds of every replica, from device loads and heartbeats. Arithmetic only: the caller passes the time.

State is rebuilt from heartbeats: a restarted controller continues from the thresholds that replicas report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from autoscale.errors import PolicyError
from autoscale.goodput import GoodputSearch
from autoscale.saturation import Saturation, SignalName, SignalScale, device_parts, saturation_of
from autoscale.settings import SETTINGS, Number, Positive, Share, Whole
from autoscale.signals import DeviceLoad, LoadSample, NodeLoad
from autoscale.thresholds import FixedThreshold, LoadCurve, Regulator, ThresholdPolicy

_EPSILON = 1e-9
_MOST_DRAFT_TOKENS = 1024
_LONGEST_SECONDS = 3600.0
_MOST_HEARTBEATS = 10_000.0
"""Engines refuse policies beyond these limits."""


Policy = Annotated[FixedThreshold | LoadCurve | GoodputSearch, Field(discriminator="kind")]


@settings(frozen=True, kw_only=True, config=SETTINGS)
class ControllerConfig:
    """Settings of the load controller."""

    policy: Policy = field(default_factory=FixedThreshold)
    signals: SignalScale = field(default_factory=SignalScale)
    lowest_threshold: Share = 0.0
    """Floor under every threshold, a policy's or an operator's. The engine's own setting,
    `dspark.confidence.threshold`, is a floor as well."""
    max_draft_tokens: Annotated[Whole, Field(ge=0, le=_MOST_DRAFT_TOKENS)] | None = None
    """Draft limit per request and round; None leaves it to the engine."""
    bypass_above: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Saturation above which nothing is drafted; None leaves that to the engines, which measure whether drafting
    pays."""
    heartbeat_seconds: Annotated[Number, Field(gt=0, le=_LONGEST_SECONDS)] = 1.0
    """Interval between the heartbeats of a replica."""
    max_heartbeats_per_second: Positive = 500.0
    """Of all replicas together; with more replicas, the interval grows."""
    valid_heartbeats: Annotated[Number, Field(ge=2, le=_MOST_HEARTBEATS)] = 5.0
    """A policy expires after so many heartbeats without an answer."""
    stale_seconds: Positive = 10.0
    """A node whose last reading is older counts as unknown."""
    preset: str | None = field(default=None, compare=False)
    """Origin of the other settings; the autoscaling policy takes its rule from the same preset."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of verification in one replica."""

    confidence_threshold: float = 0.0
    """Drafted positions with a lower survival probability are not verified."""
    max_draft_tokens: int | None = None
    bypass: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to a heartbeat."""

    bounds: Bounds
    version: int
    """Rises when the bounds change."""
    valid_seconds: float
    heartbeat_seconds: float
    """Seconds until the next heartbeat is due."""
    range_used: float | None
    """Position of the threshold in the policy's range, 0 at the lowest and 1 at the highest. None where the policy has
    a single threshold, and while an operator's bounds are in force, which do not follow the load."""
    saturation: Saturation
    before: Bounds | None = None
    """The previous bounds, where they changed."""
    preset: str | None = None
    """The preset of the configuration in force."""


@dataclass(frozen=True)
class _Override:
    bounds: Bounds
    until: float


@dataclass(slots=True)
class _Replica:
    """State of one replica."""

    sample: LoadSample
    regulator: Regulator
    bounds: Bounds
    version: int
    seen_at: float
    saturation: Saturation = field(default_factory=lambda: Saturation(0.0, None, {}))
    bypass: bool = False


@dataclass(slots=True)
class _Node:
    load: NodeLoad
    seen_at: float
    parts: dict[str, dict[SignalName, float]]
    """Signals by device; each device stands under every name that Ray may use for it."""


class LoadController:
    """One heartbeat in, one decision out."""

    _BYPASS_HYSTERESIS = 0.1

    def __init__(self, config: ControllerConfig, policy: ThresholdPolicy | None = None) -> None:
        """`policy` takes the place of the configuration's; it may be one that no setting can name."""
        self.config = config
        self._policy: ThresholdPolicy = policy or config.policy
        self._nodes: dict[str, _Node] = {}
        self._replicas: dict[str, _Replica] = {}
        self._overrides: dict[str | None, _Override] = {}

    @property
    def replicas(self) -> list[str]:
        """Names of the known replicas."""
        return list(self._replicas)

    def on_node(self, load: NodeLoad, now: float) -> None:
        """Take the load of a node from its probe."""
        parts: dict[str, dict[SignalName, float]] = {}
        for device in load.devices:
            scaled = device_parts(device, self.config.signals)
            for name in _names_of(device):
                parts[name] = scaled
        self._nodes[load.node_id] = _Node(load, now, parts)

    def reconfigure(self, config: ControllerConfig) -> None:
        """Use another configuration; thresholds continue from their present values, overrides stay in force."""
        self.config, self._policy = config, config.policy
        for node in list(self._nodes.values()):
            self.on_node(node.load, node.seen_at)
        for replica in self._replicas.values():
            replica.regulator = self._policy.regulator(replica.bounds.confidence_threshold, config.lowest_threshold)

    def forget_node(self, node_id: str) -> None:
        """Drop a node that has left the cluster."""
        self._nodes.pop(node_id, None)

    @property
    def wants_devices(self) -> bool:
        """Whether decisions depend on device loads; with a fixed threshold they do not."""
        return self.config.bypass_above is not None or not isinstance(self._policy, FixedThreshold)

    @property
    def node_ids(self) -> set[str]:
        """Nodes on which actors of replicas run."""
        return {place.node_id for replica in self._replicas.values() for place in replica.sample.places}

    def on_sample(self, sample: LoadSample, now: float) -> Decision:
        """Answer a heartbeat. Raises PolicyError for an impossible sample."""
        if sample.max_running <= 0:
            raise PolicyError(f"max_running={sample.max_running}: expected a positive number")
        replica = self._replicas.get(sample.replica)
        if replica is None:
            replica = self._replicas[sample.replica] = self._new_replica(sample, now)
        replica.sample, replica.seen_at = sample, now
        replica.saturation = saturation_of(sample, self._devices_of(sample, now), self.config.signals)
        bounds = self._bounds_of(replica, now)
        before = replica.bounds if bounds != replica.bounds else None
        if before is not None:
            replica.bounds, replica.version = bounds, replica.version + 1
        heartbeat = self.heartbeat_seconds
        return Decision(
            bounds,
            replica.version,
            self.config.valid_heartbeats * heartbeat,
            heartbeat,
            self._range_used(replica, now),
            replica.saturation,
            before,
            self.config.preset,
        )

    def override(self, bounds: Bounds, seconds: float | None, now: float, replica: str | None = None) -> None:
        """Set an operator's bounds in place of the policy's, for one replica or for all. None seconds never expires."""
        until = math.inf if seconds is None else now + seconds
        self._overrides[replica] = _Override(bounds, until)

    def end_override(self, replica: str | None = None) -> None:
        """Return one replica to the policy; None returns all, including those with overrides of their own."""
        if replica is None:
            self._overrides.clear()
        self._overrides.pop(replica, None)

    def forget_silent(self, now: float) -> list[str]:
        """Drop replicas whose policies have expired, stale nodes and ended overrides; returns the dropped replicas."""
        silent = self.config.valid_heartbeats * self.heartbeat_seconds
        gone = [name for name, replica in self._replicas.items() if now - replica.seen_at > silent]
        for name in gone:
            del self._replicas[name]
        for node_id in [n for n, node in self._nodes.items() if now - node.seen_at > self.config.stale_seconds]:
            del self._nodes[node_id]
        self._overrides = {name: o for name, o in self._overrides.items() if o.until > now}
        return gone

    def view(self, now: float) -> dict[str, Any]:
        """Nodes and replicas, as JSON values."""
        return {"nodes": list(self._view_nodes(now)), "replicas": list(self._view_replicas(now))}

    def _new_replica(self, sample: LoadSample, now: float) -> _Replica:
        regulator = self._policy.regulator(sample.threshold, self.config.lowest_threshold)
        # Versions continue from the replica's, so that they rise across controllers; 0 is the engine's own policy.
        return _Replica(sample, regulator, Bounds(sample.threshold), sample.policy_version + 1, now)

    def _devices_of(self, sample: LoadSample, now: float) -> list[dict[SignalName, float]]:
        devices = []
        for place in sample.places:
            node = self._nodes.get(place.node_id)
            if node is None or now - node.seen_at > self.config.stale_seconds:
                continue
            for name in place.accelerators or ("cpu",):
                parts = node.parts.get(name)
                if parts:
                    devices.append(parts)
        return devices

    def _bounds_of(self, replica: _Replica, now: float) -> Bounds:
        sample, saturation = replica.sample, replica.saturation.value
        threshold = replica.regulator.update(sample, saturation, now)
        replica.bypass = self._is_bypassed(replica.bypass, saturation)
        override = self._override_of(sample.replica, now)
        if override is not None:
            return self._above_the_floor(override)
        bounds = self._above_the_floor(Bounds(threshold, self.config.max_draft_tokens, replica.bypass))
        is_near = abs(bounds.confidence_threshold - replica.bounds.confidence_threshold) < _EPSILON
        is_same = is_near and bounds == replace(replica.bounds, confidence_threshold=bounds.confidence_threshold)
        return replica.bounds if is_same else bounds

    def _above_the_floor(self, bounds: Bounds) -> Bounds:
        return replace(bounds, confidence_threshold=max(bounds.confidence_threshold, self.config.lowest_threshold))

    def _override_of(self, name: str, now: float) -> Bounds | None:
        """The operator's bounds in force: those for this replica, else those for all."""
        for key in (name, None):
            override = self._overrides.get(key)
            if override is not None and override.until > now:
                return override.bounds
        return None

    def _range_used(self, replica: _Replica, now: float) -> float | None:
        is_overridden = self._override_of(replica.sample.replica, now) is not None
        return None if is_overridden else replica.regulator.range_used

    def _is_bypassed(self, before: bool, saturation: float) -> bool:
        limit = self.config.bypass_above
        if limit is None:
            return False
        return saturation > (limit - self._BYPASS_HYSTERESIS if before else limit)

    @property
    def heartbeat_seconds(self) -> float:
        """Interval between the heartbeats of a replica, for the present number of replicas."""
        return max(self.config.heartbeat_seconds, len(self._replicas) / self.config.max_heartbeats_per_second)

    def _view_nodes(self, now: float) -> Iterator[dict[str, Any]]:
        for node in self._nodes.values():
            yield {**asdict(node.load), "age_seconds": now - node.seen_at}

    def _view_replicas(self, now: float) -> Iterator[dict[str, Any]]:
        for name, replica in self._replicas.items():
            yield {
                "sample": asdict(replica.sample),
                "bounds": asdict(replica.bounds),
                "version": replica.version,
                "spent": self._range_used(replica, now),  # the published name
                "saturation": asdict(replica.saturation),
                "overridden": self._override_of(name, now) is not None,
                "age_seconds": now - replica.seen_at,
            }


def _names_of(device: DeviceLoad) -> tuple[str, ...]:
    """The names that Ray may use for it. A MIG instance is named by UUID alone: its index is that of its parent."""
    if device.kind == "cpu":
        return ("cpu",)
    return (str(device.index), device.uuid) if device.kind == "gpu" else (device.uuid,)
