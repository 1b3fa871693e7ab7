"""What a YAML file may say under `args`: one model per block, unknown keys refused.

Serve's own settings (num_replicas, autoscaling_config, ray_actor_options of the Ingress) belong under
`deployments` in the same file.
No `from __future__ import annotations` here: with it Serve would not validate the builder's arguments.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from autoscale.controller import ControllerConfig
from autoscale.presets import controller_config
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

_ENGINE = EngineConfig()
_LONGEST_SECONDS = 7 * 86400.0
"""Whatever waits longer is no timeout, and clocks of torch.distributed overflow."""


def _in_seconds(lowest_words: str, is_low_enough: Callable[[float], bool]) -> AfterValidator:
    def check(value: float) -> float:
        if is_low_enough(value) and value <= _LONGEST_SECONDS:
            return value
        raise ValueError(f"expected {lowest_words} and at most {_LONGEST_SECONDS:.0f} seconds")

    return AfterValidator(check)


# Infinity and NaN are let through to the check, which knows the range.
Seconds = Annotated[float, Field(allow_inf_nan=True), _in_seconds("more than 0", lambda value: value > 0)]
SecondsOrZero = Annotated[float, Field(allow_inf_nan=True), _in_seconds("0 or more", lambda value: value >= 0)]
Count = Annotated[int, Field(gt=0, le=2**20)]
Length = Annotated[int, Field(gt=0, le=2**31 - 1)]
"""In tokens, pages or bytes."""
NumDrafts = Annotated[int, Field(gt=0, le=MAX_DRAFT_TOKENS)]
Resources = dict[str, Annotated[float, Field(gt=0, le=1e9)]]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EngineArgs(_Block):
    """One engine's sizes; see dspark_ray.config.EngineConfig."""

    max_num_seqs: Count = _ENGINE.max_num_seqs
    max_num_batched_tokens: Count = _ENGINE.max_num_batched_tokens
    max_model_len: Length = _ENGINE.max_model_len
    num_pages: Length | None = _ENGINE.num_pages
    page_size: Count = _ENGINE.page_size
    max_waiting: Count = _ENGINE.max_waiting
    dtype: DType = _ENGINE.dtype
    keep_quantised: bool | None = _ENGINE.keep_quantised
    kv_cache_dtype: CacheDType = _ENGINE.kv_cache_dtype
    enforce_eager: bool = _ENGINE.enforce_eager


class SpeculativeArgs(_Block):
    """vLLM's block of the same name. The draft module ships inside the target's checkpoint."""

    method: Literal["dspark"] = "dspark"
    num_speculative_tokens: NumDrafts | None = None
    """None takes the checkpoint's dspark_block_size."""
    enable_adaptive_verification: bool | None = None
    """false verifies every draft whole, as dspark.schedule.kind `fixed` does; true and None leave it to `schedule`."""


class DrafterArgs(_Block):
    placement: Literal["inline", "actor"] = "actor"
    """Inside verifier rank 0, or in an actor of its own."""


class ScheduleArgs(_Block):
    """How much of each draft is verified, decided anew every step."""

    kind: ScheduleKind | None = _ENGINE.schedule
    """None takes `full` with coupled and `lagged` with rejection verification."""
    lag: NumDrafts = _ENGINE.schedule_lag
    """Rounds by which the confidences that set the budget of `lagged` are old."""
    bypass: bool = _ENGINE.bypass
    """Draft for no request while drafting costs more than it brings."""


class ConfidenceArgs(_Block):
    """How far the drafter's own confidences are trusted."""

    threshold: float = Field(default=_ENGINE.confidence_threshold, ge=0, le=1)
    """Drafted positions whose survival is below this are not verified, whatever the schedule says."""
    sts_path: str | None = None
    """Temperatures in SGLang's STS JSON; a relative path starts where `model` does. None takes the checkpoint's
    sts.json, if it is there."""
    calibrate_online: bool = _ENGINE.calibrate_online
    """Refit the temperatures from what drafts come to."""


