"""pytest plugin: the tests that mirror the file come first, then the others, the quick ones before the slow ones, so
that most faults cost a second or two. A test that takes much longer than it did is ended, and pytest with it.
MUTANTS_TIMES names the file of times, which a run without a fault writes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

_TIMES = Path(os.environ["MUTANTS_TIMES"])
_SPARE_S = int(os.environ["MUTANTS_SPARE_S"])
_FIRST = os.environ.get("MUTANTS_FIRST", "-")  # a part of the path of the tests that mirror the file


class _Recorder:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self) -> None:
        _TIMES.write_text(json.dumps(self.seconds))


class _Player:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = json.loads(_TIMES.read_text())

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: (_FIRST not in item.nodeid, self.seconds.get(item.nodeid, 0)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.alarm(_SPARE_S + int(5 * self.seconds.get(nodeid, 0)))  # which nobody handles


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Player() if _TIMES.exists() else _Recorder())
