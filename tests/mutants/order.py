"""pytest plugin: the tests that mirror the file come first, then the others, the quick ones before the slow ones, so
that most faults cost a second or two. MUTANTS_TIMES names the file of times, which a run without a fault writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

_TIMES = Path(os.environ["MUTANTS_TIMES"])
_FIRST = os.environ.get("MUTANTS_FIRST", "-")  # a part of the path of the tests that mirror the file


class _Recorder:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self) -> None:
        _TIMES.write_text(json.dumps(self.seconds))


def pytest_configure(config: pytest.Config) -> None:
    if not _TIMES.exists():
        config.pluginmanager.register(_Recorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _TIMES.exists():
        seconds = json.loads(_TIMES.read_text())
        items.sort(key=lambda item: (_FIRST not in item.nodeid, seconds.get(item.nodeid, 0)))
