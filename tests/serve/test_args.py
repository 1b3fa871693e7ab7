"""The keys of a YAML file, and the errors for those that are wrong."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

import deployments
from autoscale.presets import load_preset
from autoscale.thresholds import FixedThreshold
from deployments.args import AppArgs, EngineArgs, LoadControllerArgs
from deployments.descriptions import field_descriptions
from deployments.replica.gang import actor_options, bundle_order
from dspark_ray.config import EngineConfig

PACKAGE = Path(deployments.__file__).parent
YAML_FILES = sorted(PACKAGE.glob("*.yaml"))


def args(**fields: object) -> AppArgs:
    return AppArgs.model_validate({"model": "tiny", **fields})


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_every_packaged_file_is_valid(path):
    for application in yaml.safe_load(path.read_text())["applications"]:
        AppArgs.model_validate(application["args"])


def test_a_relative_model_starts_at_the_package():
    assert args().checkpoint == PACKAGE / "tiny"
    assert args().model_name == "tiny"


def test_an_absolute_model_stays(tmp_path):
    assert args(model=str(tmp_path)).checkpoint == tmp_path


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"modle": "tiny"}, "modle\n  Extra inputs are not permitted"),
        ({"engine": {"max_num_seq": 3}}, "engine.max_num_seq\n  Extra inputs"),
        ({"engine": {"max_num_seqs": 0}}, "engine.max_num_seqs\n  Input should be greater than 0"),
        ({"speculative_config": {"method": "eagle"}}, "speculative_config.method\n  Input should be 'dspark'"),
        ({"dspark": {"drafter": {"placement": "pool"}}}, "Input should be 'inline' or 'actor'"),
        ({"placement": {"strategy": "NEAR"}}, "placement.strategy\n  Input should be 'PACK'"),
        ({"placement": {"verifier": [{}]}, "tensor_parallel_size": 2}, "has 1 entries: expected one per rank"),
        ({"placement": {"replica": {"CPU": -1}}}, "placement.replica.CPU\n  Input should be greater than 0"),
        ({"dspark": {"schedule": {"kind": "best"}}}, "Input should be 'causal', 'lagged', 'full' or 'fixed'"),
        ({"dspark": {"schedule": {"lag": 0}}}, "dspark.schedule.lag\n  Input should be greater than 0"),
        ({"dspark": {"schedule": {"lags": 1}}}, "dspark.schedule.lags\n  Extra inputs"),
        ({"dspark": {"confidence": {"threshold": 1.5}}}, "dspark.confidence.threshold\n  Input should be less than or"),
        ({"dspark": {"confidence": {"sts": "x"}}}, "dspark.confidence.sts\n  Extra inputs"),
        ({"dspark": {"cost_table": {"folder": "x"}}}, "dspark.cost_table.folder\n  Extra inputs"),
        (
            {"dspark": {"verification": "rejection", "schedule": {"kind": "full"}}},
            "schedule='full' with verification='rejection': a search over current confidences sees drafted tokens",
        ),
        (
            {
                "speculative_config": {"enable_adaptive_verification": False},
                "dspark": {"schedule": {"kind": "causal"}},
            },
            "dspark.schedule.kind='causal' with speculative_config.enable_adaptive_verification=false: expected fixed",
        ),
        (
            {
                "speculative_config": {"enable_adaptive_verification": True},
                "dspark": {"schedule": {"kind": "fixed"}},
            },
            "dspark.schedule.kind='fixed' with speculative_config.enable_adaptive_verification=true: expected causal",
        ),
        ({"load_controller": {"preset": "fast"}}, "load_controller.preset='fast': expected one of cost, latency"),
        (
            {"load_controller": {"heartbeat": 1}},
            "load_controller.heartbeat: unknown key; expected one of policy, signals",
        ),
        (
            {"load_controller": {"policy": {"kind": "fixed", "threshold": 1.5}}},
            "load_controller.policy.threshold=1.5: expected less than or equal to 1",
        ),
        (
            {"load_controller": {"signals": {"cpu": [0.9, 0.1]}}},
            "load_controller.signals.cpu=[0.9, 0.1]: expected [low, high] with low < high",
        ),
        (
            {"load_controller": {"policy": {"kind": "best"}}},
            "load_controller.policy.kind='best': expected one of fixed",
        ),
        ({"model": ""}, "model\n  String should have at least 1 character"),
    ],
)
def test_a_bad_key_or_value_is_named(fields, expected):
    with pytest.raises(ValidationError) as caught:
        args(**fields)
    assert expected in str(caught.value)


def numbers_of(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key under `args` that takes a number."""
    for name, field in model.model_fields.items():
        hints = typing.get_args(field.annotation) or (field.annotation,)
        if any(hint in (int, float) or typing.get_origin(hint) is Annotated for hint in hints):
            yield (*path, name)
        for hint in hints:
            if isinstance(hint, type) and issubclass(hint, BaseModel):
                yield from numbers_of(hint, (*path, name))


