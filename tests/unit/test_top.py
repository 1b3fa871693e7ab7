"""`dspark-ray top`, on what a load controller reports of made-up nodes, GPUs and replicas."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

import deployments.console
from autoscale.controller import Bounds, ControllerConfig, LoadController
from autoscale.saturation import THROTTLING
from autoscale.signals import DeviceLoad, LoadSample, NodeLoad
from autoscale.thresholds import LoadCurve
from deployments.console.cli import main
from deployments.console.tables import DEVICE_COLUMNS, REPLICA_COLUMNS, DeviceRow
from deployments.console.top import Outage, picture, watch
from deployments.console.view import View, parse

GIB = 2**30
GPU = DeviceLoad(
    kind="gpu",
    index=0,
    uuid="GPU-0",
    name="NVIDIA H100 80GB HBM3",
    utilization=0.99,
    sm_activity=0.82,
    tensor_activity=0.41,
    dram_activity=0.63,
    power_watts=512.3,
    power_limit_watts=700.0,
    sm_clock_mhz=1410.0,
    max_sm_clock_mhz=1980.0,
    clock_events=("gpu_idle",),
    memory_used=int(61.25 * GIB),
    memory_total=80 * GIB,
)
BARE = DeviceLoad(kind="gpu", index=3, uuid="GPU-3", name="NVIDIA H100 80GB HBM3")
LOST = replace(BARE, state="lost", note="gpu is lost")
CPU = DeviceLoad(
    kind="cpu", index=0, uuid="cpu", name="64 cores", utilization=0.23, memory_used=88 * GIB, memory_total=256 * GIB
)
SAMPLE = LoadSample(
    replica="app#Engine#k2m9x0qa",
    places=(),
    seconds=2.0,
    num_steps=30,
    num_running=12.5,
    num_waiting=3.25,
    max_running=64,
    cache_usage=0.75,
    rows_per_step=101.5,
    budget_per_request=2.5,
    accepted_length=3.0,
    tokens_per_second=1234.0,
    busy_share=0.93,
    slowness=1.0,
    threshold=0.3,
    policy_version=2,
)
IDLE = replace(
    SAMPLE,
    replica="app#Engine#idle0001",
    num_steps=0,
    num_running=0.0,
    num_waiting=0.0,
    cache_usage=0.0,
    rows_per_step=0.0,
    budget_per_request=0.0,
    accepted_length=0.0,
    tokens_per_second=0.0,
    busy_share=0.0,
)


def node(host: str, *devices: DeviceLoad, note: str = "") -> NodeLoad:
    source = "psutil" if devices and devices[0].kind == "cpu" else "nvml"
    return NodeLoad(node_id=host * 9, host=host, source=source, devices=devices, note=note)


def answer(nodes: tuple[NodeLoad, ...] = (), samples: tuple[LoadSample, ...] = (), **more: Any) -> dict[str, Any]:
    """An answer of GET /admin/load, from a real LoadController."""
    controller = LoadController(ControllerConfig(policy=LoadCurve()))
    for load in nodes:
        controller.on_node(load, 0.0)
    for sample in samples:
        controller.on_sample(sample, 0.0)
    said = {
        "application": "deepseek",
        "policy": "load_curve",
        "heartbeat_seconds": 1.0,
        "num_probes": len(nodes),
        "probe_errors": {},
        **controller.view(0.5),
        **more,
    }
    return json.loads(json.dumps(said, allow_nan=False))


def saturated(said: dict[str, Any], *values: float) -> dict[str, Any]:
    for replica, value in zip(said["replicas"], values, strict=True):
        replica["saturation"]["value"] = value
    return said


def draw(said: dict[str, Any], width: int = 140, height: int = 100, outage: Outage | None = None) -> list[str]:
    console = Console(width=width, height=height, file=io.StringIO())
    console.print(picture(parse(said), width, height, outage))
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def line_with(lines: list[str], word: str) -> str:
    (found,) = [line for line in lines if word in line]
    return found


def replica_cells(lines: list[str], name: str) -> dict[str, str]:
    """The cells of a replica's row by heading; the terminal must be wide enough for all columns."""
    words = re.sub("[█▉▊▋▌▍▎▏]", "", line_with(lines, name)).split()
    return dict(zip((column.heading for column in REPLICA_COLUMNS), words, strict=True))


