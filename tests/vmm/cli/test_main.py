"""The command line as a user meets it: one process each, exit status, and one clear line where something is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OWN

OWN_GUEST = ["run", "--kernel", str(OWN), "--flat", "--memory", "16M"]


MAIN = "from vmm.cli.main import main; main()"
NO_KVM = f"import kvmbackend.vm as vm; vm.DEVICE = '/nowhere/kvm'; {MAIN}"  # a computer without


def anyhyve(
    *arguments: object, typed: bytes = b"", main: str = MAIN, **options: Any
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", main, *map(str, arguments)], input=typed, capture_output=True, timeout=30, **options
    )


def refusal(*arguments: object, status: int = 1, **options: Any) -> str:
    done = anyhyve(*arguments, **options)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == status, lines
    assert "Traceback" not in done.stderr.decode()
    if status == 1:
        assert len([line for line in lines if line]) == 1 and lines[0].startswith("anyhyve: "), lines
    return lines[-1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "own"
    done = anyhyve(*OWN_GUEST, "--at", 3_000_000, "--save", file, "--json")
    assert done.returncode == 0, done.stderr
    return file


def test_the_console_goes_to_standard_output_and_typing_to_the_guest():
    done = anyhyve(*OWN_GUEST, "--until", r"\[x\]", typed=b"xx")  # the guest throws one away when it sets up its port
    assert done.returncode == 0
    assert done.stdout.startswith(b"anyhyve own guest") and b"[x]" in done.stdout
    assert re.search(rb"the console shows \\\[x\\\], at position \d+", done.stderr)


def test_json_is_one_object_of_the_promised_shape():
    answers = [json.loads(anyhyve(*OWN_GUEST, "--at", 2_000_000, "--json").stdout) for _ in range(2)]
    first, second = answers
    assert set(first) == {"position", "guest_ns", "wall_s", "exits", "stopped", "saved", "digest"}
    assert 2_000_000 <= first["position"] < 2_000_015
    assert set(first["digest"]) == {"ram", "cpu", "devices"}
    assert {"pic0", "pit", "rtc", "com1", "i8042", "clock", "board"} <= set(first["digest"]["devices"])
    assert all(type(n) is int for n in first["exits"].values()) and first["exits"]["port_out"] > 0
    for volatile in ("wall_s",):
        first.pop(volatile), second.pop(volatile)
    assert first == second, "two processes agree in everything but wall time"


def test_saved_and_woken_is_as_never_saved(saved):
    whole = json.loads(anyhyve(*OWN_GUEST, "--at", 6_000_000, "--json").stdout)
    woken = json.loads(anyhyve("restore", saved, "--at", 6_000_000, "--json", "--verify").stdout)
    assert woken["digest"] == whole["digest"] and woken["guest_ns"] == whole["guest_ns"]


def test_a_guests_exit_is_our_exit():
    assert anyhyve(*OWN_GUEST, typed=b"qq").returncode == 1  # (0 << 1) | 1, as isa-debug-exit gives it


def test_a_guest_that_stops_short_of_what_was_asked(tmp_path):
    halt = tmp_path / "halt"
    halt.write_bytes(b"\xfa\xf4")  # cli; hlt
    assert anyhyve("run", "--kernel", halt, "--flat", "--memory", "2M", "--until", "never").returncode == 3
    assert anyhyve("run", "--kernel", halt, "--flat", "--memory", "2M").returncode == 0


def test_a_triple_fault_is_told(tmp_path):
    crash = tmp_path / "crash"
    crash.write_bytes(bytes.fromhex("0f01 1c25 0000 2000 0f0b".replace(" ", "")))  # lidt of zeros; ud2
    done = anyhyve("run", "--kernel", crash, "--flat", "--memory", "4M")
    assert done.returncode == 1 and b"triple fault" in done.stderr


PROMPT = bytes.fromhex("66baf803 b041 ee ebfe")  # mov dx, 3F8h; mov al, 'A'; out dx, al; jmp $
FLOOD = bytes.fromhex("66baf803 b041 ee ebfd")  # the same, and again


@pytest.mark.parametrize("typed", [subprocess.DEVNULL, subprocess.PIPE, "closed"])
@pytest.mark.parametrize(("code", "enough"), [(PROMPT, 1), (FLOOD, 100_000)], ids=["prompt", "flood"])
def test_a_line_without_an_end_is_shown_as_it_comes(tmp_path, typed, code, enough):
    (tmp_path / "guest").write_bytes(code)
    words = [sys.executable, "-c", MAIN, "run", "--kernel", str(tmp_path / "guest"), "--flat", "--memory", "2M"]
    how: dict[str, Any] = {"stdin": typed} if typed != "closed" else {"preexec_fn": lambda: os.close(0)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **how) as running:
        assert running.stdout is not None
        killer = threading.Timer(20, running.kill)
        killer.start()
        shown = running.stdout.read(enough)
        killer.cancel()
        running.kill()
    assert shown == b"A" * enough


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "the kernel is an empty file"),
        (b"not a kernel" * 100, "neither a bzImage nor an ELF"),
        (b"\x7fELF" + bytes(100), "not for x86-64"),
        (bytes(0x202) + b"HdrS", "cut short"),
        (bytes(0x202) + b"HdrS" + bytes(0x400), "no 64-bit entry"),
    ],
)
def test_a_wrong_kernel_is_one_line(tmp_path, content, words):
    kernel = tmp_path / "kernel"
    if content is not None:
        kernel.write_bytes(content)
    assert words in refusal("run", "--kernel", kernel)


def test_a_folder_is_no_kernel(tmp_path):
    assert f"{tmp_path}: Is a directory" in refusal("run", "--kernel", tmp_path)


def test_backends(saved):
    assert "no backend 'xen'" in refusal("restore", saved, "--backend", "xen")
    assert "there is no /nowhere/kvm" in refusal("restore", saved, "--backend", "kvm", main=NO_KVM)
    assert "there is no /nowhere/kvm" in refusal(*OWN_GUEST, "--backend", "kvm", main=NO_KVM)
    done = anyhyve("restore", saved, "--backend", "auto", "--at", 3_000_100, main=NO_KVM)
    assert done.returncode == 0 and b"anyhyve: backend emu: kvm: there is no /nowhere/kvm" in done.stderr
    done = anyhyve("snapshot", "check", saved, "--backend", "auto", main=NO_KVM)
    assert done.returncode == 0 and b"will load on emu" in done.stdout
    assert b"not ready: kvm: there is no /nowhere/kvm" in anyhyve("doctor", main=NO_KVM, env={"COLUMNS": "200"}).stdout


def test_the_clock_stands_still_or_catches_up(tmp_path):
    start = int(time.time()) - 1000
    anyhyve(*OWN_GUEST, "--epoch", start, "--at", 300_000, "--save", tmp_path / "own", "--json", check=True)
    times = {}
    for policy in ("freeze", "catch-up"):
        done = anyhyve("restore", tmp_path / "own", "--clock", policy, "--at", 400_000, "--json", check=True)
        times[policy] = json.loads(done.stdout)["guest_ns"] / 1e9
    assert times["freeze"] < 10 and 1000 <= times["catch-up"] < 1100
    anyhyve(*OWN_GUEST, "--at", 300_000, "--save", tmp_path / "old", "--json", check=True)
    assert "too long to catch up with" in refusal("restore", tmp_path / "old", "--clock", "catch-up")


def test_lockstep_of_the_emulated_cpu_with_itself(saved):
    done = anyhyve("lockstep", saved, "--against", "emu", "--instructions", 3000, "--json", check=True)
    assert json.loads(done.stdout) == {"instructions": 3000, "divergence": None}
    assert "needs the emulated CPU" in refusal("lockstep", saved, "--backend", "kvm", "--against", "kvm")


@pytest.mark.parametrize("size", ["0", "5K", "1000G"])
def test_a_memory_that_cannot_be(size):
    refusal("run", "--kernel", OWN, "--flat", "--memory", size)


@pytest.mark.parametrize(
    "arguments",
    [("--memory", "many"), ("--until", "("), ("--at", "-1"), ("--pace", "slow"), ("--epoch", "x")],
)
def test_wrong_usage(arguments):
    assert "Error: Invalid value" in refusal(*OWN_GUEST, *arguments, status=2)


def test_a_snapshot_that_is_none(tmp_path, saved):
    assert "No such file" in refusal("restore", tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    for command in (("restore",), ("snapshot", "show"), ("snapshot", "verify")):
        refusal(*command, tmp_path / "text")
    damaged = bytearray(saved.read_bytes())
    damaged[2000] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    assert "offset" in refusal("restore", tmp_path / "damaged")


def test_damaged_ram_is_found_by_verify(tmp_path, saved):
    data = bytearray(saved.read_bytes())
    at = data.index(b"\x0f\x01", 1 << 20)  # some code of the guest
    data[at] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    for command in (("snapshot", "verify"), ("restore", "--verify")):
        assert "ram.0" in refusal(*command, tmp_path / "damaged")


def test_show(saved):
    text = anyhyve("snapshot", "show", saved).stdout.decode()
    assert "rtc.mc146818 version 1" in text and "cpu.0" in text and "prepaid" in text and "ram.0" in text
    tree = json.loads(anyhyve("snapshot", "show", saved, "--json").stdout)
    assert tree["parts"]["config"]["state"]["memory_bytes"] == 16 << 20
    assert tree["ram"][0]["size"] == 16 << 20


def test_verify_says_good(saved):
    assert b"good" in anyhyve("snapshot", "verify", saved).stdout


def test_doctor():
    done = anyhyve("doctor", "--json")
    findings = json.loads(done.stdout)
    assert done.returncode == 0 and findings["emu"].startswith("ready")
    assert findings["kvm"].startswith(("ready: TSC at", "not ready: kvm: ", "not ready: this host's KVM fails "))


def test_doctor_says_how_callbacks_run(monkeypatch):
    monkeypatch.setenv("ANYHYVE_PORTABLE", "1")
    assert "portable" in json.loads(anyhyve("doctor", "--json").stdout)["emu"]


def test_where_a_snapshot_cannot_be_written(tmp_path):
    assert "cannot save to" in refusal(*OWN_GUEST, "--at", 1000, "--json", "--save", tmp_path / "no" / "file")


def test_a_save_the_host_refuses_leaves_the_old_one(tmp_path, saved):
    """RLIMIT_FSIZE: the kernel refuses in the middle of writing, as a full disk does."""
    file = tmp_path / "kept"
    file.write_bytes(saved.read_bytes())

    def little_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    line = refusal("restore", file, "--at", 4_000_000, "--json", "--save", file, preexec_fn=little_disk)
    assert "cannot save to" in line and "File too large" in line
    assert file.read_bytes() == saved.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"], "no temporary is left"


def test_ctrl_c_while_it_is_imported_ends_it_without_a_word(tmp_path):
    """An import of its own that takes for ever stands for a slow computer."""
    (tmp_path / "vmm").mkdir()
    (tmp_path / "vmm" / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    script = f"import sys, anyhyve.__main__ as m; sys.path.insert(0, {str(tmp_path)!r}); m.main()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == b"importing\n"
        running.send_signal(signal.SIGINT)
        assert running.stderr.read() == b"" and running.wait(20) == -signal.SIGINT
