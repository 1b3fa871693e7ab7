"""Who may import whom, and where a few words may stand: docs/architecture.md, checked on the source."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FOLDERS = {"dspark_ray", "kernels", "autoscale", "deployments", "tests", "benchmarks", "docs"}
BUILD_OUTPUTS = {"build", "dist"}

STANDARD = set(sys.stdlib_module_names)
EVERYTHING = {"*"}

# What each room may import besides the standard library.
ROOMS: dict[str, set[str]] = {
    "dspark_ray": {
        "numpy",
        "torch",
        "tokenizers",
        "safetensors",
        "dspark_ray",
        "dspark_kernels",
    },
    "kernels": {"numpy", "torch", "triton", "dspark_kernels"},
    "autoscale": {"autoscale"},
    "deployments": EVERYTHING,
}
# Files that may import more than their room.
EXTRA: dict[str, set[str]] = {
    "autoscale/cpu.py": {"psutil"},
    "autoscale/nvml.py": {"pynvml"},
    "autoscale/policies.py": {"ray"},
    "autoscale/controller.py": {"pydantic"},
    "autoscale/goodput.py": {"pydantic"},
    "autoscale/presets.py": {"pydantic", "yaml"},
    "autoscale/replicas.py": {"pydantic"},
    "autoscale/settings.py": {"pydantic"},
    "autoscale/thresholds.py": {"pydantic"},
    "dspark_ray/evaluation/pictures.py": {"matplotlib"},
}
REASONS = {
    "dspark_ray": "the engine runs on machines that have little besides torch and numpy",
    "kernels": "an operation knows tensors and nothing of ours",
    "autoscale": "the controller is arithmetic; only nvml.py reads devices and only policies.py knows Serve. pydantic"
    " checks settings; modules that read devices do not import it, because they run on GPU machines without it",
}

# The rooms of dspark_ray, bottom up: each imports only rooms before it.
ORDER = (
    "config_values",
    "config",
    "types",
    "text",
    "cache",
    "model",
    "sampling",
    "drafters",
    "speculative",
    "checkpoint",
    "runner",
    "engine",
    "ranks",
    "generate",
    "training",
    "evaluation",
)


MAY_COMMUNICATE = ("dspark_ray/model/parallel.py", "dspark_ray/ranks/channel.py", "dspark_ray/ranks/gang.py")

MAY_ASK = ("deployments/console/cli.py",)
"""The environment: a user's settings are a command line's business."""

MAKES_ROUTES = {"fastapi.FastAPI", "fastapi.APIRouter"}

MACHINE_PATH = re.compile(r"^/(?:home|root|work|workspace|tmp|opt|usr|mnt|data|Users|private)(?:/|$)")


def imported_modules(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also those inside functions and TYPE_CHECKING blocks."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def imports_outside(source: str, allowed: set[str]) -> list[str]:
    """Every import of a package that is neither in the standard library nor in `allowed`."""
    if allowed == EVERYTHING:
        return []
    found = {(line, name.partition(".")[0]) for line, name in imported_modules(source)}
    return [f"line {line} imports {name}" for line, name in sorted(found) if name not in allowed | STANDARD]


def imports_of(source: str, *modules: str) -> list[str]:
    """Every import of one of the modules or of something below it."""
    found = {
        (line, module)
        for line, name in imported_modules(source)
        for module in modules
        if name == module or name.startswith(module + ".")
    }
    return [f"line {line} imports {module}" for line, module in sorted(found)]


def machine_paths(source: str) -> list[str]:
    """String literals that name a place on one particular machine."""
    return [
        f"line {node.lineno} has {node.value!r}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and MACHINE_PATH.match(node.value)
    ]


def environment_reads(source: str) -> list[str]:
    """Lines that touch the environment variables of the process."""
    lines = {
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}
    }
    return [f"line {line} uses the environment" for line in sorted(lines)]


def python_files(*folders: str) -> dict[str, str]:
    """Text of every Python file below the folders, by repository-relative path."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def violations(files: dict[str, str], rule: Callable[[str, str], list[str]]) -> str:
    """One line per file that breaks a rule; empty when none does."""
    found = {path: rule(path, source) for path, source in files.items()}
    return "\n".join(f"{path}: {', '.join(lines)}" for path, lines in found.items() if lines)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    found = violations(
        python_files(room),
        lambda path, source: imports_outside(source, ROOMS[room] | EXTRA.get(path, set())),
    )
    assert not found, f"{found}\n{room}/ may not: {REASONS[room]}"


def upward_imports(path: str, source: str) -> list[str]:
    """Imports of a room of dspark_ray that stands after the one of `path`."""
    room = Path(path).relative_to("dspark_ray").with_suffix("").parts[0]
    above = {f"dspark_ray.{name}" for name in ORDER[ORDER.index(room) + 1 :]}
    return imports_of(source, *above)


