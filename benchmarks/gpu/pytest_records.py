"""A pytest plugin that writes the outcome of every test when it ends, also under xdist.

python -m pytest -p benchmarks.gpu.pytest_records --records FILE ...
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.records import TestOutcome
from benchmarks.gpu.stage import append

_MESSAGE_CHARACTERS = 1500


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, required=True, help="file to append outcomes to")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers of xdist report to the process that started them
        config.pluginmanager.register(_Writer(config.getoption("--records")))


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Setup and teardown count where they fail; a test that is skipped in its setup has no call.
        if report.when != "call" and report.passed:
            return
        outcome = "error" if report.when != "call" and report.failed else report.outcome
        message = report.longreprtext[-_MESSAGE_CHARACTERS:] if report.failed else ""
        append(self._path, TestOutcome(report.nodeid, outcome, report.duration, message))
