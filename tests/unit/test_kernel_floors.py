"""Floors of operations: counted by hand, and against the tensors that the benchmark measures with."""

from __future__ import annotations

import re

import pytest
import torch

import dspark_kernels
from benchmarks.gpu import kernels
from benchmarks.gpu.floors import CASES, FLASH, H100, H200, OPERATIONS, REQUESTS, TINY, Floor, distinct_experts
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.kernels import num_bytes, results_of
from dspark_kernels import reference

# Not all of their inputs is read: chosen experts and entries, single rows of pools and embeddings.
PARTLY_READ = {"compress", "markov_sample", "moe", "store_raw", "store_window"}
WHOLLY_READ = [
    case for case in CASES if case.op not in PARTLY_READ and not case.name.startswith("sparse_attention CSA")
]


def test_every_operation_with_a_kernel_has_a_floor() -> None:
    offered = {name for name in dspark_kernels.__all__ if hasattr(getattr(dspark_kernels, name), "__wrapped__")}
    assert offered == set(OPERATIONS)


def test_the_slower_of_memory_and_arithmetic_is_the_floor() -> None:
    moved = Floor(4.3e12, {"bf16": 395e12, "fp32": 6.7e12})
    assert moved.seconds() == pytest.approx(1.0)
    assert moved.bound() == "memory"
    computed = Floor(4.3e12, {"bf16": 1580e12})
    assert computed.seconds() == pytest.approx(2.0)
    assert computed.bound() == "bf16"
    assert moved.seconds(H100) > moved.seconds(H200)


@pytest.mark.parametrize("case", WHOLLY_READ, ids=lambda case: case.name)
def test_floors_count_the_tensors_that_are_measured(case: kernels.Case) -> None:
    with torch.no_grad():
        args = Inputs(TINY, 3, torch.device("cpu")).of(case)
        results = results_of(getattr(reference, case.op), case, args)
    assert case.floor(3, TINY).bytes == num_bytes(args) + num_bytes(results)


@pytest.mark.parametrize("case", [case for case in CASES if case.op.startswith("store_")], ids=lambda case: case.name)
def test_a_store_moves_only_the_rows_it_writes(case: kernels.Case) -> None:
    args = Inputs(TINY, 3, torch.device("cpu")).of(case)
    pool, slots = (args[place] for place in kernels.WRITTEN[case.op])
    # Of the indexer's and CSA's position bias all rows are needed, of HCA's as many as there are tokens.
    unused_bias = (128 - len(slots)) * args[2].shape[1] * 4 if case.name == "store_raw HCA" else 0
    expected = num_bytes(arg for arg in args if arg is not pool) + num_bytes([pool[slots]]) - unused_bias
    assert case.floor(3, TINY).bytes == expected


def test_norm_of_one_request_by_hand() -> None:
    floor = OPERATIONS["rms_norm"].floor(FLASH, 1, "hidden")
    assert floor.bytes == (6 + 6 + 1) * 4096 * 2  # six rows in, six out, the weight; bfloat16
    assert floor.operations == {"fp32": 4 * 6 * 4096}


def test_attention_over_chosen_entries_by_hand() -> None:
    floor = OPERATIONS["sparse_attention"].floor(FLASH, 256, "CSA")
    assert floor.operations["bf16"] == 2 * 2 * 1536 * 64 * 640 * 512  # two products over 128 + 512 keys
    query_and_values = 2 * 1536 * 64 * 512 * 2
    keys, index = 256 * (128 + 5 + 512) * 1024, 1536 * 640 * 8
    assert floor.bytes == query_and_values + keys + index + 1536 * 64 * 4 + 64 * 4


def test_a_packed_key_has_584_bytes() -> None:
    assert FLASH.key_bytes == 584


def test_experts_without_rows_are_not_read() -> None:
    assert distinct_experts(FLASH, 1) == pytest.approx(6)
    assert distinct_experts(FLASH, 2) == pytest.approx(12 - 36 / 256)  # a pair is the same with probability 1/256
    assert distinct_experts(FLASH, 1536) == pytest.approx(256)


def test_the_markov_matrix_is_read_again_at_every_position_but_for_what_l2_keeps() -> None:
    floor = OPERATIONS["markov_sample"].floor(FLASH, 1, "")
    matrix = 129280 * 256 * 2
    logits, rest = 5 * 129280 * 4, 5 * 256 * 2 + 4 * 8 + 5 * 12
    assert floor.bytes == matrix + 4 * (matrix - 60e6) + logits + rest


@pytest.mark.parametrize("requests", REQUESTS)
def test_windows_that_close_are_one_in_so_many_rows(requests: int) -> None:
    for variant, ratio in (("CSA", 4), ("indexer", 4), ("HCA", 128)):
        assert FLASH.closing(requests, variant) == max(1, round(6 * requests / ratio))


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "compress"], ids=lambda case: case.name)
def test_windows_of_the_inputs_share_no_numbers(case: kernels.Case) -> None:
    _, index, *_, store_entries, _ = Inputs(TINY, 7, torch.device("cpu")).of(case)
    closing = index[store_entries >= 0]
    assert len(closing) == TINY.closing(7, case.variant)
    assert (index[store_entries < 0] == -1).all()
    series = closing.chunk(2, dim=1) if case.variant != "HCA" else (closing,)
    for rows in series:
        assert rows.unique().numel() == rows.numel()


@pytest.mark.parametrize("mark", ["floors", "measured"])
def test_the_readme_has_the_tables_that_the_program_prints(mark: str) -> None:
    readme = kernels.README.read_text()
    shown = re.search(f"<!-- {mark}:start -->\n(.*?)\n<!-- {mark}:end -->", readme, re.DOTALL)
    assert shown is not None, f"kernels/README.md has no marks {mark}"
    assert shown[1] == kernels.tables(kernels.RESULT)[mark], "python -m benchmarks.gpu.kernels --readme writes it anew"


def test_a_measurement_becomes_a_cell() -> None:
    spread = {"min": 11.0, "median": 12.0, "max": 13.0}
    figures = {
        "kernel_us": spread,
        "baseline_us": spread,
        "baseline": "compiled",
        "floor_us": 8.0,
        "bound": "memory",
        "over_floor": 1.5,
        "baseline_over_kernel": 3.25,
    }
    origin = {
        "machine": {"gpu": "NVIDIA H200"},
        "date": "2026-11-24T00:00:00",
        "commit": "0123456789abcdef",
        "versions": {"torch": "2", "triton": "3"},
    }
    results = {"mhc_read": {"8": figures, "32": {"problem": "out of memory"}}}
    table = kernels.measured_table({"origin": origin, "results": results})
    assert "| mhc_read |  | 12 (1.5; 3.2) | failed |  |  | compiled |" in table
    assert "commit 0123456789" in table
