"""A pytest plugin: the run's end says which tests were left out, why, and how to run them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

SLOW = "slow: `make test-full` (which fuzzes, and plants faults, too)"
KVM = "`make test-kvm-emulated`, or a host whose KVM can do it"


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield
    stats = terminalreporter.stats
    if found := list(left_out(stats.get("deselected", ()), stats.get("skipped", ()))):
        terminalreporter.section("left out")
        for line in found:
            terminalreporter.write_line(line)


def left_out(deselected: Iterable[pytest.Item], skipped: Iterable[pytest.TestReport]) -> Iterator[str]:
    """A line for each reason, the commonest first."""
    why = Counter(SLOW if "slow" in item.keywords else "deselected by -m, -k or --deselect" for item in deselected)
    why.update(_skipped(report) for report in skipped)
    for reason, count in why.most_common():
        yield f"{count} {reason}"


def _skipped(report: pytest.TestReport) -> str:
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = f"skipped: {said.removeprefix('Skipped: ')}"
    return f"{reason}: {KVM}" if "kvm" in report.keywords else reason
