"""The documentation is true to the code: links, paths, cited sections, make targets, metrics and reference tables."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READMES = [ROOT / folder / "README.md" for folder in ("kernels", "benchmarks")]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *READMES])
HISTORY = {"CHANGELOG.md"}
"""Pages that name files as they were."""

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_PATH = re.compile(r"`((?:dspark_ray|kernels|autoscale|deployments|benchmarks|tests|docs)/[\w./-]*)`")
_CITED = re.compile(r"docs/(model|dspark)\.md,\s+([A-Z][A-Za-z-]+(?:\s+[a-z]+)*)")


def by_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def headings(name: str) -> set[str]:
    return set(re.findall(r"^#+ (.*)$", (ROOT / "docs" / f"{name}.md").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    links = _LINK.findall(_FENCE.sub("", page.read_text()))
    relative = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert not [link for link in relative if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=by_name)
def test_paths_exist(page: Path) -> None:
    assert not [path for path in _PATH.findall(page.read_text()) if not (ROOT / path).exists()]


def test_sections_that_code_cites_exist() -> None:
    sections = {name: headings(name) for name in ("model", "dspark")}
    wrong = []
    for folder in ("dspark_ray", "kernels", "autoscale", "deployments", "benchmarks", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            for page, cited in _CITED.findall(file.read_text()):
                cited = " ".join(cited.split())
                # The sentence may go on behind the section's name.
                if not any(cited == section or cited.startswith(f"{section} ") for section in sections[page]):
                    wrong.append(f"{by_name(file)} cites docs/{page}.md, {cited}")
    assert not wrong


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"\bmake ([a-z-]+)(?=\s)", _code(page))}
    assert named <= targets


def _code(page: Path) -> str:
    """What a page shows as code."""
    text = page.read_text()
    return "\n".join([*_FENCE.findall(text), *(f"{code} " for code in re.findall(r"`([^`\n]+)`", text))])


def test_tours_meet_the_names_that_they_name() -> None:
    tours = (ROOT / "docs" / "architecture.md").read_text().partition("## Three tours")[2].partition("\n## ")[0]
    for tour in tours.split("\n### ")[1:]:
        stops = re.findall(r"^\| `([\w/.]+)` \| ([^|]+) \|", tour, re.MULTILINE)
        assert 3 <= len(stops) <= 8
        for path, names in stops:
            defined = {getattr(node, "name", None) for node in ast.walk(ast.parse((ROOT / path).read_text()))}
            assert set(re.findall(r"`(\w+)`", names)) <= defined, path


def test_every_metric_is_documented() -> None:
    source = ast.parse((ROOT / "deployments" / "replica" / "metrics.py").read_text())
    makers = {"gauge", "counter", "histogram"}
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    names = {
        f"dspark_{call.args[0].value}"
        for call in calls
        if call.func.attr in makers and call.args and isinstance(call.args[0], ast.Constant)
    }
    assert len(names) > 30
    assert not names - set(re.findall(r"`(dspark_\w+)`", (ROOT / "docs" / "operating.md").read_text()))


def test_reference_tables_are_those_of_the_code() -> None:
    command = [sys.executable, str(ROOT / "docs" / "generate_reference.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