NUMBERS = sorted(set(numbers_of(AppArgs)))


def test_the_numbers_are_found():
    assert {("health", "peer_timeout_s"), ("engine", "num_pages"), ("tensor_parallel_size",)} <= set(NUMBERS)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 10**30], ids=str)
@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_every_number_has_a_range(path, value):
    fields = value
    for key in reversed(path):
        fields = {key: fields}
    with pytest.raises(ValidationError) as caught:
        args(**fields)
    assert ".".join(path) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("inf"), "expected more than 0 and at most 604800 seconds [type=value_error, input_value=inf"),
        (0, "expected more than 0 and at most 604800 seconds"),
        (1e9, "expected more than 0 and at most 604800 seconds"),
    ],
)
def test_a_timeout_outside_its_range_is_named_with_the_range(value, expected):
    with pytest.raises(ValidationError) as caught:
        args(health={"peer_timeout_s": value})
    assert f"health.peer_timeout_s\n  Value error, {expected}" in str(caught.value)


def test_engine_sizes_keep_the_engines_own_defaults():
    config = args(engine={"max_num_seqs": 3}, speculative_config={"num_speculative_tokens": 2}).engine_config()
    assert (config.max_num_seqs, config.gamma, config.speculation, config.page_size) == (3, 2, True, 128)


def test_without_a_word_about_schedules_the_engines_defaults_hold():
    config, default = args().engine_config(), EngineConfig()
    assert config == dataclasses.replace(default, cost_directory=config.cost_directory)


def test_every_field_of_the_schedule_reaches_the_engine():
    config = args(
        dspark={
            "schedule": {"kind": "lagged", "lag": 3, "bypass": False},
            "confidence": {"threshold": 0.25, "sts_path": "tiny/sts.json", "calibrate_online": False},
            "cost_table": {"path": "costs.json", "directory": None},
        }
    ).engine_config()
    assert (config.schedule, config.schedule_lag, config.bypass) == ("lagged", 3, False)
    assert (config.confidence_threshold, config.calibrate_online) == (0.25, False)
    assert (config.sts_path, config.cost_table) == (str(PACKAGE / "tiny" / "sts.json"), str(PACKAGE / "costs.json"))
    assert config.cost_directory is None