def device_cells(lines: list[str], host: str) -> dict[str, str]:
    """The cells of the row of a node's first device by heading."""
    cells = re.split(r"\s{2,}", next(line for line in lines if line.startswith(f"{host} ")))
    return dict(zip((column.heading for column in DEVICE_COLUMNS), cells, strict=True))


def head(lines: list[str]) -> str:
    """The lines above the tables."""
    return "\n".join(lines[: lines.index("")])


def replica_order(lines: list[str]) -> list[str]:
    headings = next(index for index, line in enumerate(lines) if line.startswith("replica"))
    return [line.split()[0] for line in lines[headings + 1 :]]


# The content of a picture.


def test_a_device_is_a_row_of_what_it_does():
    assert device_cells(draw(answer((node("host-a", GPU),))), "host-a") == {
        "host": "host-a",
        "source": "nvml",
        "device": "gpu 0",
        "name": "H100 80GB HBM3",
        "state": "ok",
        "SM\n%": "82",
        "tensor\n%": "41",
        "DRAM\n%": "63",
        "util\n%": "99",
        "power\nW": "512/700",
        "clock\nMHz": "1410/1980",
        "memory\nGiB": "61.2/80.0",
        "throttled by": "-",
    }


def test_a_replica_is_a_row_of_what_its_engine_did_and_may():
    assert replica_cells(draw(saturated(answer(samples=(SAMPLE,)), 0.72)), "k2m9x0qa") == {
        "replica": "k2m9x0qa",
        "running": "12.5",
        "waiting": "3.2",
        "slots": "64",
        "cache\n%": "75",
        "saturation": "0.72",
        "limited\nby": "cache",
        "threshold": "0.30",
        "max\nlength": "-",
        "budget\n/request": "2.50",
        "accepted\nlength": "3.00",
        "rows\n/step": "101.5",
        "tokens/s": "1,234",
        "slowness": "1.00",
        "busy\n%": "93",
        "age\ns": "0",
    }


def test_numbers_end_where_their_heading_ends():
    lines = draw(answer((node("host-a", GPU),), (SAMPLE,)))
    for unit, number, row in (("GiB", "61.2/80.0", "host-a"), ("tokens/s", "1,234", "k2m9x0qa")):
        headings = next(line for line in lines if unit in line and "·" not in line)
        assert headings.index(unit) + len(unit) == line_with(lines, row).index(number) + len(number)


def test_what_a_device_does_not_say_is_a_dash():
    cells = device_cells(draw(answer((node("host-a", BARE),))), "host-a")
    assert {name for name, cell in cells.items() if cell == "-"} == {
        *("SM\n%", "tensor\n%", "DRAM\n%", "util\n%", "power\nW", "clock\nMHz", "memory\nGiB", "throttled by")
    }


def test_what_is_known_beside_what_is_not_is_shown():
    cells = device_cells(draw(answer((node("host-a", replace(GPU, power_limit_watts=None)),))), "host-a")
    assert cells["power\nW"] == "512/-"


def test_averages_over_no_steps_are_dashes_and_sums_are_zeros():
    cells = replica_cells(draw(answer(samples=(IDLE,))), "idle0001")
    assert {name for name, cell in cells.items() if cell == "-"} == {
        *("limited\nby", "max\nlength", "budget\n/request", "accepted\nlength", "rows\n/step")
    }
    assert (cells["saturation"], cells["tokens/s"], cells["running"]) == ("0.00", "0", "0.0")


