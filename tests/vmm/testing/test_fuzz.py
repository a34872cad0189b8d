"""Fuzzing finds what is planted, makes it small, and leaves what shows it again; and finds nothing in ours."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import schema, versions
from snapshot.errors import SnapshotError
from tests.vmm.cli.test_main import MAIN, anyhyve, refusal
from vmm.errors import BackendError, RequestError
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig
from vmm.qtest.board import Command, parse
from vmm.testing import Case, Subject
from vmm.testing import fuzz as engine
from vmm.testing.actions import Wake
from vmm.testing.case import shrink
from vmm.testing.draw import case as drawn
from vmm.testing.subject import chips

PARTS = list(chips())
BROKEN = '''
from vmm.registers import reads
from vmm.devices.isa.rtc import Rtc
from vmm.devices.isa.uart import Uart


class Overflow(Uart):
    """A receiver FIFO without an end."""

    def _refill(self):
        s = self.state
        if s.host_input:
            s.received += s.host_input[:16]
            s.host_input = s.host_input[16:]


class OneFurther(Rtc):
    """It answers the byte beside."""

    @reads(1)
    def read_data(self):
        return self.state.ram[self.state.index + 1]


class Clumsy(Uart):
    """As bhyve's: saved and woken, it has another interrupt pending."""

    def restored(self):
        super().restored()
        self.state.thr_empty = True


class Endless(Uart):
    def write_scr(self, value):
        while value == 0xFF:
            pass
        super().write_scr(value)