class CostTableArgs(_Block):
    """What a step costs, which schedules weigh against what it brings."""

    path: str | None = None
    """A table to use instead of profiling, ours or SGLang's; a relative path starts where `model` does."""
    directory: str | None = "default"
    """Where profiled tables are kept for the next start, on rank 0's node; `default` is $XDG_CACHE_HOME/dspark-ray or
    ~/.cache/dspark-ray. None profiles at every start, which takes seconds to minutes."""

    def in_use(self) -> str | None:
        """The folder on the node that this is called on."""
        return cache_directory() if self.directory == "default" else _path_or_none(self.directory)


class DSparkArgs(_Block):
    """What no other engine has a name for."""

    drafter: DrafterArgs = DrafterArgs()
    verification: VerificationMode = _ENGINE.verification
    """`coupled` keeps the text; `rejection` keeps its distribution and accepts more drafts."""
    rejection_top_k: Count = _ENGINE.rejection_top_k
    schedule: ScheduleArgs = ScheduleArgs()
    confidence: ConfidenceArgs = ConfidenceArgs()
    cost_table: CostTableArgs = CostTableArgs()


class WorkerPlacement(_Block):
    """What one actor of the gang takes from the cluster, and the labels its node must carry."""

    resources: Resources | None = None
    """None takes one CPU, and one GPU where the device is cuda."""
    labels: dict[str, str] = {}
    """Labels of Ray nodes, by key."""


class DrafterPlacement(WorkerPlacement):
    beside_rank_0: bool = False
    """In rank 0's bundle: with fractions of one GPU the two then share a device."""


class PlacementArgs(_Block):
    """Where the gang of one replica goes: a bundle per verifier rank, and one for the drafter."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Of verifiers and drafter."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Ray's placement strategy of the bundles; ranks need a fast interconnect."""
    replica: Resources = {"CPU": 0.1}
    """The Engine replica itself, always in rank 0's bundle."""
    verifier: WorkerPlacement | list[WorkerPlacement] = WorkerPlacement()
    """One for all ranks, or a list of one per rank."""
    drafter: DrafterPlacement = DrafterPlacement()
    num_threads: Count | None = None
    """torch's threads per actor; None is 1 on a CPU and torch's default elsewhere."""
    environment: dict[str, str] = {}
    """Variables of every actor of the gang, e.g. NCCL_SOCKET_IFNAME."""


class LimitArgs(_Block):
    """Admission limits, and the answer when they are exceeded."""

    max_ongoing_requests: Count | None = None
    """Per Engine replica; None lets in what the engine can run and queue."""
    max_queued_requests: Count | None = None
    """Per Ingress replica, waiting for an Engine replica to have room. None is max_ongoing_requests: all requests that
    one Engine replica admits pass through this queue when they arrive at once."""
    max_ingress_requests: Count = 4096
    """Connections per Ingress replica."""
    max_body_bytes: Length = 16 * 2**20
    """Of one HTTP request."""
    max_waiting_prompts: Count = 64
    """Requests per Ingress replica that wait for a thread of the tokenizer."""
    retry_after_s: Count = 1
    """Said with 429 and 503."""
    max_resubmissions: int = Field(default=3, ge=0, le=1000)
    """How often a request moves on when the gang that serves it dies. One that was in flight runs alone among such
    requests at first, and is given up when that gang dies too."""
    resubmission_deadline_s: Seconds = 30.0
    """How long a request tries to reach an engine that takes it over; longer than the loss of a node goes unnoticed.
    Where all have died it waits for a new one, as long as that takes to load."""


class HttpArgs(_Block):
    """The HTTP application of every Ingress replica."""

    cors_origins: list[str] = []
    """Origins of web pages that may call from a browser, such as https://example.org, or "*" for all of them."""
    keep_alive_s: SecondsOrZero = 15.0
    """A stream that is silent for so long carries a comment, so that proxies keep it open; 0 sends none."""
    tokenizer_threads: Count = 2
    """Threads that tokenise prompts, per Ingress replica."""