def test_the_first_line_adds_replicas_up_and_weighs_accepted_lengths_by_tokens():
    short = replace(SAMPLE, replica="b", seconds=1.0, tokens_per_second=617.0, accepted_length=1.0)
    assert draw(answer((node("host-a", GPU, LOST),), (SAMPLE, short, IDLE)))[0] == (
        "deepseek · policy load_curve · 1 node · 2 devices · 3 replicas · 1,851 tokens/s · accepted length 2.60"
        " · 25 running · 6 waiting"
    )


def test_where_no_token_was_made_there_is_no_accepted_length():
    assert "· 0.0 tokens/s · accepted length - ·" in draw(answer(samples=(IDLE,)))[0]


def test_what_an_operator_set_is_marked_and_a_bypass_stands_for_a_threshold():
    controller = LoadController(ControllerConfig(policy=LoadCurve()))
    controller.override(Bounds(0.5, 4), None, 0.0, SAMPLE.replica)
    controller.override(Bounds(0.5, None, True), None, 0.0, IDLE.replica)
    controller.on_sample(SAMPLE, 0.0)
    controller.on_sample(IDLE, 0.0)
    controller.on_sample(replace(SAMPLE, replica="plain"), 0.0)
    lines = draw(answer(**controller.view(0.5)))
    found = {name: replica_cells(lines, name) for name in ("k2m9x0qa", "idle0001", "plain")}
    assert [cells["threshold"] for cells in found.values()] == ["*0.50", "*bypass", "0.30"]
    assert found["k2m9x0qa"]["max\nlength"] == "4"
    assert lines[-1] == "* set by hand"


def test_the_footer_warns_of_utilisation_only_where_a_gpu_shows_it():
    assert draw(answer((node("host-a", GPU),)))[-1].startswith("GPU util alone says nothing")
    assert not any("util alone" in line for line in draw(answer((node("host-a", CPU),))))


def test_no_nodes_and_no_replicas_are_said_in_words():
    assert draw(answer())[2:] == ["no device has reported yet", "", "no replica has reported yet"]


@pytest.mark.parametrize(
    ("value", "bar"), [(0.0, "     "), (0.5, "██▌  "), (0.975, "████▉"), (1.0, "█████"), (7, "█████")]
)
def test_saturation_is_a_bar(value, bar):
    assert f"  {bar} {value:.2f}  " in line_with(draw(saturated(answer(samples=(SAMPLE,)), value)), "k2m9x0qa")


# Trouble.


def test_a_lost_gpu_is_told_in_its_row_in_a_note_and_at_the_top():
    said = answer((node("host-a", LOST),))
    lines = draw(said)
    assert device_cells(lines, "host-a")["state"] == "lost"
    assert "1 device lost" in head(lines)
    assert "host-a gpu 3: gpu is lost" in lines


def test_states_have_colours():
    (said,) = parse(answer((node("host-a", LOST, replace(BARE, state="unreadable"), GPU),))).nodes
    styles = [str(DeviceRow(said, device, False).state.style) for device in said.devices]
    assert styles == ["bold white on red", "bold red", "green"]


@pytest.mark.parametrize("event", sorted(THROTTLING))
def test_a_throttled_gpu_says_by_what(event):
    cells = device_cells(draw(answer((node("host-a", replace(GPU, clock_events=(event, "sync_boost"))),))), "host-a")
    assert cells["state"] == "throttled"
    assert event.startswith(cells["throttled by"].replace(" ", "_"))


@pytest.mark.parametrize(("age", "state"), [(5.0, "ok"), (7.2, "silent 7 s")])
def test_a_node_that_was_not_read_for_long_is_silent(age, state):
    said = answer((node("host-a", GPU),))
    said["nodes"][0]["age_seconds"] = age
    lines = draw(said)
    assert device_cells(lines, "host-a")["state"] == state
    assert ("1 node silent" in head(lines)) == (state != "ok")


def test_a_lost_gpu_is_lost_also_where_its_node_is_silent():
    said = answer((node("host-a", LOST),))
    said["nodes"][0]["age_seconds"] = 7.0
    assert device_cells(draw(said), "host-a")["state"] == "lost"


