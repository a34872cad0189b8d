"""What happens to the file a machine was woken from: one clear line and a defined end, or nothing at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapshot.errors import SnapshotError
from tests.conftest import BACKENDS
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason

# Reads a byte of each page from 2 to 14 MiB, for ever: mov rsi, 2 MiB; mov al, [rsi]; add rsi, 4096; cmp; jb; jmp
READS = bytes.fromhex("48c7c600002000 8a06 4881c600100000 4881fe0000e000 72ee ebe5")

CHILD = """
import json, os, random, sys, threading
from pathlib import Path
from tests.snapshot.test_mapped import CHANGES, NO_CHANGES
from vmm.machine.machine import Machine

folder, backend, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
draw, found = random.Random(seed), []
good = (folder / "good").read_bytes()
for name, change in (CHANGES | NO_CHANGES).items():
    file = folder / "s"
    file.unlink(missing_ok=True)
    file.write_bytes(good)
    with Machine.restore(file, backend) as machine:
        if draw.random() < 0.7:
            machine.await_checked()
        timer = threading.Timer(draw.random() * 0.02, change, (file,))
        timer.start()
        try:
            stop = str(machine.run(until_ns=machine.clock.now_ns() + (12_000_000 if backend == "emu" else 60_000_000)))
            timer.join()
        except Exception as error:
            stop = f"{type(error).__name__}: {error}"
        timer.join()
        try:
            machine.save(folder / "again")
            saved = "saved"
        except Exception as error:
            saved = f"{type(error).__name__}: {error}"
    found.append((name, stop, saved))
print(json.dumps(found))
"""


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 20))])
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_while_it_runs(tmp_path: Path, backend: str, seed: int) -> None:
    from tests.snapshot.test_mapped import CHANGES

    with Machine.boot(MachineConfig(memory_bytes=16 << 20), Image(READS, flat=True)) as machine:
        machine.ram.write(0x300000, b"\1" * 0x100000)
        machine.run(position=1000)
        machine.save(tmp_path / "good")
    words = [sys.executable, "-c", CHILD, str(tmp_path), backend, str(seed)]
    done = subprocess.run(words, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    for name, stop, saved in json.loads(done.stdout):
        if name in CHANGES:
            wanted = f"SnapshotError: {tmp_path / 's'}: it was changed while its RAM was in use: "
            # Of what came at the last moment the run says nothing: then the save does.
            assert stop.startswith(wanted) or (stop == "time" and saved.startswith(wanted)), (name, stop, saved)
            assert saved.startswith("SnapshotError: "), (name, saved)
        elif name != "written anew, the same":  # for a moment it is cut
            assert (stop, saved) == ("time", "saved"), (name, stop, saved)


@pytest.fixture
def woken(boot_own, tmp_path):
    with boot_own() as machine:
        machine.run(position=2_000_000)
        machine.save(tmp_path / "s")
    with Machine.restore(tmp_path / "s", verify=True) as machine:
        yield machine


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("parent", [False, True])
@pytest.mark.parametrize("change", ["cut", "overwritten"])
def test_while_it_is_saved(woken, tmp_path, monkeypatch, change, live, parent):
    """The file is changed when the states are written and the RAM is still to be read, also in the forked copy."""
    from snapshot.writer import Writer
    from tests.snapshot.test_mapped import CHANGES

    (tmp_path / "parent").write_bytes((tmp_path / "s").read_bytes())
    real = Writer.ram

    def ram(self, *arguments, **options):
        CHANGES[change](tmp_path / "s")
        real(self, *arguments, **options)

    monkeypatch.setattr(Writer, "ram", ram)
    with pytest.raises(SnapshotError, match="s: it was changed while its RAM was in use"):
        options = {"parent": tmp_path / "parent"} if parent else {}
        if live:
            woken.checkpoint(tmp_path / "out", **options).wait()
        else:
            woken.save(tmp_path / "out", **options)
    assert sorted(os.listdir(tmp_path)) == ["parent", "s"]


def test_a_change_before_it_is_woken_whole(boot_own, tmp_path, monkeypatch):
    from snapshot.chain import Chain

    with boot_own() as machine:
        machine.run(position=2_000_000)
        machine.save(tmp_path / "s")
        machine.run(position=2_100_000)
        machine.save(tmp_path / "t", parent=tmp_path / "s")
    real = Chain.verify_ram

    def verify(self):
        real(self)
        os.truncate(tmp_path / "s", 100_000)

    monkeypatch.setattr(Chain, "verify_ram", verify)
    with pytest.raises(SnapshotError, match="cut"):
        Machine.restore(tmp_path / "t", verify=True)


def test_a_moment_is_of_the_file_no_more(woken, tmp_path):
    moment = woken.moment()
    before = woken.digests()
    os.truncate(tmp_path / "s", 0)
    assert woken.run(position=3_000_000) == Stopped(StopReason.POSITION)
    woken.rewind(moment, verify=True)
    assert woken.digests() == before
    woken.save(tmp_path / "out")


def test_no_moment_is_made_of_what_is_lost(woken, tmp_path):
    os.truncate(tmp_path / "s", 0)
    for each in (woken.moment, woken.digests):
        with pytest.raises(SnapshotError, match="it was changed"):
            each()


def test_the_command_line_says_it_in_one_line(tmp_path):
    with Machine.boot(MachineConfig(memory_bytes=16 << 20), Image(READS, flat=True)) as machine:
        machine.save(tmp_path / "s")
    words = [sys.executable, "-m", "anyhyve", "restore", str(tmp_path / "s"), "--until", "never"]
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    try:
        process.wait(1.5)
    except subprocess.TimeoutExpired:
        os.truncate(tmp_path / "s", 0)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = error.decode().splitlines()
    assert line.startswith(f"anyhyve: {tmp_path / 's'}: it was changed while its RAM was in use: ")