class HealthArgs(_Block):
    check_period_s: Seconds = 2.0
    """Between Serve's health checks of a replica."""
    check_timeout_s: Seconds = 10.0
    """Longest answer to one."""
    step_timeout_s: Seconds = 120.0
    """Rank 0 counts as hung when it is silent for so long, and so does the replica. Longer than any step."""
    peer_timeout_s: Seconds = 60.0
    """A member of the gang that is silent for so long counts as dead to the others."""
    startup_timeout_s: Seconds = 1800.0
    """From the start of the actors to weights loaded."""
    graceful_shutdown_timeout_s: SecondsOrZero = 600.0
    """At least the longest answer: a redeploy waits so long for streams to end. Replicas that cannot go on end
    themselves and do not wait."""


class LoadControllerArgs(BaseModel):
    """Thresholds per replica from the cluster's load. Without a policy it watches and bounds nothing.

    Besides `preset`, every field of autoscale.controller.ControllerConfig is a key here; it replaces the preset's.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    preset: str | None = None
    """latency, throughput or cost: a file in autoscale/presets."""

    def config(self, own_threshold: float, path: str = "load_controller") -> ControllerConfig:
        """`own_threshold` is the engine's: no threshold is below it. `path` is what errors call this block.

        Raises ValueError.
        """
        config = controller_config(self.preset, self.model_extra or {}, path=path)
        return replace(config, lowest_threshold=max(config.lowest_threshold, own_threshold))


class AppArgs(_Block):
    """The application: one model, served by any number of gangs."""

    model: str = Field(min_length=1)
    """A checkpoint folder; a relative path starts at the `deployments` package, so `tiny` is the packaged one."""
    served_model_name: str | None = None
    """The name clients use; None is the last part of `model`."""
    tensor_parallel_size: Count = 1
    """Verifier ranks per Engine replica; a divisor of the model's o_groups and number of attention heads."""
    engine: EngineArgs = EngineArgs()
    speculative_config: SpeculativeArgs | None = SpeculativeArgs()
    """null serves without speculation."""
    dspark: DSparkArgs = DSparkArgs()
    placement: PlacementArgs = PlacementArgs()
    limits: LimitArgs = LimitArgs()
    http: HttpArgs = HttpArgs()
    api_key: KeySource = None
    """Keys of clients: one, a list, {file: PATH} or {env: NAME}. null serves every client that reaches the port."""
    admin_api_key: KeySource = None
    """Keys of the /admin routes. null serves them to processes of the same machine alone."""
    health: HealthArgs = HealthArgs()
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
        """The checkpoint folder; that it exists is checked where it is read."""
        return _from_package(self.model)

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).name

    def api_keys(self) -> list[str]:
        """Call it where HTTP is served: files and variables are that process's. Raises ConfigError."""
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
        """Call it on the node that the engine is for: its cache folder is that node's. Raises ConfigError."""
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
            cost_directory=cost_table.in_use(),
        )

    def controller_config(self) -> ControllerConfig | None:
        """None without a load controller. Raises ValueError."""
        own_threshold = self.dspark.confidence.threshold
        return None if self.load_controller is None else self.load_controller.config(own_threshold)

    @property
    def _verifies_all(self) -> bool:
        """Whether adaptive verification was switched off by vLLM's name for it."""
        return self.speculative_config is not None and self.speculative_config.enable_adaptive_verification is False

    def _check_adaptive_verification(self) -> None:
        """Raises ValueError where vLLM's switch and our schedule say different things."""
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
        """Check the checkpoint's config against this. Raises ConfigError."""
        model = ModelConfig.from_file(self.checkpoint)
        if self.speculative_config is not None and model.dspark is None:
            raise ConfigError(
                f"{self.checkpoint}: no dspark_* keys in config.json: expected speculative_config: null for this model"
            )
        return model, self.engine_config().for_model(model)

    def worker_resources(self) -> list[Resources]:
        """Of every verifier rank, then of the drafter where it is an actor."""
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