@pytest.mark.parametrize(
    ("variable", "expected"), [(None, "~/.cache/dspark-ray"), ("", "~/.cache/dspark-ray"), ("/c", "/c/dspark-ray")]
)
def test_profiled_costs_are_kept_in_the_users_cache_folder(monkeypatch, tmp_path, variable, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if variable is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert args().engine_config().cost_directory == expected.replace("~", str(tmp_path))


def test_a_folder_for_costs_is_taken_as_it_is(tmp_path):
    config = args(dspark={"cost_table": {"directory": str(tmp_path)}}).engine_config()
    assert config.cost_directory == str(tmp_path)


@pytest.mark.parametrize(
    ("adaptive", "kind", "expected"),
    [
        (None, None, (None, True)),
        (True, None, (None, True)),
        (True, "causal", ("causal", True)),
        (False, None, ("fixed", False)),
        (False, "fixed", ("fixed", False)),
    ],
)
def test_vllms_switch_chooses_between_a_schedule_and_whole_drafts(adaptive, kind, expected):
    config = args(
        speculative_config={"enable_adaptive_verification": adaptive}, dspark={"schedule": {"kind": kind}}
    ).engine_config()
    assert (config.schedule, config.bypass) == expected


def test_no_speculative_config_is_no_speculation_and_no_drafter():
    plain = args(speculative_config=None)
    assert not plain.engine_config().speculation
    assert not plain.has_draft_actor


def test_the_replica_shares_a_bundle_with_rank_0():
    placed = args(
        tensor_parallel_size=2,
        placement={
            "replica": {"CPU": 0.25},
            "verifier": {"resources": {"CPU": 0.5, "GPU": 1}},
            "drafter": {"resources": {"CPU": 1, "draft": 0.1}},
        },
    )
    assert placed.placement_options()["placement_group_bundles"] == [
        {"CPU": 0.75, "GPU": 1},
        {"CPU": 0.5, "GPU": 1},
        {"CPU": 1, "draft": 0.1},
    ]


def test_a_drafter_beside_rank_0_adds_to_its_bundle():
    placed = args(
        placement={
            "verifier": {"resources": {"GPU": 0.75}},
            "drafter": {"resources": {"GPU": 0.25}, "beside_rank_0": True},
        }
    )
    assert placed.placement_options()["placement_group_bundles"] == [{"CPU": 0.1, "GPU": 1.0}]
    assert placed.bundle_of_worker() == [0, 0]


def test_labels_become_selectors_by_bundle():
    placed = args(placement={"verifier": {"labels": {"zone": "a"}}, "drafter": {"labels": {"zone": "b"}}})
    assert placed.placement_options()["placement_group_bundle_label_selector"] == [{"zone": "a"}, {"zone": "b"}]


def test_ranks_are_ordered_by_node_and_rank_0_keeps_its_bundle():
    nodes = {0: "b", 1: "c", 2: "b", 3: "c", 4: "a"}
    assert bundle_order(args(tensor_parallel_size=4), nodes) == [0, 2, 1, 3, 4]


def test_ranks_with_a_placement_of_their_own_keep_their_bundles():
    placed = args(tensor_parallel_size=3, placement={"verifier": [{}, {}, {}]})
    assert bundle_order(placed, {0: "b", 1: "c", 2: "b", 3: "a"}) == [0, 1, 2, 3]


def test_resources_become_actor_options():
    assert actor_options({"CPU": 0.5, "GPU": 1, "disk": 2}) == {
        "num_cpus": 0.5,
        "num_gpus": 1,
        "resources": {"disk": 2},
    }


def test_without_a_policy_the_controller_raises_no_threshold():
    own = args(dspark={"confidence": {"threshold": 0.3}}).controller_config()
    assert (own.policy, own.lowest_threshold) == (FixedThreshold(threshold=0.0), 0.3)


def test_the_engines_own_threshold_is_a_floor_under_every_policy():
    own = {"confidence": {"threshold": 0.3}}
    assert args(dspark=own, load_controller={"preset": "throughput"}).controller_config().lowest_threshold == 0.3
    assert args(load_controller={"preset": "throughput"}).controller_config().lowest_threshold == 0.0
    higher = args(dspark=own, load_controller={"lowest_threshold": 0.4}).controller_config()
    assert higher.lowest_threshold == 0.4


@pytest.mark.parametrize("name", ["v4_flash.yaml", "v4_pro.yaml"])
def test_templates_follow_the_load(name):
    (application,) = yaml.safe_load((PACKAGE / name).read_text())["applications"]
    (controller,) = (each for each in application["deployments"] if each["name"] == "LoadController")
    config = LoadControllerArgs.model_validate(controller["user_config"]).config(0.0)
    assert config == load_preset("throughput").controller


def test_keys_beside_a_preset_replace_the_presets():
    config = args(load_controller={"preset": "latency", "heartbeat_seconds": 3}).controller_config()
    assert config == replace(load_preset("latency").controller, heartbeat_seconds=3)


def test_an_application_can_do_without_a_controller():
    assert args(load_controller=None).controller_config() is None


def test_the_queue_of_an_ingress_holds_all_that_an_engine_admits():
    sizes = args(engine={"max_num_seqs": 16, "max_waiting": 500})
    assert (sizes.max_ongoing_requests, sizes.max_queued_requests) == (516, 516)
    assert args(limits={"max_queued_requests": 3}).max_queued_requests == 3


def properties(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, described in schema.get("properties", {}).items():
        yield f"{path}.{name}", described


def test_every_key_has_a_description():
    schema = AppArgs.model_json_schema()
    found = [*properties(schema, "args")]
    for name, definition in schema["$defs"].items():
        found.extend(properties(definition, name))
    assert len(found) > 60
    assert [path for path, described in found if not described.get("description")] == []


def test_keys_of_the_engine_have_the_defaults_and_descriptions_of_its_configuration():
    texts, default = field_descriptions(EngineConfig), EngineConfig()
    for name, field in EngineArgs.model_fields.items():
        assert field.default == getattr(default, name)
        assert field.description == texts[name]
