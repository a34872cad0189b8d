"""Every method over a real socket: what it does, what it refuses, and in which states it has an answer."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from snapshot.verify import verify
from tests.conftest import ROOT
from tests.vmm.conftest import LAST_GOOD, eventually
from tests.vmm.control.test_socket import raw
from vmm.control import dispatch, lifecycle, methods, protocol
from vmm.control.client import Failed
from vmm.control.lifecycle import State
from vmm.control.methods import METHODS
from vmm.guest.image import Image
from vmm.machine.machine import Machine, Stopped, StopReason


def test_status(box):
    found = box.call("status")
    assert {**found, "position": 0, "guest_ns": 0, "pid": 0} == {
        "name": "box", "state": "running", "backend": "emu", "pid": 0, "memory_bytes": 16 << 20, "position": 0,
        "guest_ns": 0, "saving": None,
    }  # fmt: skip
    eventually(lambda: box.call("status")["position"] > found["position"])


def test_pause_and_resume(box):
    assert box.call("pause") == {"changed": True}
    assert box.call("pause") == {"changed": False}
    first, second = box.call("status"), box.call("status")
    assert first == second and first["state"] == "paused"
    assert box.call("resume") == {"changed": True}
    assert box.call("resume") == {"changed": False}
    eventually(lambda: box.call("status")["position"] > first["position"])


@pytest.mark.parametrize("how", [{}, {"hold": True}, {"pack": True}])
def test_checkpoint(box, tmp_path, how):
    file = tmp_path / "cut"
    saved = box.call("checkpoint", path=str(file), **how)
    assert saved["path"] == str(file) and saved["size_bytes"] == file.stat().st_blocks * 512
    verify(file)
    with Machine.restore(file) as woken:
        assert woken.position == saved["position"] and woken.clock.now_ns() == saved["guest_ns"]
    eventually(lambda: box.call("status")["position"] > saved["position"])


@pytest.mark.parametrize("name", ["hold", "stop"])
@pytest.mark.parametrize("value", [True, False])
def test_it_stands_still_until_the_file_is_on_disk_if_it_shall(box, gate, tmp_path, name, value):
    """`stop` is what `hold` was called before."""
    with box.client() as client:
        client.ask("checkpoint", path=str(tmp_path / "cut"), **{name: value})
        eventually(lambda: box.vm._saves and box.vm._saves[0].checkpoint)
        assert box.call("status")["state"] == ("saving" if value else "running")
        time.sleep(0.5 * value)
        gate()
        saved = client.read()["result"]
        assert saved["path"] == str(tmp_path / "cut")
        assert saved["pause_s"] <= saved["wall_s"] and (not value or saved["pause_s"] >= 0.5), "how long it stood still"
    assert box.call("status")["state"] == "running"


def test_an_old_name_is_the_new_one(box, tmp_path):
    for params in ({"hold": True, "stop": True}, {"stop": 1}):
        with pytest.raises(Failed, match=r"checkpoint: .*hold") as failed:
            box.call("checkpoint", path=str(tmp_path / "cut"), **params)
        assert failed.value.code == protocol.INVALID_PARAMS and not list(tmp_path.iterdir())
    with pytest.raises(Failed, match="suspend has no parameter 'stop'"):
        box.call("suspend", path=str(tmp_path / "cut"), stop=True)


def test_checkpoint_for_an_older_release(boxes, boot_own, tmp_path):
    box = boxes(machine=boot_own(tsc_khz=1_000_000))
    box.call("checkpoint", path=str(tmp_path / "old"), for_version="0.1.0")
    with Machine.restore(tmp_path / "old") as woken:
        assert woken.config.tsc_khz == 1_000_000


def test_checkpoint_of_what_an_older_release_cannot_say(box, tmp_path):
    with pytest.raises(Failed, match="tsc_khz: version 1 has a TSC") as failed:
        box.call("checkpoint", path=str(tmp_path / "old"), for_version="0.1.0")
    assert failed.value.code == protocol.SNAPSHOT and not list(tmp_path.iterdir())
    assert box.call("status")["state"] == "running"


def test_a_difference_and_what_cannot_be_one(box, tmp_path):
    box.call("checkpoint", path=str(tmp_path / "first"))
    box.call("checkpoint", path=str(tmp_path / "second"), parent=str(tmp_path / "first"))
    verify(tmp_path / "second")
    Machine.restore(tmp_path / "second", verify=True).close()
    with pytest.raises(Failed, match="it is not in the folder") as failed:
        box.call("checkpoint", path="/tmp/elsewhere", parent=str(tmp_path / "first"))
    assert failed.value.code == protocol.SNAPSHOT


@pytest.mark.parametrize("paused", [False, True])
def test_suspend(boxes, tmp_path, paused):
    box = boxes(paused=paused)
    with box.client() as client:
        saved = client.call("suspend", path=str(tmp_path / "cut"))
        eventually(lambda: box.end)
    assert box.end == Stopped(StopReason.SUSPENDED) and box.vm.state is State.STOPPED
    assert box.machine.position == saved["position"], "it did not run between the instant and the end"
    with Machine.restore(tmp_path / "cut") as woken:
        assert woken.digests() == box.machine.digests()


@pytest.mark.parametrize("method", ["checkpoint", "suspend"])
@pytest.mark.parametrize("paused", [False, True])
def test_a_save_that_fails_changes_nothing(boxes, monkeypatch, method, paused):
    box = boxes(paused=paused)
    with pytest.raises(Failed, match="cannot save to /proc/here") as failed:
        box.call(method, path="/proc/here")
    assert failed.value.code == protocol.HOST
    assert box.call("status")["state"] == ("paused" if paused else "running")


def test_stop(box):
    with box.client() as client:
        assert client.call("stop") == {}
    eventually(lambda: box.end)
    assert box.end == Stopped(StopReason.STOPPED) and box.vm.state is State.STOPPED


def test_stop_before_it_ran(boxes):
    box = boxes(start=False)
    with box.client() as client:
        call = client.ask("stop")
        eventually(lambda: box.vm._waiting)
        box.start()
        assert client.read()["id"] == call
    eventually(lambda: box.end)
    assert box.end == Stopped(StopReason.STOPPED) and box.machine.position == 0


def test_reset(box, boot_own):
    eventually(lambda: box.call("status")["position"] > 2_000_000)
    box.call("pause")
    assert box.call("reset") == {}
    assert box.call("status")["position"] == 0
    as_after_power_on(box.machine, boot_own)


def as_after_power_on(machine, boot_own):
    found, fresh = machine.states(), boot_own()
    # MR leaves a serial port's scratch register and divisor alone.
    assert {name for name, state in fresh.states().items() if state != found[name]} <= {"com1"}
    assert machine.digests()["ram"] == fresh.digests()["ram"]
    fresh.close()


def test_a_woken_machine_can_be_reset_only_with_its_image(boxes, boot_own, tmp_path):
    with boot_own() as machine:
        machine.run(position=1_000_000)
        machine.save(tmp_path / "cut")
    box = boxes(machine=Machine.restore(tmp_path / "cut"), paused=True)
    with pytest.raises(Failed, match=r"to start again it needs own.bin \(8192 bytes, .*\), which is neither") as failed:
        box.call("reset")
    assert failed.value.code == protocol.REQUEST
    box.machine.image = Image.from_files(ROOT / "fixtures/guests/own/own.bin", flat=True)
    box.call("reset")
    as_after_power_on(box.machine, boot_own)


def test_console_read(box):
    first = box.call("console.read", wait_s=20)
    eventually(lambda: box.machine.board.console.total > first["next"] + 100)
    whole = box.call("console.read", offset=0)
    assert whole["offset"] == 0 and whole["data"].startswith(first["data"])
    part = box.call("console.read", offset=7)
    assert part["data"].startswith(whole["data"][7:])
    assert whole["next"] == len(whole["data"])


def test_console_read_waits_for_what_comes(box):
    box.call("pause")
    end = box.call("console.read", offset=None)
    assert end["data"] == "" and end["offset"] == end["next"] == box.machine.board.console.total
    assert box.call("console.read", offset=end["next"], wait_s=0.05)["data"] == ""
    with box.client() as client:
        call = client.ask("console.read", offset=end["next"], wait_s=50)
        box.call("resume")
        answer = client.read()
    assert answer["id"] == call and answer["result"]["data"] and answer["result"]["offset"] == end["next"]


def test_console_read_of_what_is_no_longer_kept(box):
    box.call("pause")
    console = box.machine.board.console
    for _ in range(3 << 20):
        console.transmit(65)
    found = box.call("console.read", offset=0)
    assert found["offset"] == console.total - len(console.output) > 0
    assert found["next"] == found["offset"] + methods.MAX_READ


def test_console_write(box):
    eventually(lambda: b"round" in box.machine.board.console.output)  # its port is set up
    assert box.call("console.write", data="ab\xff") == {"taken": 3}
    eventually(lambda: all(each in box.machine.board.console.output for each in (b"[a]", b"[b]", b"[\xff]")))
    with pytest.raises(Failed, match=r"characters up to U.00FF") as failed:
        box.call("console.write", data="\u0100")
    assert failed.value.code == protocol.INVALID_PARAMS


def test_console_write_takes_no_more_than_it_can_hold(box):
    box.call("pause")
    assert box.call("console.write", data="x" * 60_000) == {"taken": 60_000}
    assert box.call("console.write", data="x" * 60_000) == {"taken": methods.MAX_TYPED - 60_000}
    assert box.call("console.write", data="x") == {"taken": 0}


def test_preflight(box, tmp_path):
    found = box.call("snapshot.preflight", path=str(tmp_path / "cut"))
    assert 0 < found["most_bytes"] <= 16 << 20 and found["free_bytes"] > 0
    with pytest.raises(Failed, match="is not a folder"):
        box.call("snapshot.preflight", path=str(tmp_path / "no" / "cut"))
    with pytest.raises(Failed, match=r"parent .*none: No such file"):
        box.call("snapshot.preflight", path=str(tmp_path / "cut"), parent=str(tmp_path / "none"))
    assert not list(tmp_path.iterdir())


def test_preflight_of_a_folder_that_is_almost_full(box, tmp_path, monkeypatch):
    box.call("pause")
    path = str(tmp_path / "cut")
    most = box.call("snapshot.preflight", path=path)["most_bytes"]
    for free, fits in ((most, True), (most - 1, False)):
        monkeypatch.setattr("os.statvfs", lambda _, free=free: SimpleNamespace(f_bavail=free, f_frsize=1))
        if fits:
            assert box.call("snapshot.preflight", path=path) == {"most_bytes": most, "free_bytes": free}
        else:
            with pytest.raises(Failed, match=f"it may take {most} bytes, and {free} are free there") as failed:
                box.call("snapshot.preflight", path=path)
            assert failed.value.code == protocol.HOST


def test_devices(box):
    box.call("pause")
    found = box.call("devices")
    assert [each["name"] for each in found] == list(box.machine.states())
    (uart,) = box.call("devices", name="com1")
    assert {**uart, "state": None} == {**next(each for each in found if each["name"] == "com1"), "state": None}
    assert uart["schema"] == "uart.16550a" and uart["state"]["mcr"] == box.machine.board.devices["com1"].state.mcr
    with pytest.raises(Failed, match="there is no part 'com9'; there are config") as failed:
        box.call("devices", name="com9")
    assert failed.value.code == protocol.INVALID_PARAMS


def test_stats(box):
    box.call("pause")
    found = box.call("stats")
    assert found["exits"] == box.machine.exits() and found["console_bytes"] == box.machine.board.console.total
    assert found["position"] == box.machine.position and found["cpu_s"] > 0 and found["max_rss_bytes"] > 16 << 20


def test_events(box, tmp_path, gate):
    with box.client() as client:
        assert client.call("events", kinds=["state", "saved"]) == {"kinds": ["saved", "state"]}
        box.call("pause")
        assert client.read()["params"] == {"kind": "state", "state": "paused"}
        gate()
        box.call("checkpoint", path=str(tmp_path / "cut"))
        assert client.read()["params"]["kind"] == "saved"
        client.call("events", kinds=[])
        box.call("resume")
        client.call("events")
        box.call("stop")
        assert client.read()["params"] == {"kind": "state", "state": "stopped"}
        with pytest.raises(Failed, match="there is no kind 'weather'"):
            client.call("events", kinds=["weather"])


def test_progress_and_cancel(box, tmp_path, gate):
    heard = []
    (tmp_path / "cut").write_bytes(LAST_GOOD)
    with box.client() as client:
        client.call("events", kinds=["progress", "save failed"])
        call = client.ask("checkpoint", path=str(tmp_path / "cut"))
        heard.append(client.read())
        assert box.call("status")["saving"] == str(tmp_path / "cut")
        with pytest.raises(Failed, match=r"a save to .*cut is under way") as failed:
            box.call("checkpoint", path=str(tmp_path / "other"))
        assert failed.value.code == protocol.WRONG_STATE
        assert box.call("cancel") == {"path": str(tmp_path / "cut")}
        heard += [client.read(), client.read()]
    progress, *rest = heard
    assert progress["params"]["kind"] == "progress" and 0 < progress["params"]["done"] <= progress["params"]["total"]
    (answer,) = [message for message in rest if message.get("id") == call]
    assert answer["error"]["code"] == protocol.CANCELLED
    assert box.call("cancel") == {"path": None}
    assert [file.name for file in tmp_path.iterdir()] == ["cut"]
    assert (tmp_path / "cut").read_bytes() == LAST_GOOD


# --- in every state


PARAMS = {
    "checkpoint": {"path": "/nowhere/cut"},
    "suspend": {"path": "/nowhere/cut"},
    "snapshot.preflight": {"path": "/nowhere/cut"},
    "console.write": {"data": "x"},
}


def in_state(state, boxes, tmp_path, request):
    """A box in `state`, however it gets there."""
    if state is State.FAILED:
        box = boxes(start=False)
        box.machine.loop.go_on = lambda: (_ for _ in ()).throw(AssertionError("planted"))
        box.start()
    elif state is State.SAVING:
        request.getfixturevalue("gate")
        box = boxes()
        box.vm.save(tmp_path / "cut", hold=True)
    else:
        box = boxes(paused=state is State.PAUSED, start=state is not State.CREATED)
    if state is State.STOPPED:
        box.vm.stop()
    eventually(lambda: box.vm.state is state)
    return box


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("state", list(State))
def test_every_command_has_an_answer_in_every_state(boxes, tmp_path, request, state, name):
    """Those allowed do what their own tests say; here: the others are refused, and change nothing."""
    box = in_state(state, boxes, tmp_path, request)
    if state in METHODS[name].states:
        if name not in ("stop",) or state is not State.CREATED:  # which waits for the machine to begin
            with contextlib.suppress(Failed):
                box.call(name, **PARAMS.get(name, {}))
    else:
        with pytest.raises(Failed, match=f"{name}: the machine is {state}; it must be ") as failed:
            box.call(name, **PARAMS.get(name, {}))
        assert failed.value.code == protocol.WRONG_STATE
        assert box.vm.state is state
    if state is State.FAILED:
        assert isinstance(eventually(lambda: box.end), AssertionError)
    if state is State.SAVING:
        request.getfixturevalue("gate")()  # what was begun is finished: not after a minute


@pytest.mark.parametrize("name", list(METHODS))
def test_wrong_parameters(box, name):
    wrong = [{"no such": 1}, *({key: {"a": 1}} for key in METHODS[name].params), *([{}] if name in PARAMS else [])]
    for params in wrong:
        with pytest.raises(Failed, match=name) as failed, box.client() as client:
            client._socket.sendall(protocol.pack(method=name, params=params, id=1))
            client._last = 1
            answer = client.read()
            raise Failed(answer["error"]["code"], answer["error"]["message"])
        assert failed.value.code == protocol.INVALID_PARAMS
    assert box.call("status")["state"] == "running"


def test_the_longest_wait_is_one(box):
    assert box.call("console.read", offset=0, wait_s=dispatch.MAX_WAIT_S)["data"]  # which there is already
    with pytest.raises(Failed, match="wait_s must be"):
        box.call("console.read", offset=0, wait_s=dispatch.MAX_WAIT_S + 0.1)


def test_the_longest_path_is_one(box):
    """PATH_MAX is 4096, with the zero at its end."""
    with pytest.raises(Failed, match="File name too long"):
        box.call("checkpoint", path="/" + "x" * 4094)
    with pytest.raises(Failed, match="must be an absolute path"):
        box.call("checkpoint", path="/" + "x" * 4095)


@pytest.mark.parametrize("path", ["relative", "", "/a\0b", "/" + "x" * 5000, 7, None])
def test_a_path_is_absolute(box, path):
    with pytest.raises(Failed, match="checkpoint: path must be an absolute path") as failed:
        box.call("checkpoint", path=path)
    assert failed.value.code == protocol.INVALID_PARAMS


@pytest.mark.parametrize("path", ["/no\nwhere/\x1b[2J", "/\u202e\u200b/\udcff"])
def test_an_error_is_one_line_that_does_nothing(box, path):
    with raw(box) as wire:
        wire.sendall(protocol.pack(method="checkpoint", params={"path": path}, id=1))
        message = json.loads(wire.makefile("rb").readline())["error"]["message"]
    assert message.isprintable() and message.startswith("cannot save to /")


# --- the documentation says what the code does


DOC = Path(ROOT, "docs", "control.md")


def test_the_page_is_made_by_running_the_module():
    made = subprocess.run(
        [sys.executable, "-m", "vmm.control.methods"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert made.stdout == METHODS.describe() + "\n"


def test_the_methods_are_documented():
    assert METHODS.describe() in DOC.read_text()


def test_the_lifecycle_is_drawn():
    assert f"```mermaid\n{lifecycle.diagram()}\n```" in DOC.read_text()


def test_the_events_are_documented():
    """All, and no others."""
    _, _, after = DOC.read_text().partition("| event | when | details |")
    assert tuple(re.findall(r"^\| `(.*?)` \|", after.partition("\n\n")[0], re.MULTILINE)) == methods.EVENTS


def test_the_errors_are_documented():
    """All, and no others."""
    rows = re.findall(r"^\| (-?\d+) \| (.*?) \|", DOC.read_text(), re.MULTILINE)
    assert rows == [(str(code), what) for code, what in protocol.CODES.items()]


def test_the_example_exchange_is_true(box):
    example = re.search(r"```json\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert example is not None
    lines = example[1].splitlines()
    box.call("pause")
    with box.client() as client:
        for asked, answered in zip(lines[::2], lines[1::2], strict=True):
            client._socket.sendall(asked.encode() + b"\n")
            expected, found = json.loads(answered), client.read()
            assert expected.keys() == found.keys() and expected["id"] == found["id"]
            for part in ("result", "error"):
                if part in expected:
                    assert expected[part].keys() == found[part].keys()
            if "error" in expected:
                assert found["error"]["code"] == expected["error"]["code"]
                assert found["error"]["message"].startswith(expected["error"]["message"].removesuffix("..."))