def test_what_is_silent_is_dim():
    said = answer((node("host-a", GPU), node("host-b", GPU)), (SAMPLE, IDLE))
    said["nodes"][0]["age_seconds"] = said["replicas"][0]["age_seconds"] = 7.0
    console = Console(width=120, height=30, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(picture(parse(said), 120, 30))
    lines = console.file.getvalue().splitlines()
    styles = {
        name: line_with(lines, name).startswith("\x1b[1;2m") for name in ("host-a", "host-b", "k2m9x0qa", "idle0001")
    }
    assert styles == {"host-a": True, "host-b": False, "k2m9x0qa": True, "idle0001": False}


@pytest.mark.parametrize(("age", "is_silent"), [(6.0, False), (6.1, True)])
def test_a_replica_that_missed_three_heartbeats_is_silent(age, is_silent):
    said = answer(samples=(SAMPLE,), heartbeat_seconds=2.0)
    said["replicas"][0]["age_seconds"] = age
    assert ("1 replica silent" in head(draw(said))) == is_silent


def test_a_node_whose_probe_fails_has_a_row_and_a_note():
    lines = draw(answer((node("host-a", GPU),), probe_errors={"9c1e77aa55": "its node has left"}))
    assert device_cells(lines, "9c1e77aa")["state"] == "unreadable"
    assert "9c1e77aa: its node has left" in lines
    assert "1 of 2 nodes · 1 device ·" in lines[0]
    assert "1 probe failing" in head(lines)


def test_the_error_of_a_probe_that_was_read_before_stands_with_its_node():
    lines = draw(answer((node("host-a", GPU),), probe_errors={"host-a" * 9: "no answer in 2 s"}))
    assert "host-a: no answer in 2 s" in lines
    assert "· 1 node · 1 device ·" in lines[0]


def test_a_node_without_devices_is_unreadable():
    lines = draw(answer((node("host-a", note="the reading failed"),)))
    assert device_cells(lines, "host-a")["state"] == "unreadable"
    assert "host-a: the reading failed" in lines
    assert "0 devices" in lines[0]


def test_who_says_the_same_shares_a_line_and_nobody_says_it_twice():
    note = "no sample for 9 s"
    nodes = tuple(node(f"host-{index}", replace(BARE, note=note), note=note) for index in range(5))
    assert f"host-0, host-1 and 3 more: {note}" in draw(answer(nodes))


def test_of_many_notes_the_last_are_counted():
    lines = draw(answer(tuple(node(f"host-{index}", CPU, note=f"note {index}") for index in range(6))))
    assert "host-2: note 2" in lines
    assert "... and 3 more notes" in lines
    assert not any("note 3" in line for line in lines)


def test_nothing_moves_the_cursor():
    lines = draw(answer((node("host\x1b[2J\n-a", GPU),)))
    assert any(line.startswith("host [2J -a  nvml") for line in lines)


# Which rows, which columns.


def test_the_most_saturated_replica_comes_first():
    samples = tuple(replace(SAMPLE, replica=name) for name in ("low", "high", "same-b", "same-a"))
    lines = draw(saturated(answer(samples=samples), 0.1, 0.9, 0.501, 0.499))
    assert replica_order(lines) == ["high", "same-a", "same-b", "low"]


def test_nodes_in_trouble_come_first_and_then_the_busy_ones():
    idle = replace(GPU, tensor_activity=0.02, power_watts=100.0)
    nodes = (node("idle", idle), node("busy", idle, GPU), node("broken", idle, LOST), node("a-idle", idle))
    lines = draw(answer(nodes))
    assert [line.split()[0] for line in lines if "nvml" in line] == ["broken", "busy", "a-idle", "idle"]


def test_devices_stay_with_their_node_which_is_named_once():
    gpus = [replace(GPU, index=index) for index in range(3)]
    lines = draw(answer((node("host-a", *gpus), node("host-b", GPU))))
    assert sum("host-a" in line for line in lines) == 1
    assert [line.split("  gpu ")[1][0] for line in lines if "  gpu " in line] == ["0", "1", "2", "0"]


def test_ten_thousand_replicas_are_cut_to_the_terminal_and_counted():
    samples = tuple(replace(SAMPLE, replica=f"r{index:05}") for index in range(10_000))
    lines = draw(answer((node("host-a", GPU),), samples), height=51)
    assert len(lines) == 51
    assert lines[-2] == "... and 9,960 more replicas"
    assert replica_order(lines)[:-2] == [f"r{index:05}" for index in range(40)]
    assert not any("more device" in line for line in lines)


def test_many_devices_and_many_replicas_get_half_each():
    nodes = tuple(node(f"host-{index:03}", GPU) for index in range(1000))
    samples = tuple(replace(SAMPLE, replica=f"r{index:05}") for index in range(1000))
    lines = draw(answer(nodes, samples), height=38, outage=Outage(1.0, "gone"))
    assert len(lines) == 38
    assert sum(line.startswith("host-") for line in lines) == sum(line.startswith("r0") for line in lines) == 13
    assert "... and 987 more devices" in lines


def test_few_replicas_leave_their_room_to_devices():
    lines = draw(answer((node("host-a", *[GPU] * 100),), (SAMPLE, IDLE)), height=38)
    assert len(lines) == 38
    assert sum("  gpu 0  " in line for line in lines) == 27
    assert "... and 73 more devices" in lines
    assert len(replica_order(lines)) == 3


def test_what_fits_is_not_cut():
    said = answer((node("host-a", GPU, GPU),), (SAMPLE, IDLE))
    whole = draw(said)
    assert draw(said, height=len(whole)) == whole
    assert "... and 1 more replicas" not in "\n".join(draw(said, height=len(whole) - 1))
    assert any(line.startswith("... and") for line in draw(said, height=len(whole) - 1))


LONG = answer(
    (
        node("a-host-with-quite-a-name.cluster.internal", GPU, replace(GPU, clock_events=tuple(THROTTLING)), LOST),
        node("head", CPU, note="a long note " * 20),
    ),
    (SAMPLE, IDLE, replace(SAMPLE, replica="big", tokens_per_second=999_999.0, rows_per_step=9999.5)),
    probe_errors={"9c1e77aa55": "a long error " * 20},
    application="an application with a name that is much too long for a narrow terminal, and yet a name",
)


@pytest.mark.parametrize("width", [40, 80, 100, 120, 140, 160])
def test_no_line_is_wider_than_the_terminal_and_none_wraps(width):
    lines = draw(LONG, width)
    assert max(map(len, lines)) <= width
    # Two lines of headings, five devices and three notes.
    assert lines[lines.index("") + 11] == ""
    assert len(replica_order(lines)) - sum("GPU util" in line for line in lines) == 3


@pytest.mark.parametrize("width", [80, 120, 140])
def test_numbers_are_shown_whole(width):
    rows = [line for line in draw(LONG, width) if line.startswith(("k2m9x0qa", "idle0001", "big"))]
    assert len(rows) == 3
    assert not any("…" in line for line in rows)


def headings(lines: list[str]) -> str:
    start = lines.index("")
    second = lines.index("", start + 1)
    return "\n".join(lines[start + 1 : start + 3] + lines[second + 1 : second + 3])


@pytest.mark.parametrize(
    ("width", "shown", "dropped"),
    [
        (40, ["device", "state", "replica", "tokens/s"], ["memory", "running", "util"]),
        (80, ["tensor", "memory", "util", "threshold", "accepted", "waiting"], ["clock", "source", "slowness", "age"]),
        (120, ["clock", "throttled by", "name", "budget", "cache", "age"], ["source", "slots", "busy"]),
        (140, ["source", "rows", "slots", "busy"], []),
    ],
)
def test_a_narrow_terminal_loses_what_matters_least(width, shown, dropped):
    found = headings(draw(LONG, width))
    assert [word for word in shown if word not in found] == []
    assert [word for word in dropped if word in found] == []


def test_columns_without_a_value_make_room_for_others():
    found = headings(draw(answer((node("head", CPU),), (SAMPLE,)), 80))
    assert "name" in found
    assert "source" in found
    assert "power" not in found


def test_a_name_takes_what_room_is_left_and_else_keeps_both_ends():
    said = answer((node("ray-cluster-worker-x7k2p", GPU),))
    assert "ray-cluster-worker-x7k2p" in "".join(draw(said, 160))
    assert "ray-…x7k2p  gpu 0" in "".join(draw(said, 80))


# Answers of other servers.


def without(*path: str) -> Callable[[dict[str, Any]], object]:
    def remove(said: dict[str, Any]) -> None:
        *parents, name = path
        for parent in parents:
            said = said[parent]
            said = said[0] if isinstance(said, list) else said
        del said[name]

    return remove


@pytest.mark.parametrize(
    "spoil",
    [
        without("application"),
        without("probe_errors"),
        without("nodes", "age_seconds"),
        without("nodes", "devices", "sm_activity"),
        without("replicas", "sample", "accepted_length"),
        without("replicas", "bounds", "bypass"),
        without("replicas", "saturation", "limiting"),
        lambda said: said.update(nodes=None),
        lambda said: said.update(heartbeat_seconds="1"),
        lambda said: said["replicas"][0]["sample"].update(tokens_per_second="many"),
        lambda said: said["nodes"][0]["devices"][0].update(state=None),
        lambda said: said.update(probe_errors=[]),
    ],
)
def test_an_answer_of_another_version_is_known(spoil):
    said = answer((node("host-a", GPU),), (SAMPLE,))
    parse(said)
    spoil(said)
    with pytest.raises((AttributeError, KeyError, TypeError)):
        parse(said)


def test_fields_that_came_later_do_no_harm():
    said = answer((node("host-a", GPU),), (SAMPLE,), colour="red")
    said["nodes"][0]["devices"][0]["colour"] = "blue"
    assert parse(said) == parse(answer((node("host-a", GPU),), (SAMPLE,)))


# The command.

SAID = answer((node("host-a", GPU, LOST),), (SAMPLE,))
NO_CONTROLLER = {"error": {"message": "this application runs without a load controller", "code": None}}


class Server:
    """Answers GET /admin/load with a given status and body."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.status, self.body = 200, json.dumps(SAID)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(told.status if self.path == "/admin/load" else 404)
            self.end_headers()
            self.wfile.write(told.body.encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        told = Server(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield told
        http.shutdown()
        thread.join()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which rich finds a terminal of 100 by 30."""
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "100"), ("LINES", "30")):
        monkeypatch.setenv(name, value)


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TTY_COMPATIBLE", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


