"""The keys under `args` in a YAML file, one model per section; unknown keys are refused.

Serve's own settings (num_replicas, autoscaling_config, ray_actor_options of the Ingress) belong under `deployments` in
the same file. The string below a field is its description in docs/configuration.md. Fields of the engine take theirs,
and their defaults, from dspark_ray.config.EngineConfig.

No `from __future__ import annotations` here: with it Serve would not validate the builder's arguments.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from autoscale.controller import ControllerConfig
from autoscale.presets import controller_config
from deployments.descriptions import field_descriptions
from deployments.http.keys import KeySource, read_keys
from deployments.user_cache import cache_directory
from dspark_ray.config import (
    CacheDType,
    ConfigError,
    DType,
    EngineConfig,
    ModelConfig,
    ResolvedConfig,
    ScheduleKind,
    VerificationMode,
)
from dspark_ray.types import MAX_DRAFT_TOKENS

_MAX_SECONDS = 7 * 86400.0
"""Longer timeouts would overflow the clocks of torch.distributed."""


def _in_seconds(expected: str, is_long_enough: Callable[[float], bool]) -> AfterValidator:
    def check(value: float) -> float:
        if is_long_enough(value) and value <= _MAX_SECONDS:
            return value
        raise ValueError(f"expected {expected} and at most {_MAX_SECONDS:.0f} seconds")

    return AfterValidator(check)


# Infinity and NaN are let through to the check, whose message names the range.
Seconds = Annotated[float, Field(allow_inf_nan=True), _in_seconds("more than 0", lambda value: value > 0)]
SecondsOrZero = Annotated[float, Field(allow_inf_nan=True), _in_seconds("0 or more", lambda value: value >= 0)]
Count = Annotated[int, Field(gt=0, le=2**20)]
Length = Annotated[int, Field(gt=0, le=2**31 - 1)]
"""In tokens, pages or bytes."""
NumDrafts = Annotated[int, Field(gt=0, le=MAX_DRAFT_TOKENS)]
Resources = dict[str, Annotated[float, Field(gt=0, le=1e9)]]
"""Amounts by the name of a Ray resource, such as CPU or GPU."""

_ENGINE_DEFAULTS = EngineConfig()
_ENGINE_DESCRIPTIONS = field_descriptions(EngineConfig)


def _of_engine(name: str, **constraints: Any) -> Any:
    """A field with the default and the description of EngineConfig's field `name`."""
    default = getattr(_ENGINE_DEFAULTS, name)
    return Field(default=default, description=_ENGINE_DESCRIPTIONS[name], **constraints)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class EngineArgs(_Section):
    """The sizes and number formats of one engine."""

    max_num_seqs: Count = _of_engine("max_num_seqs")
    max_num_batched_tokens: Count = _of_engine("max_num_batched_tokens")
    max_model_len: Length = _of_engine("max_model_len")
    num_pages: Length | None = _of_engine("num_pages")
    page_size: Count = _of_engine("page_size")
    max_waiting: Count = _of_engine("max_waiting")
    dtype: DType = _of_engine("dtype")
    keep_quantised: bool | None = _of_engine("keep_quantised")
    kv_cache_dtype: CacheDType = _of_engine("kv_cache_dtype")
    enforce_eager: bool = _of_engine("enforce_eager")


class SpeculativeArgs(_Section):
    """vLLM's section of the same name. The draft module is a part of the target's checkpoint."""

    method: Literal["dspark"] = "dspark"
    """The only method."""
    num_speculative_tokens: NumDrafts | None = None
    """Drafted tokens per request and round; null takes the checkpoint's dspark_block_size."""
    enable_adaptive_verification: bool | None = None
    """vLLM's name for `dspark.schedule`: false verifies every draft to its end, as `kind: fixed` does; true and null
    leave the choice to `dspark.schedule`."""


class DrafterArgs(_Section):
    """Where the draft module runs."""

    placement: Literal["inline", "actor"] = "actor"
    """`inline` runs it inside verifier rank 0, `actor` in an actor of its own."""


class ScheduleArgs(_Section):
    """How many drafted tokens of each request are verified, decided at every step."""

    kind: ScheduleKind | None = _of_engine("schedule")
    lag: NumDrafts = _of_engine("schedule_lag")
    bypass: bool = _of_engine("bypass")


class ConfidenceArgs(_Section):
    """How the drafter's confidences are used and calibrated."""

    threshold: float = _of_engine("confidence_threshold", ge=0, le=1)
    sts_path: str | None = None
    """A file with temperatures of the confidences in SGLang's STS format; a relative path starts at the `deployments`
    package. null takes the checkpoint's sts.json, if there is one."""
    calibrate_online: bool = _of_engine("calibrate_online")


