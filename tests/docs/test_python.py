"""What the documentation shows in Python is run, as it stands there."""

import re

import pytest

from snapshot.verify import verify
from tests.conftest import ROOT


@pytest.mark.debian
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_example_runs(debian, page, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks and len([line for line in blocks[0].splitlines() if line]) <= 12
    for name in ("vmlinuz", "initrd.img"):
        (tmp_path / name).symlink_to(debian / name)
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    for file in tmp_path.glob("*.snapshot"):
        verify(file)