def test_rooms_of_the_engine_import_only_rooms_below_them() -> None:
    files = {path: source for path, source in python_files("dspark_ray").items() if path != "dspark_ray/__init__.py"}
    assert {Path(path).relative_to("dspark_ray").with_suffix("").parts[0] for path in files} == set(ORDER)
    found = violations(files, upward_imports)
    assert not found, f"{found}\nthe order of rooms, bottom up: {', '.join(ORDER)}"


def test_torch_distributed_stays_where_processes_meet() -> None:
    files = {path: source for path, source in python_files(*ROOMS).items() if path not in MAY_COMMUNICATE}
    found = violations(files, lambda path, source: imports_of(source, "torch.distributed"))
    assert not found, f"{found}\nonly {', '.join(MAY_COMMUNICATE)} may: take a ParallelGroup or a channel instead"


def test_triton_stays_in_the_kernels() -> None:
    files = python_files("dspark_ray", "autoscale", "deployments")
    found = violations(files, lambda path, source: imports_of(source, "triton"))
    assert not found, f"{found}\ncall an operation of dspark_kernels by its name"


def test_the_engine_reads_no_environment_variables() -> None:
    files = {path: source for path, source in python_files("dspark_ray", "kernels").items() if path not in MAY_ASK}
    found = violations(files, lambda path, source: environment_reads(source))
    assert not found, f"{found}\nconfiguration arrives as arguments, so that a test or a YAML file can set it"


def test_no_string_names_a_place_on_one_machine() -> None:
    files = python_files(*ROOMS, "tests", "benchmarks")
    found = violations(files, lambda path, source: machine_paths(source))
    assert not found, f"{found}\ntake the path as an argument or derive it from __file__"


def test_modules_with_routes_or_the_builder_keep_their_annotations() -> None:
    files = python_files("deployments")
    assert "deployments/app.py" in files, "deployments/app.py holds build(), which every YAML file names"
    typed = {
        path: source
        for path, source in files.items()
        if path == "deployments/app.py" or MAKES_ROUTES & {name for _, name in imported_modules(source)}
    }
    found = violations(typed, lambda path, source: imports_of(source, "__future__"))
    assert not found, f"{found}\nwith annotations as strings, Serve and FastAPI pass their input on unchecked"


def test_every_yaml_file_names_the_one_builder() -> None:
    files = sorted((ROOT / "deployments").glob("*.yaml"))
    named = {path.name: re.findall(r"^\W*import_path:\s*(\S+)", path.read_text(), re.MULTILINE) for path in files}
    wrong = {name: paths for name, paths in named.items() if set(paths) != {"deployments.app:build"}}
    assert named, "no YAML file in deployments/"
    assert not wrong, f"{wrong}: expected deployments.app:build"


def test_there_is_no_other_top_level_folder() -> None:
    here = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    other = {name for name in here - FOLDERS - BUILD_OUTPUTS if not name.endswith(".egg-info")}
    assert not other, f"{sorted(other)}: code belongs into one of {sorted(FOLDERS)}"


def test_the_kernels_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "an importable top-level `kernels` breaks transformers, which looks for a package of that name"
    )


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("import ray", "ray"),
        ("from fastapi import FastAPI", "fastapi"),
        ("def late():\n    import zmq.asyncio", "zmq"),
        ("if TYPE_CHECKING:\n    from pydantic import BaseModel", "pydantic"),
        ("from deployments.args import Args", "deployments"),
    ],
)
def test_a_planted_import_is_found(planted: str, name: str) -> None:
    assert [line.split()[-1] for line in imports_outside(planted, ROOMS["dspark_ray"])] == [name]


@pytest.mark.parametrize("planted", ["import torch.distributed as dist", "from torch import distributed"])
def test_a_planted_import_below_a_module_is_found(planted: str) -> None:
    assert imports_of(planted, "torch.distributed") == ["line 1 imports torch.distributed"]


def test_a_planted_import_of_a_room_above_is_found() -> None:
    assert upward_imports(
        "dspark_ray/cache/pages.py", "from dspark_ray.model import rows\nimport dspark_ray.config"
    ) == ["line 1 imports dspark_ray.model"]


def test_a_planted_machine_path_is_found() -> None:
    planted = "/".join(("", "home", "someone", "model"))
    assert machine_paths(f"path = {planted!r}\nratio = 'a/b'") == [f"line 1 has {planted!r}"]


@pytest.mark.parametrize("planted", ["os.environ.get('X')", "os.getenv('X')"])
def test_a_planted_environment_read_is_found(planted: str) -> None:
    assert environment_reads(planted) == ["line 1 uses the environment"]