class CostTableArgs(_Section):
    """The table of what steps cost in seconds, which schedules weigh against the tokens that drafts are expected to
    save."""

    path: str | None = None
    """A table of this project or of SGLang to use instead of profiling; a relative path starts at the `deployments`
    package."""
    directory: str | None = "default"
    """The folder on rank 0's node where profiled tables are kept for the next start; `default` is
    $XDG_CACHE_HOME/dspark-ray or ~/.cache/dspark-ray. null profiles at every start, which takes seconds to minutes."""

    def resolved_directory(self) -> str | None:
        """The folder on the node where this is called."""
        return cache_directory() if self.directory == "default" else _path_or_none(self.directory)


class DSparkArgs(_Section):
    """Settings of speculation that other engines do not have."""

    drafter: DrafterArgs = DrafterArgs()
    """The process of the draft module."""
    verification: VerificationMode = _of_engine("verification")
    rejection_top_k: Count = _of_engine("rejection_top_k")
    schedule: ScheduleArgs = ScheduleArgs()
    """How many drafted tokens are verified."""
    confidence: ConfidenceArgs = ConfidenceArgs()
    """Use and calibration of the drafter's confidences."""
    cost_table: CostTableArgs = CostTableArgs()
    """What steps cost."""


class WorkerPlacement(_Section):
    """Resources of one actor of the gang, and labels that its node must carry."""

    resources: Resources | None = None
    """null reserves one CPU, and one GPU where the device is cuda."""
    labels: dict[str, str] = {}
    """Ray's node labels."""


class DrafterPlacement(WorkerPlacement):
    """As for a verifier rank."""

    beside_rank_0: bool = False
    """Whether the drafter is placed in rank 0's bundle: with fractions of one GPU the two share a device."""


class PlacementArgs(_Section):
    """Where one replica's gang runs: a placement group with one bundle per verifier rank and one for the drafter."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Of every actor of the gang."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's strategy for the placement group; ranks need a fast interconnect."""
    replica: Resources = {"CPU": 0.1}
    """Resources of the Engine replica itself, which is always in rank 0's bundle."""
    verifier: WorkerPlacement | list[WorkerPlacement] = WorkerPlacement()
    """For all ranks, or a list with an entry per rank."""
    drafter: DrafterPlacement = DrafterPlacement()
    """For the drafter where it is an actor."""
    num_threads: Count | None = None
    """torch's threads per actor; null is 1 on a CPU and torch's default elsewhere."""
    environment: dict[str, str] = {}
    """Environment variables of every actor of the gang, such as NCCL_SOCKET_IFNAME."""


class LimitArgs(_Section):
    """Limits of admission, and how requests beyond them are answered."""

    max_ongoing_requests: Count | None = None
    """Per Engine replica; null is engine.max_num_seqs + engine.max_waiting."""
    max_queued_requests: Count | None = None
    """Requests per Ingress replica that wait until an Engine replica has room. null is max_ongoing_requests: all
    requests that one Engine replica admits pass through this queue when they arrive at once."""
    max_ingress_requests: Count = 4096
    """Connections per Ingress replica."""
    max_body_bytes: Length = 16 * 2**20
    """Of one HTTP request; larger ones get a 413."""
    max_waiting_prompts: Count = 64
    """Requests per Ingress replica that wait for a thread of the tokenizer; one more gets a 503."""
    retry_after_s: Count = 1
    """The header Retry-After of a 429 or 503."""
    max_resubmissions: int = Field(default=3, ge=0, le=1000)
    """How many engines may die while they serve a request before it is given up with a 503. A request that was in
    flight when an engine died runs at first with no other such request beside it, and is given up with a 500 when that
    engine dies too."""
    resubmission_deadline_s: Seconds = 30.0
    """How long a request looks for an engine after the loss of its own; longer than it takes to notice the loss of a
    node. It waits for a new replica as long as that takes to load where no other is left."""


class HttpArgs(_Section):
    """The HTTP application of every Ingress replica."""

    cors_origins: list[str] = []
    """Origins of web pages that may call from a browser, such as https://example.org, or "*" for all of them."""
    keep_alive_s: SecondsOrZero = 15.0
    """Seconds without an event after which a stream sends a comment, so that proxies keep it open; 0 sends none."""
    tokenizer_threads: Count = 2
    """Threads per Ingress replica that encode prompts."""


