"""What only the tests of whole machines share."""

from __future__ import annotations

import pytest

from tests.cpu.hosts import host


@pytest.fixture
def crossing(kvm: str) -> str:
    """KVM, where it runs our guests; else the test is skipped with the reason."""
    if host() == "kvm_pvm":
        pytest.skip("kvm_pvm: SYSCALL needs its target to be mapped for the user, which no kernel of ours does")
    return kvm