ENTER, LEAVE, SHOW_CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25h"


@pytest.mark.usefixtures("no_terminal")
@pytest.mark.parametrize("arguments", [["--once"], []])
def test_a_pipe_gets_one_picture(server, capsys, arguments):
    assert main(["top", "--url", f"{server.url}/", *arguments]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("deepseek · policy load_curve · 1 node · 2 devices · 1 replica")
    assert "host-a gpu 3: gpu is lost" in lines
    assert sum(line.startswith("k2m9x0qa") for line in lines) == 1


@pytest.mark.usefixtures("terminal")
def test_once_fits_above_the_prompt_and_leaves_the_screen_as_it_is(server, capsys):
    server.body = json.dumps(answer((), tuple(replace(SAMPLE, replica=f"r{index}") for index in range(99))))
    assert main(["top", "--url", server.url, "--once"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 28  # 30 without a prompt, and without one of the headings that no device needs
    assert ENTER not in out


def test_json_is_what_the_server_said(server, capsys):
    assert main(["top", "--url", server.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == SAID


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("arguments", [["--once"], ["--json"], []])
def test_a_server_that_does_not_answer_is_one_line_and_an_exit_code(capsys, arguments):
    assert main(["top", "--url", "http://127.0.0.1:9", *arguments]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"dspark-ray: http://127\.0\.0\.1:9/admin/load: \[Errno \d+\] Connection refused\n", said.err)
    assert said.out == ""


@pytest.mark.parametrize("arguments", [["--once"], ["--json"]])
def test_the_words_of_a_404_are_shown(server, capsys, arguments):
    server.status, server.body = 404, json.dumps(NO_CONTROLLER)
    assert main(["top", "--url", server.url, *arguments]) == 2
    assert "/admin/load: 404 this application runs without a load controller\n" in capsys.readouterr().err


@pytest.mark.parametrize("body", ['{"steps": []}', "[]", '"hello"', "null"])
def test_another_servers_answer_is_known(server, capsys, body):
    server.body = body
    assert main(["top", "--url", server.url, "--once"]) == 2
    assert capsys.readouterr().err == f"dspark-ray: {server.url}: not the answer of a dspark-ray of this version\n"


@pytest.mark.parametrize("interval", ["0", "-1", "nan"])
def test_an_interval_is_positive(server, capsys, interval):
    assert main(["top", "--url", server.url, "--interval", interval]) == 2
    assert "expected a positive number of seconds" in capsys.readouterr().err


def test_without_rich_it_says_what_to_install(server, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "deployments.console.top")
    monkeypatch.delattr(deployments.console, "top")
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["top", "--url", server.url, "--once"]) == 2
    assert "needs rich, which is not installed: pip install 'dspark-ray[cli]'" in capsys.readouterr().err
    assert main(["top", "--url", server.url, "--json"]) == 0


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_ends_it_well(server, capsys, monkeypatch):
    def interrupt(seconds: float) -> None:
        assert seconds == 0.25
        raise KeyboardInterrupt

    monkeypatch.setattr("deployments.console.top.time.sleep", interrupt)
    assert main(["top", "--url", server.url, "--interval", "0.25"]) == 0
    out = capsys.readouterr().out
    assert out.count(ENTER) == 1
    assert "k2m9x0qa" in out
    assert LEAVE in out[out.index("k2m9x0qa") :]
    assert SHOW_CURSOR in out[out.index("k2m9x0qa") :]


# The live picture.


class Unreachable(Exception):
    pass


def watched(*answers: dict[str, Any] | Exception) -> list[str]:
    """The pictures that a terminal of 120 by 30 shows of these answers, two seconds apart."""
    console = Console(width=120, height=30, file=io.StringIO(), force_terminal=True, color_system=None)
    coming, frames, now = iter(answers), [], 0.0

    def read() -> View:
        said = next(coming)
        if isinstance(said, Exception):
            raise said
        return parse(said)

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        frames.append(console.file.getvalue())
        console.file.seek(0)
        console.file.truncate()

    with pytest.raises(StopIteration):
        watch(read, Unreachable, 2.0, console, lambda: now, sleep)
    assert LEAVE in console.file.getvalue()
    return frames


def test_a_server_that_is_gone_leaves_its_last_picture_marked_as_stale():
    gone = Unreachable("http://there: Connection refused")
    first, second, third = watched(SAID, gone, gone)
    assert "stale" not in first
    assert "stale: no answer for 2 s: http://there: Connection refused" in second
    assert "stale: no answer for 4 s: http://there: Connection refused" in third
    assert "k2m9x0qa" in third


def test_a_server_that_is_back_is_shown_again():
    later = answer((node("host-b", GPU),), (replace(SAMPLE, replica="another"),))
    _, stale, back, again = watched(SAID, Unreachable("gone"), later, Unreachable("gone"))
    assert "host-a" in stale
    assert "host-b" in back
    assert "stale" not in back
    assert "no answer for 2 s" in again


def test_a_stale_picture_is_dim():
    console = Console(width=120, height=30, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(picture(parse(SAID), 120, 30, Outage(6.0, "gone")))
    line = line_with(console.file.getvalue().splitlines(), "k2m9x0qa")
    assert re.search(r"\x1b\[1;2m *k2m9x0qa", line)


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        watched(SAID, ZeroDivisionError())