'''


@pytest.fixture
def broken(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    return tmp_path


def golden(part):
    return schema.encode(Subject.named(part).device.State())


def fuzz(*arguments, cwd, timeout=60):
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "fuzz", *arguments], capture_output=True, text=True, cwd=cwd, timeout=timeout
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("device", "causes", "smallest"),
    [
        (
            "OneFurther",
            {"IndexError: index out of range in read_data"},
            r"(# state: index = 127|outb 0x0 0x7f)\nin[bwl] 0x\d\n",
        ),
        (
            "Overflow",
            {"one_byte_without_a_fifo holds no more", "not bytes of length N..N"},
            r'# call receive {"data": "0000"}\n',
        ),
        ("Clumsy", {"restored() changed the state"}, None),
    ],
)
def test_planted_faults_are_found_made_small_and_shown_again(broken, device, causes, smallest):
    done = fuzz(f"broken:{device}", "--seconds", "6", "--jobs", "2", cwd=broken)
    assert done.returncode == 1, done.stdout
    for why in causes:
        assert sum(why in line for line in done.stdout.splitlines()) == 1, "each cause once"
    again = re.findall(r"^  anyhyve (replay (\w+))$", done.stdout, re.M)
    assert len(again) >= len(causes)
    findings = broken / "anyhyve-fuzz" / "findings"
    shown = set()
    for line, id in again:
        replayed = anyhyve(*line.split(), cwd=broken)
        assert replayed.returncode == 1
        shown |= {why for why in causes if why in re.sub(r"\b\d+\b", "N", replayed.stdout.decode())}
        accesses = (findings / f"{id}.qtest").read_text()
        list(parse(accesses))
        assert len(accesses.splitlines()) <= 4, "small"
        # As `pytest` runs, which does not put this folder where modules are looked for.
        ran = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", findings / f"test_{id}.py"]
        failed = subprocess.run(ran, capture_output=True, text=True, cwd=broken)
        assert failed.returncode == 1 and "1 failed" in failed.stdout, failed.stdout
        assert "No module named" not in failed.stdout
    assert shown == causes, "each shown again"
    if smallest is not None:
        assert any(re.fullmatch(smallest, path.read_text().partition("\n")[2]) for path in findings.glob("*.qtest"))


def test_what_was_mended_is_said(broken):
    assert fuzz("broken:OneFurther", "--seconds", "1", cwd=broken).returncode == 1
    (broken / "broken.py").write_text(BROKEN.replace("index + 1", "index"))
    done = fuzz("broken:OneFurther", "--seconds", "0.2", cwd=broken)
    assert done.returncode == 0 and "fails no more" in done.stdout
    (id,) = (path.stem for path in (broken / "anyhyve-fuzz" / "findings").glob("*.json"))
    assert anyhyve("replay", id, cwd=broken).returncode == 0


def test_a_find_of_a_device_with_another_state_is_not_said_to_be_mended(broken):
    assert fuzz("broken:OneFurther", "--seconds", "1", cwd=broken).returncode == 1
    other = """
from dataclasses import dataclass
from snapshot.schema import state
from snapshot.field_types import u8
from vmm.devices.isa.rtc import RtcState

@state("rtc", version=99)
class OtherState(RtcState):
    more: u8 = 0
"""
    (broken / "broken.py").write_text(other + BROKEN.replace('"""It answers', 'State = OtherState\n    """It answers'))
    (id,) = {path.stem for path in (broken / "anyhyve-fuzz" / "findings").glob("*.json")}
    assert refusal("replay", id, cwd=broken).endswith("broken:OneFurther has another state now: rtc.more: missing")
    done = fuzz("broken:OneFurther", "--seconds", "0.2", cwd=broken)
    assert f"{id} cannot be played: " in done.stdout and "fails no more" not in done.stdout


LOST = """
import os
from vmm.registers import writes
from vmm.devices.isa.uart import Uart

class Killed(Uart):
    def write_scr(self, value):
        os.kill(os.getpid(), 9)

class InC(Uart):
    def write_scr(self, value):
        sum(range(1 << 60))

class SaysGuestError(Uart):
    def write_scr(self, value):
        from vmm.errors import BackendError, GuestError
        raise GuestError("boo")
"""


def test_a_process_that_is_lost_is_said(tmp_path):
    (tmp_path / "broken.py").write_text(LOST)
    done = fuzz("broken:Killed", "--seconds", "2", "--jobs", "1", cwd=tmp_path)
    assert done.returncode == 1 and "a process that fuzzed one of broken:Killed has ended" in done.stderr


def test_a_process_that_never_comes_back_from_c_is_ended(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(LOST)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(engine, "_LOST_S", 1)
    start = engine.Start("broken:InC", golden("com1"), 0)
    with ProcessPoolExecutor(1) as pool, pytest.raises(BackendError, match="never came back from C code"):
        engine.campaign([start], pool, jobs=1, seconds=2, folder=tmp_path / "corpus")


def test_an_error_of_ours_raised_by_a_device_is_a_find(tmp_path):
    (tmp_path / "broken.py").write_text(LOST)
    done = fuzz("broken:SaysGuestError", "--seconds", "1", "--jobs", "1", cwd=tmp_path)
    assert done.returncode == 1 and "GuestError: boo in write_scr" in done.stdout


@pytest.mark.parametrize("name", [":Foo", ".foo:X", "vmm.device:Device", "wrong:X", "raises:X", "builtins:int"])
def test_no_class_to_fuzz(tmp_path, name):
    (tmp_path / "wrong.py").write_text("def (")
    (tmp_path / "raises.py").write_text("1 / 0")
    done = fuzz(name, "--seconds", "1", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_every_find_has_an_id():
    for odd in ("\ud800", 10**40, None):
        assert len(Case("com1", {}, 0, {"scr": odd}, ()).id) == 8


def test_a_file_that_nests_too_deep():
    for text in ("[" * 100_000, json.dumps({"actions": ["call reset " + "[" * 100_000]})):
        with pytest.raises(RequestError):
            Case.from_json(text)


def test_what_does_not_end_is_found(broken):
    done = fuzz("broken:Endless", "--seconds", "4", cwd=broken)
    assert done.returncode == 1 and done.stdout.count("does not come to an end") == 1
    (path,) = (broken / "anyhyve-fuzz" / "findings").glob("*.qtest")
    assert path.read_text().splitlines()[1:] == ["outb 0x7 0xff"]


def test_the_board_is_clean(tmp_path, boot_own):
    with boot_own() as machine:
        machine.run(position=500_000)
        machine.save(tmp_path / "own.snap")
    done = fuzz("all", "--from", "own.snap", "--seconds", "0.4", "--jobs", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["finds"] == [] and report["executions"].keys() == set(PARTS) and report["per_second"] > 0
    assert sorted(p.name for p in (tmp_path / "anyhyve-fuzz").iterdir()) == sorted(PARTS)


def test_all_are_those_of_each_cpu_in_the_snapshot(tmp_path):
    from vmm.cli.fuzz import _starts

    with Machine.boot(MachineConfig(memory_bytes=2 << 20, cpus=3, board="pc"), Image(b"\xf4", flat=True)) as machine:
        machine.board.devices["lapic.2"].state.tpr = 0x20
        machine.save(tmp_path / "three")
    starts = {start.device: start for start in _starts(["all"], tmp_path / "three")}
    assert starts.keys() == {*PARTS, "lapic.1", "lapic.2"}
    assert starts["lapic.2"].golden["tpr"] == 0x20


def test_it_begins_where_the_snapshot_is(tmp_path, boot_own, broken):
    from vmm.cli.fuzz import _starts

    with boot_own() as machine:
        machine.run(position=500_000)
        machine.save(tmp_path / "own.snap")
        now, scr = machine.clock.now_ns(), schema.encode(machine.board.devices["pit"].state)
    (start,) = _starts(["pit"], tmp_path / "own.snap")
    assert (start.now, start.golden) == (now, scr) and start.golden != golden("pit")
    sys.path.insert(0, str(broken))
    try:
        (theirs,) = _starts(["broken:OneFurther"], tmp_path / "own.snap")  # by the name of its state
    finally:
        sys.path.remove(str(broken))
    with Machine.restore(tmp_path / "own.snap") as machine:
        assert theirs.golden == schema.encode(machine.board.devices["rtc"].state)


@given(st.sampled_from(PARTS), st.binary(max_size=300), st.booleans())
def test_any_bytes_are_a_case_that_can_be_written_down(part, data, hostile):
    found = drawn(Subject.named(part), golden(part), 10**9, data, hostile=hostile)
    try:
        text = json.dumps(found.to_json())
        assert Case.from_json(text) == found
    finally:
        assert found.failure() is None, "ours are clean"


@given(st.sampled_from(PARTS), st.binary(min_size=20, max_size=300))
def test_a_state_that_is_none_is_refused(part, data):
    """Hostile values are refused with one line, or are a state that is written as it was read."""
    found = drawn(Subject.named(part), golden(part), 10**9, data, hostile=True)
    declared = schema.schema_of(Subject.named(part).device.State)
    try:
        state = versions.decode(
            declared.name, declared.version, {**found.golden, **found.fields}, Subject.named(part).device.State
        )
    except SnapshotError as error:
        assert "\n" not in str(error)
    else:
        assert schema.encode(state) == {**found.golden, **found.fields}


@given(st.binary(min_size=50, max_size=300), st.integers(0, 255))
def test_what_is_shrunk_still_fails_and_nothing_can_be_left_out(data, wanted):
    """`fails` here: a write of a value as big, after a wake, in a state whose scr is not the golden one."""
    found = drawn(Subject.named("com1"), golden("com1"), 10**9, data)

    def fails(case):
        wakes = [i for i, action in enumerate(case.actions) if action == Wake()]
        writes = [
            i
            for i, a in enumerate(case.actions)
            if isinstance(a, Command) and a.op == "out" and (a.value or 0) >= wanted
        ]
        return bool(wakes and writes and min(wakes) < max(writes))

    if not fails(found):
        return
    small = shrink(found, fails)
    assert fails(small) and small.fields == {}
    wake, write = small.actions
    assert wake == Wake() and isinstance(write, Command) and write.value == wanted


@given(st.integers(1, 255), st.integers(0, 150))
def test_what_counts_up_to_a_failure_is_shrunk_to_its_last_access(scr, reads):
    """`fails` here: each access counts scr up, and one that finds it at 100 fails."""
    found = Case("com1", golden("com1"), 0, {"scr": scr}, (Command("in", 1, 0x3FF),) * reads)

    def fails(case):
        scr = case.fields.get("scr", case.golden["scr"])
        return scr <= 255 and scr + len(case.actions) > 100 and len(case.actions) > 0

    if fails(found):
        small = shrink(found, fails)
        assert len(small.actions) == 1 and small.fields == {"scr": 100}


def test_ctrl_c_leaves_a_usable_corpus(tmp_path):
    running = subprocess.Popen(
        [sys.executable, "-c", MAIN, "fuzz", "i8042", "pit", "--seconds", "600", "--jobs", "2"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), start_new_session=True,
    )  # fmt: skip
    while not any((tmp_path / "anyhyve-fuzz" / "i8042").glob("*")):
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0 and "Traceback" not in err and "cases" in out, (out, err)
    kept = {path: path.read_bytes() for path in (tmp_path / "anyhyve-fuzz" / "i8042").iterdir()}
    corpus = engine.Corpus(tmp_path / "anyhyve-fuzz" / "i8042")
    assert set(corpus.reached) == set(kept.values())
    with_it, without = (
        engine.explore(engine.Task(engine.Start("i8042", golden("i8042"), 0), False, "x", 0.3, known, frozenset()))
        for known in (tuple(corpus.reached), ())
    )
    assert len(set().union(*with_it.reached.values())) > len(set().union(*without.reached.values()))


def test_a_corpus_keeps_what_reaches_something_of_its_own(tmp_path):
    corpus = engine.Corpus(tmp_path / "corpus")
    corpus.add(b"one", [("a", 1)])
    corpus.add(b"two", [("a", 1)])
    corpus.add(b"three", [("a", 1), ("a", 2)])
    assert len(list((tmp_path / "corpus").iterdir())) == 2
    corpus.minimise()
    assert list(corpus.reached) == [b"three"]
    assert [path.read_bytes() for path in (tmp_path / "corpus").iterdir()] == [b"three"]


def test_one_line_for_a_users_mistake(tmp_path):
    said = refusal("fuzz", "com9")
    assert "no device 'com9': there are pic0" in said and said.count(" debugcon,") == 1
    assert "No module named 'nowhere'" in refusal("fuzz", "nowhere:Device")
    assert "not a Device class" in refusal("fuzz", "json:dumps")
    (tmp_path / "junk").write_text("junk")
    assert "file header" in refusal("fuzz", "rtc", "--from", tmp_path / "junk")
    assert "Not a directory" in refusal("fuzz", "rtc", "--in", tmp_path / "junk" / "x", "--seconds", "0.1")
    assert "no find 12ab in" in refusal("replay", "12ab", "--in", tmp_path)
    (tmp_path / "findings").mkdir()
    (tmp_path / "findings" / "12ab.json").write_text("{}")
    assert "not a finding of" in refusal("replay", "12ab", "--in", tmp_path)
    assert "give an ID, or --qtest FILE" in refusal("replay", status=2)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"device": 1, "golden": {}, "now": 0, "fields": {}, "actions": []}',
     '{"device": "rtc", "golden": {}, "now": 0, "fields": {}, "actions": ["dance"]}',
     '{"device": "rtc", "golden": {}, "now": 0, "fields": {}, "actions": ["call x []"]}'],
)  # fmt: skip
def test_what_is_no_case(text):
    with pytest.raises(RequestError):
        Case.from_json(text)


def test_a_call_that_the_device_does_not_know():
    for line in ("call dance {}", "call receive {}", 'call receive {"data": 5}'):
        text = {"device": "com1", "golden": golden("com1"), "now": 0, "fields": {}, "actions": [line]}
        with pytest.raises(RequestError, match="com1"):
            Case.from_json(json.dumps(text)).failure()


@pytest.mark.slow
def test_several_computers_by_dask(broken):
    """Two workers of a local cluster, each a process of its own."""
    distributed = pytest.importorskip("distributed", reason="no Dask here: pip install 'anyhyve[dask]'")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        done = fuzz("rtc", "uart", "--seconds", "1", "--dask", cluster.scheduler_address, cwd=broken)
        assert "no device 'uart'" in done.stderr
        done = fuzz(
            "rtc", "com1", "--seconds", "4", "--dask", cluster.scheduler_address, "--json", cwd=broken, timeout=120
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["executions"].keys() == {"rtc", "com1"} and min(report["executions"].values()) > 100