class HealthArgs(_Section):
    """Timeouts after which a process counts as hung or dead."""

    check_period_s: Seconds = 2.0
    """Serve's health_check_period_s of every deployment but the Ingress."""
    check_timeout_s: Seconds = 10.0
    """Serve's health_check_timeout_s of every deployment but the Ingress."""
    step_timeout_s: Seconds = 120.0
    """Silence after which rank 0, or the replica's event loop, counts as hung; longer than any step."""
    peer_timeout_s: Seconds = 60.0
    """Silence after which a member of the gang counts as dead to the others."""
    startup_timeout_s: Seconds = 1800.0
    """From the start of the actors until weights are loaded."""
    graceful_shutdown_timeout_s: SecondsOrZero = 600.0
    """How long a redeploy waits for streams to end; at least as long as the longest answer. Replicas that have failed
    end themselves and do not wait."""


class LoadControllerArgs(BaseModel):
    """Confidence thresholds per replica from the cluster's load. Without a policy it observes and limits nothing.

    Besides `preset`, every field of autoscale.controller.ControllerConfig is a key here; it replaces the preset's.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    preset: str | None = None
    """latency, throughput or cost: a file in autoscale/presets."""

    def config(self, own_threshold: float, path: str = "load_controller") -> ControllerConfig:
        """`own_threshold`, the engine's, is the lowest threshold. `path` names this section in errors.

        Raises ValueError.
        """
        config = controller_config(self.preset, self.model_extra or {}, path=path)
        return replace(config, lowest_threshold=max(config.lowest_threshold, own_threshold))


class AppArgs(_Section):
    """The application: one model, served by any number of gangs."""

    model: str = Field(min_length=1)
    """A checkpoint folder; a relative path starts at the `deployments` package, so `tiny` is the packaged one."""
    served_model_name: str | None = None
    """The name clients use; null is the last part of `model`."""
    tensor_parallel_size: Count = 1
    """Verifier ranks per Engine replica; a divisor of the model's o_groups and of its number of attention heads."""
    engine: EngineArgs = EngineArgs()
    """Sizes and number formats."""
    speculative_config: SpeculativeArgs | None = SpeculativeArgs()
    """null serves without speculation."""
    dspark: DSparkArgs = DSparkArgs()
    """Verification, schedule, confidences and costs."""
    placement: PlacementArgs = PlacementArgs()
    """Devices, resources and nodes."""
    limits: LimitArgs = LimitArgs()
    """Admission."""
    http: HttpArgs = HttpArgs()
    """Browsers, keep-alive comments and tokenizer threads."""
    api_key: KeySource = None
    """Keys of clients: one, a list, {file: PATH} or {env: NAME}. null serves every client that reaches the port."""
    admin_api_key: KeySource = None
    """Keys of the /admin routes. null serves these routes to processes of the same machine only."""
    health: HealthArgs = HealthArgs()
    """Timeouts of health checks, steps and peers."""
    load_controller: LoadControllerArgs | None = LoadControllerArgs()
    """null serves without a load controller."""

    @model_validator(mode="after")
    def _parts_agree(self) -> "AppArgs":
        self._check_adaptive_verification()
        self.engine_config()
        self.controller_config()
        verifier = self.placement.verifier
        if isinstance(verifier, list) and len(verifier) != self.tensor_parallel_size:
            raise ValueError(
                f"placement.verifier has {len(verifier)} entries: expected one per rank,"
                f" tensor_parallel_size={self.tensor_parallel_size}"
            )
        return self

    @property
    def checkpoint(self) -> Path:
        """The checkpoint folder; whether it exists is checked when it is read."""
        return _from_package(self.model)

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).name

    def api_keys(self) -> list[str]:
        """Call it in the process that serves HTTP, whose files and environment are read. Raises ConfigError."""
        return read_keys("api_key", self.api_key, _from_package)

    def admin_api_keys(self) -> list[str]:
        """As `api_keys`."""
        return read_keys("admin_api_key", self.admin_api_key, _from_package)

    @property
    def has_draft_actor(self) -> bool:
        return self.speculative_config is not None and self.dspark.drafter.placement == "actor"

    @property
    def max_ongoing_requests(self) -> int:
        return self.limits.max_ongoing_requests or self.engine.max_num_seqs + self.engine.max_waiting

    @property
    def max_queued_requests(self) -> int:
        return self.limits.max_queued_requests or self.max_ongoing_requests

    @property
    def num_threads(self) -> int | None:
        return self.placement.num_threads or (1 if self.placement.device == "cpu" else None)

    def engine_config(self) -> EngineConfig:
        """Call it on the engine's node, whose cache folder is meant. Raises ConfigError."""
        speculative, dspark = self.speculative_config, self.dspark
        schedule, confidence, cost_table = dspark.schedule, dspark.confidence, dspark.cost_table
        return EngineConfig(
            **self.engine.model_dump(),
            gamma=speculative.num_speculative_tokens if speculative else None,
            speculation=speculative is not None,
            verification=dspark.verification,
            rejection_top_k=dspark.rejection_top_k,
            device=self.placement.device,
            schedule="fixed" if self._verifies_all else schedule.kind,
            schedule_lag=schedule.lag,
            bypass=schedule.bypass and not self._verifies_all,
            confidence_threshold=confidence.threshold,
            sts_path=_path_or_none(confidence.sts_path),
            calibrate_online=confidence.calibrate_online,
            cost_table=_path_or_none(cost_table.path),
            cost_directory=cost_table.resolved_directory(),
        )

    def controller_config(self) -> ControllerConfig | None:
        """None without a load controller. Raises ValueError."""
        own_threshold = self.dspark.confidence.threshold
        return None if self.load_controller is None else self.load_controller.config(own_threshold)

    @property
    def _verifies_all(self) -> bool:
        """Whether vLLM's switch turns adaptive verification off."""
        return self.speculative_config is not None and self.speculative_config.enable_adaptive_verification is False

    def _check_adaptive_verification(self) -> None:
        """Raises ValueError where vLLM's switch contradicts `dspark.schedule.kind`."""
        adaptive = self.speculative_config and self.speculative_config.enable_adaptive_verification
        kind = self.dspark.schedule.kind
        if adaptive is None or kind is None or adaptive == (kind != "fixed"):
            return
        expected = "causal, lagged, full or null" if adaptive else "fixed or null"
        raise ValueError(
            f"dspark.schedule.kind={kind!r} with"
            f" speculative_config.enable_adaptive_verification={str(adaptive).lower()}:"
            f" expected {expected}, or no enable_adaptive_verification"
        )

    def resolve(self) -> tuple[ModelConfig, ResolvedConfig]:
        """The checkpoint's configuration, and the engine's for it. Raises ConfigError."""
        model = ModelConfig.from_file(self.checkpoint)
        if self.speculative_config is not None and model.dspark is None:
            raise ConfigError(
                f"{self.checkpoint}: no dspark_* keys in config.json: expected speculative_config: null for this model"
            )
        return model, self.engine_config().for_model(model)

    def worker_resources(self) -> list[Resources]:
        """Resources of every verifier rank, then of the drafter where it is an actor."""
        return [worker.resources or self._default_resources() for worker in self._workers()]

    def bundle_of_worker(self) -> list[int]:
        """The bundle of every verifier rank, then of the drafter; rank 0's is 0."""
        bundles = list(range(self.tensor_parallel_size))
        if self.has_draft_actor:
            bundles.append(0 if self.placement.drafter.beside_rank_0 else len(bundles))
        return bundles

    def placement_options(self) -> dict[str, Any]:
        """The placement group of one Engine replica, as Serve's deployment options."""
        bundles: list[Resources] = [{} for _ in set(self.bundle_of_worker())]
        labels: list[dict[str, str]] = [{} for _ in bundles]
        _add(bundles[0], self.placement.replica)
        for worker, index, resources in zip(
            self._workers(), self.bundle_of_worker(), self.worker_resources(), strict=True
        ):
            _add(bundles[index], resources)
            labels[index].update(worker.labels)
        options: dict[str, Any] = {
            "placement_group_bundles": bundles,
            "placement_group_strategy": self.placement.strategy,
        }
        if any(labels):
            options["placement_group_bundle_label_selector"] = labels
        return options

    def _workers(self) -> list[WorkerPlacement]:
        verifier = self.placement.verifier
        ranks = verifier if isinstance(verifier, list) else [verifier] * self.tensor_parallel_size
        return [*ranks, self.placement.drafter] if self.has_draft_actor else list(ranks)

    def _default_resources(self) -> Resources:
        return {"CPU": 1.0} if self.placement.device == "cpu" else {"CPU": 1.0, "GPU": 1.0}


def _from_package(path: str) -> Path:
    """Relative paths start at the `deployments` package."""
    return Path(__file__).parent / path


def _path_or_none(path: str | None) -> str | None:
    return None if path is None else str(_from_package(path))


def _add(bundle: Resources, resources: Resources) -> None:
    for name, amount in resources.items():
        bundle[name] = bundle.get(name, 0.0) + amount
