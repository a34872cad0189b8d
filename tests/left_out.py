"""A pytest plugin: the run's end says which tests were left out, why, and how to run them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

SLOW = "slow: `make test-full` (which fuzzes, and plants faults, too)"
DESELECTED = "deselected by -m, -k or --deselect"
KVM = "`make test-kvm-emulated`, or a host whose KVM can do it"


class LeftOut:
    """Counts what is deselected, here or by the workers of pytest-xdist, of which each collects the same tests."""

    def __init__(self) -> None:
        self.deselected = Counter[str]()

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.deselected.update(SLOW if "slow" in item.keywords else DESELECTED for item in items)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["deselected"] = dict(self.deselected)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.deselected |= Counter(getattr(node, "workeroutput", {}).get("deselected", {}))

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
        yield
        skipped = Counter(_skipped(report) for report in terminalreporter.stats.get("skipped", ()))
        if found := (self.deselected + skipped).most_common():
            terminalreporter.section("left out")
            for reason, count in found:
                terminalreporter.write_line(f"{count} {reason}")


def _skipped(report: pytest.TestReport) -> str:
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = f"skipped: {said.removeprefix('Skipped: ')}"
    return f"{reason}: {KVM}" if "kvm" in report.keywords else reason


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LeftOut(), "left out")
