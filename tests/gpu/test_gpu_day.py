"""The day on a GPU, gone through without one: every stage, every kind of figure, and what failures cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu.claims import CLAIMS, verdicts
from benchmarks.gpu.comparisons import comparisons
from benchmarks.gpu.records import (
    KINDS,
    STAGE_KINDS,
    NanDraw,
    Record,
    RowBits,
    SignalReading,
    StartUp,
    Text,
    TextComparison,
    TileTime,
    from_json,
    to_json,
)
from benchmarks.gpu.row_bits import first_rows
from benchmarks.gpu.stage import Job, Stage, StageResult, StageRun, append, read_records
from benchmarks.gpu.tables import markdown

ROOT = Path(gpu_day.__file__).resolve().parents[1]
NOT_ON_GPU_MACHINES = ("ray", "pydantic", "fastapi", "zmq", "openai")
MOST_FILES = 8


# The first test that needs it waits for a whole dry run, which all of them share.
pytestmark = [pytest.mark.timeout(1500), pytest.mark.slow]


@pytest.fixture(scope="module")
def dry_day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a dry run that could import nothing of what GPU machines lack."""
    folder, blocked = tmp_path_factory.mktemp("day"), tmp_path_factory.mktemp("blocked")
    lines = [f"sys.modules[{name!r}] = None" for name in NOT_ON_GPU_MACHINES]
    (blocked / "sitecustomize.py").write_text("\n".join(["import sys", *lines]))
    path = os.pathsep.join([str(blocked), str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "benchmarks.gpu_day", "--dry-run", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    logs = "\n".join(f"{log.name}\n{log.read_text()[-2000:]}" for log in folder.glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    return folder


def test_a_dry_run_records_every_field_of_every_kind_of_figure(dry_day: Path) -> None:
    day = json.loads((dry_day / gpu_day.FIGURES).read_text())
    assert day["dry_run"]
    assert list(day["stages"]) == list(STAGE_KINDS) == list(gpu_day.LIMITS)
    for name, kinds in STAGE_KINDS.items():
        stage = day["stages"][name]
        assert stage["status"] == "ended", stage
        assert set(stage["figures"]) == {kind.__name__ for kind in kinds}
        for kind in kinds:
            records = stage["figures"][kind.__name__]
            assert records, f"{name} recorded no {kind.__name__}"
            assert all(set(record) == {field.name for field in fields(kind)} for record in records)
    assert [claim["claim"] for claim in day["claims"]] == list(CLAIMS)
    assert {"command", "commit", "date", "machine", "driver", "versions"} <= set(day["origin"])
    assert {"torch", "triton", "transformers"} <= set(day["origin"]["versions"])


def test_what_ran_in_a_dry_run_ran_without_problems(dry_day: Path) -> None:
    stages = json.loads((dry_day / gpu_day.FIGURES).read_text())["stages"]
    problems = {
        (kind, record.get("op") or record.get("model")): record["problem"]
        for stage in stages.values()
        for kind, records in stage["figures"].items()
        for record in records
        if record.get("problem") and kind != "NanDraw"  # whose problems are figures
    }
    assert problems == {}
    outcomes = {record["outcome"] for record in stages["tests"]["figures"]["TestOutcome"]}
    assert outcomes == {"passed"}
    assert {record["check"] for record in stages["benchmarks"]["figures"]["KernelTime"]} == {"equal"}


def test_every_kind_of_figure_but_the_texts_has_a_table(dry_day: Path) -> None:
    day = json.loads((dry_day / gpu_day.FIGURES).read_text())
    text = markdown(day)
    assert text.startswith("A dry run")
    assert text.count("\n### ") == 2 + len(KINDS) - 1
    assert all(claim in text for claim in CLAIMS)


def test_a_day_leaves_no_more_files_than_come_back_from_a_lent_machine(dry_day: Path) -> None:
    names = {path.name for path in dry_day.iterdir()}
    assert {gpu_day.FIGURES, gpu_day.KERNELS, gpu_day.ROUND, *(f"{name}.log" for name in STAGE_KINDS)} == names
    assert len(names) <= MOST_FILES


# --- jobs that fail, hang or are killed ---------------------------------------------------------------------------


def python(name: str, code: str, seconds: float = 60.0) -> Job:
    return Job(name, [sys.executable, "-c", code], seconds)


def recording(path: Path, op: str) -> str:
    """Code of a job that records one figure."""
    return (
        "from pathlib import Path; from benchmarks.gpu.stage import append; from benchmarks.gpu.records import RowBits;"
        f"append(Path({str(path)!r}), RowBits({op!r}, [1], [True], [0], ''))"
    )


def run_stage(tmp_path: Path, *batches: list[Job], seconds: float = 60.0, on_change: Any = None) -> StageResult:
    stage = Stage("checks", seconds, batches, workers=2)
    return StageRun(stage, tmp_path / "log", ROOT, on_change or (lambda result: None)).run()


def test_a_job_that_fails_costs_only_itself(tmp_path: Path) -> None:
    records = tmp_path / "records"
    result = run_stage(
        tmp_path,
        [python("bad", "print('reason'); raise SystemExit(3)"), python("good", recording(records, "good"))],
        [python("later", recording(records, "later"))],
    )
    assert [(job.name, job.status, job.exit_code) for job in result.jobs] == [
        ("bad", "failed", 3),
        ("good", "ended", 0),
        ("later", "ended", 0),
    ]
    assert result.status == "failed"
    assert [record.op for record in read_records(records) if isinstance(record, RowBits)] == ["good", "later"]
    assert "reason" in (tmp_path / "log").read_text()


def test_a_job_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    )
    result = run_stage(tmp_path, [python("hangs", code, seconds=5.0), python("good", "pass")])
    assert {job.name: job.status for job in result.jobs} == {"hangs": "timed out", "good": "ended"}
    wait_until_gone(int(child.read_text()))


def test_a_stage_ends_with_its_time_and_the_jobs_behind_it_did_not_run(tmp_path: Path) -> None:
    result = run_stage(tmp_path, [python("long", "import time; time.sleep(600)")], [python("later", "pass")], seconds=2)
    assert {job.name: job.status for job in result.jobs} == {"long": "timed out", "later": "not run"}
    assert result.status == "timed out"


def wait_until_gone(pid: int) -> None:
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # ended, and its parent is gone too
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")


@pytest.mark.parametrize("killed", STAGE_KINDS)
def test_a_stage_killed_by_hand_leaves_the_others_whole(
    killed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage records one figure and then waits to be killed, or ends."""
    pids = tmp_path / "pid"

    def batches(self: gpu_day.Plan, stage: str) -> list[list[Job]]:
        code = recording(self._records, stage)
        if stage == killed:
            code += f"; import os, time; open({str(pids)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
        return [[python(stage, code)]]

    monkeypatch.setattr(gpu_day.Plan, "batches", batches)
    monkeypatch.setattr(gpu_day, "STAGE_KINDS", dict.fromkeys(STAGE_KINDS, (RowBits,)))
    killer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, pathlib, signal, sys, time\n"
            f"path = pathlib.Path({str(pids)!r})\n"
            "while not (path.exists() and path.read_text()): time.sleep(0.05)\n"
            "os.kill(int(path.read_text()), signal.SIGKILL)",
        ]
    )
    ended_well = gpu_day.Day(tmp_path / "out", dry_run=True, commit="c0ffee").run(list(STAGE_KINDS))
    killer.wait()
    assert not ended_well
    day = json.loads((tmp_path / "out" / gpu_day.FIGURES).read_text())
    statuses = {name: stage["status"] for name, stage in day["stages"].items()}
    assert statuses == {name: "failed" if name == killed else "ended" for name in STAGE_KINDS}
    assert day["stages"][killed]["jobs"][0]["exit_code"] == -signal.SIGKILL
    recorded = {name: [one["op"] for one in stage["figures"]["RowBits"]] for name, stage in day["stages"].items()}
    assert recorded == {name: [name] for name in STAGE_KINDS}
    assert day["origin"]["commit"] == "c0ffee"


def test_figures_are_written_while_a_job_runs(tmp_path: Path) -> None:
    records, seen = tmp_path / "records", []
    code = recording(records, "early") + "; import time; time.sleep(3)"
    run_stage(tmp_path, [python("slow", code)], on_change=lambda result: seen.append(len(list(read_records(records)))))
    assert 1 in seen[1:-1]


def test_half_a_line_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "records"
    append(path, StartUp("cold", 1.0, 2.0, 3.0, 4))
    with path.open("a") as file:
        file.write('{"kind": "StartUp", "cac')
    assert list(read_records(path)) == [StartUp("cold", 1.0, 2.0, 3.0, 4)]


def test_what_is_missing_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_day, "MODULES", gpu_day.MODULES | {"no_such_module": "no-such-package"})
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--dry-run"])
    assert gpu_day.main() == 2
    assert capsys.readouterr().err == "gpu-day: missing here: no-such-package\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_runs() -> None:
    assert gpu_day.missing(dry_run=True) == []
    assert gpu_day.missing(dry_run=False) == ["a CUDA device (--dry-run needs none)"]


# --- verdicts on claims ----------------------------------------------------------------------------------------------


def holds(*records: Record) -> dict[str, bool | None]:
    return {verdict["claim"]: verdict["holds"] for verdict in verdicts(records)}


def test_without_figures_no_claim_is_judged() -> None:
    assert set(holds().values()) == {None}


@pytest.mark.parametrize(
    ("claim", "good", "bad"),
    [
        (
            "Up to 8 rows, kernels",
            RowBits("moe FP4", [1, 8, 9], [True, True, False], [0, 0, 1], ""),
            RowBits("moe FP4", [1, 8, 9], [True, False, True], [0, 1, 1], ""),
        ),
        (
            "Kernels give a row the same bits",
            RowBits("moe FP4", [1, 9], [True, True], [0, 0], ""),
            RowBits("moe FP4", [1, 9], [True, False], [0, 1], ""),
        ),
        (
            "cuBLAS gives",
            RowBits("torch.bmm wo_a", [1, 9], [True, True], [0, 0], ""),
            RowBits("torch.bmm wo_a", [1], [True], [0], "CUDA error"),
        ),
        (
            "For a row of NaN",
            NanDraw("gumbel_argmax", "kernel", [-1], [3], ""),
            NanDraw("gumbel_argmax", "kernel", [0], [3], ""),
        ),
        ("An engine starts", StartUp("cold", 5.0, 40.0, 41.0, 90), StartUp("cold", 5.0, 80.0, 81.0, 90)),
        (
            "In float32, speculation changes no text",
            TextComparison("gpu float32 replayed speculative", "gpu float32 replayed plain", 16, 0, []),
            TextComparison("gpu float32 replayed speculative", "gpu float32 replayed plain", 16, 1, [7]),
        ),
        (
            "In bfloat16, texts on the GPU",
            TextComparison("gpu bfloat16 launched plain", "cpu bfloat16 launched plain", 16, 0, []),
            TextComparison("gpu bfloat16 launched plain", "cpu bfloat16 launched plain", 16, 2, [7, 9]),
        ),
        (
            "Under a large matrix product",
            SignalReading("matrix product", "power", 0.99, 0.7, 1.0, 0.97),
            SignalReading("matrix product", "power", 0.8, 0.7, 1.0, 0.33),
        ),
    ],
)
def test_a_claim_holds_or_is_refuted_by_its_figures(claim: str, good: Record, bad: Record) -> None:
    name = next(name for name in CLAIMS if name.startswith(claim))
    assert (holds(good)[name], holds(bad)[name]) == (True, False)


def test_a_slower_chosen_tile_is_found() -> None:
    name = next(name for name in CLAIMS if name.startswith("Launchers choose"))
    times = [TileTime("moe", 24, tile, taken, "") for tile, taken in (("as chosen", 30.0), ("few", 31.0))]
    assert holds(*times)[name] is True
    assert holds(*times, TileTime("moe", 24, "many", 20.0, ""))[name] is False


def test_the_first_different_token_is_found() -> None:
    texts = [
        Text("cpu float32 launched plain", 0, [1, 2, 3]),
        Text("cpu float32 launched plain", 1, [4, 5, 6]),
        Text("cpu float32 launched speculative", 0, [1, 2, 3]),
        Text("cpu float32 launched speculative", 1, [4, 5, 7]),
    ]
    assert list(comparisons(texts)) == [
        TextComparison("cpu float32 launched speculative", "cpu float32 launched plain", 2, 1, [2])
    ]


def test_first_rows_leaves_alone_what_all_rows_share() -> None:
    most = 11
    rows, offsets, shared = torch.arange(most), torch.arange(most + 1), torch.arange(5)
    cut = first_rows((rows, offsets, shared, (rows, 3), None), most, 2)
    assert [len(tensor) for tensor in cut[:3]] == [2, 3, 5]
    assert len(cut[3][0]) == 2
    assert cut[3][1:] == (3,)


@pytest.mark.parametrize("record", [StartUp("cold", 1.0, 2.0, 3.0, 4), Text("cpu float32 launched plain", 1, [2, 3])])
def test_a_record_comes_back_from_json(record: Record) -> None:
    assert from_json(json.loads(json.dumps(to_json(record)))) == record
