"""`anyhyve snapshot` as a user meets it: each command on a real machine's snapshot, and its one-line refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snapshot import rewrite
from snapshot.chain import Chain
from snapshot.edit import set_field
from tests.vmm.cli.test_main import NO_KVM, OWN_GUEST, anyhyve, refusal
from vmm.errors import GuestError
from vmm.guest.symbols import Symbols


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a` at 3 M, `b` at 4 M as a difference to it, `c` at 4 M packed."""
    folder = tmp_path_factory.mktemp("saved")
    for arguments in (
        (*OWN_GUEST, "--at", 3_000_000, "--save", folder / "a"),
        ("restore", folder / "a", "--at", 4_000_000, "--save", folder / "b", "--parent", folder / "a"),
        ("restore", folder / "a", "--at", 4_000_000, "--save", folder / "c", "--pack"),
    ):
        done = anyhyve(*arguments, "--json")
        assert done.returncode == 0, done.stderr
    return folder


def text(*arguments, status=0) -> str:
    done = anyhyve(*arguments)
    assert done.returncode == status, done.stderr
    return done.stdout.decode()


def test_a_difference_and_a_packed_snapshot_wake_alike(saved):
    first, second = (json.loads(text("restore", saved / name, "--at", 5_000_000, "--json")) for name in "bc")
    assert first["digest"] == second["digest"]


def test_show_disassembles_at_rip(saved):
    shown = json.loads(text("snapshot", "show", saved / "b", "--json"))
    rip = shown["parts"]["cpu.0"]["state"]["rip"]
    assert len(shown["code"]) == 6 and shown["code"][0].startswith(f"{rip:#x}: ")
    assert shown["parent"]["file"] == "a"
    plain = text("snapshot", "show", saved / "b")
    assert "code at RIP:" in plain and shown["code"][1] in plain and "on parent" in plain


def test_show_disassembles_at_each_rip(tmp_path):
    text(*OWN_GUEST, "-c", 2, "--at", 100_000, "--save", tmp_path / "two")
    shown = json.loads(text("snapshot", "show", tmp_path / "two", "--json"))
    assert shown["parts"]["smp"]["state"]["current"] == 0 and shown["parts"]["lapic.1"]["state"]["waits"]
    assert list(shown["codes"]) == ["cpu.0", "cpu.1"] and shown["codes"]["cpu.0"] == shown["code"] != []
    plain = text("snapshot", "show", tmp_path / "two")
    assert "code at RIP of cpu.0:" in plain and "code at RIP:" not in plain


def test_diff(saved):
    found = json.loads(text("snapshot", "diff", saved / "a", saved / "b", "--json", status=1))
    fields = {f"{d['part']}.{d['field']}" for d in found["state"]}
    assert "clock.position" in fields and "config.memory_bytes" not in fields
    assert found["ram"] and all(run["start"] <= run["at"] < run["end"] for run in found["ram"])
    assert "clock.position: " in text("snapshot", "diff", saved / "a", saved / "b", status=1)
    assert text("snapshot", "diff", saved / "b", saved / "c") == "", "the same machine, stored in two ways"


def test_diff_names_symbols(saved, tmp_path):
    run = json.loads(text("snapshot", "diff", saved / "a", saved / "b", "--json", status=1))["ram"][0]
    virtual = 0xFFFFFFFF80000000 + run["at"]
    (tmp_path / "map").write_text(f"{virtual - 16:016x} d counters\n{virtual + 4096:016x} d next\n")
    found = text("snapshot", "diff", saved / "a", saved / "b", "--symbols", tmp_path / "map", status=1)
    assert "(counters+0x10)" in found
    (tmp_path / "map").write_text("nonsense\n")
    assert "not a System.map" in refusal("snapshot", "diff", saved / "a", saved / "b", "--symbols", tmp_path / "map")


def test_symbols():
    names = Symbols([(0x100, "a"), (0x200, "b"), (0x300, "end")])
    assert [names.at(x) for x in (0xFF, 0x100, 0x1FF, 0x200, 0x300, 0x301)] == [None, "a", "a+0xff", "b", "end", None]
    assert Symbols([]).at(0) is None
    with pytest.raises(GuestError):
        Symbols.load(Path(__file__))


def test_unpack_pack(saved, tmp_path):
    for name in "abc":
        text("snapshot", "unpack", saved / name, tmp_path / f"{name}.d")
        text("snapshot", "pack", tmp_path / f"{name}.d", tmp_path / name)
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()
    assert "File exists" in refusal("snapshot", "unpack", saved / "a", tmp_path / "a.d")


def test_edit(saved, tmp_path):
    text("snapshot", "edit", saved / "a", "--set", "com1.scr=0x83", "--set", "rtc.index=12", "--out", tmp_path / "a")
    found = json.loads(text("snapshot", "diff", saved / "a", tmp_path / "a", "--json", status=1))
    assert found["ram"] == []
    assert [(d["part"], d["field"], d["second"]) for d in found["state"]] == [
        ("rtc", "index", 12),
        ("com1", "scr", 0x83),
    ]
    assert "will load" in text("snapshot", "check", tmp_path / "a")
    assert "not an integer in 0..127" in refusal("snapshot", "edit", saved / "a", "--set", "rtc.index=128")
    assert "there is no such field" in refusal("snapshot", "edit", saved / "a", "--set", "rtc.colour=1")


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ("cpu.0.cr0=0x80000000", "no CPU can be in this state: cpu.cr0: PG without PE"),
        ("config.memory_bytes=8388608", "the RAM in the snapshot is not laid out as its config says"),
        ("config.memory_bytes=5000", "memory"),
        ("config.board=desk", "desk"),
        ("clock.prepaid=65535", "clock.prepaid"),
    ],
)
def test_edit_refuses_what_would_not_load(saved, tmp_path, field, why):
    """And in the one file that does not load already it may be the cure."""
    said = refusal("snapshot", "edit", saved / "a", "--set", field, "--out", tmp_path / "x")
    assert said.startswith(f"anyhyve: {saved / 'a'}: it would not load any more: ") and why in said
    assert not (tmp_path / "x").exists()
    with Chain(saved / "a") as chain:
        part = set_field(chain.parts, field)
        before = chain.parts[part.name].state
        rewrite.with_parts(saved / "a", tmp_path / "no", {**chain.parts, part.name: part})
    path, _, _ = field.partition("=")
    name = path.removeprefix(f"{part.name}.")
    text("snapshot", "edit", tmp_path / "no", "--set", f"{path}={before[name]}", "--out", tmp_path / "well")
    assert (tmp_path / "well").read_bytes() == (saved / "a").read_bytes()


def test_edit_says_what_it_orphans(saved, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    edit = ("snapshot", "edit", tmp_path / "a", "--set", "com1.scr=1")
    assert "b: differences to the file there (--force replaces it)" in refusal(*edit)
    done = anyhyve(*edit, "--force")
    said = f"anyhyve: warning: {tmp_path / 'b'} stood on {tmp_path / 'a'}, and cannot be woken any more\n"
    assert done.returncode == 0 and done.stderr.decode() == said
    assert "parent a: it is not the snapshot" in refusal("restore", tmp_path / "b")


@pytest.mark.parametrize(
    "command",
    [
        ("restore",), ("run", "-r"), ("snapshot", "show"), ("snapshot", "check"), ("snapshot", "verify"),
        ("snapshot", "edit", "--set", "com1.scr=1"), ("lockstep", "--against", "emu"), ("fuzz", "com1", "--from"),
    ],
)  # fmt: skip
def test_errors_of_a_file_name_it(saved, tmp_path, command):
    whole = bytearray((saved / "a").read_bytes())
    for damage in ("header", "part", "cut"):
        file = tmp_path / f"damaged {damage}"
        bad = bytearray(whole)
        if damage == "header":
            bad[20] ^= 1
        elif damage == "part":
            bad[whole.index(b"memory_bytes")] ^= 1
        file.write_bytes(bad if damage != "cut" else bad[: len(bad) // 2])
        assert refusal(*command, file).startswith(f"anyhyve: {file}: ")


def test_merge_and_rebase(saved, tmp_path):
    text("snapshot", "merge", saved / "b", tmp_path / "whole")
    assert text("snapshot", "diff", tmp_path / "whole", saved / "b") == ""
    (tmp_path / "a").write_bytes((saved / "a").read_bytes())
    text("snapshot", "rebase", tmp_path / "whole", tmp_path / "again", "--parent", tmp_path / "a")
    assert (tmp_path / "again").read_bytes() == (saved / "b").read_bytes()


def test_check_says_what_would_not_load_and_changes_nothing(saved, tmp_path):
    assert "will load on emu" in text("snapshot", "check", saved / "b")
    assert "there is no /nowhere/kvm" in refusal("snapshot", "check", saved / "a", "--backend", "kvm", main=NO_KVM)
    (tmp_path / "lonely").write_bytes((saved / "b").read_bytes())
    assert "parent a: No such file" in refusal("snapshot", "check", tmp_path / "lonely")


def test_check_asks_the_hosts_kvm_about_a_state(kvm, saved, tmp_path):
    text("snapshot", "edit", saved / "a", "--out", tmp_path / "slow", "--set", "config.tsc_khz=100000")
    assert "config.tsc_khz: kvm: this host cannot" in refusal("snapshot", "check", tmp_path / "slow", "--backend", kvm)
    with Chain(saved / "a") as chain:
        parts = {**chain.parts, "cpu.0": set_field(chain.parts, "cpu.0.cr0=0x80000000")}
    rewrite.with_parts(saved / "a", tmp_path / "no", parts)
    for backend in ("emu", kvm):
        refused = refusal("snapshot", "check", tmp_path / "no", "--backend", backend)
        assert "no CPU can be in this state: cpu.cr0: PG without PE" in refused
    assert "will load on kvm" in text("snapshot", "check", saved / "a", "--backend", kvm)


def test_an_unknown_device_is_shown_and_named_as_the_reason(saved, tmp_path):
    text("snapshot", "unpack", saved / "a", tmp_path / "d")
    manifest = json.loads((tmp_path / "d" / "snapshot.json").read_text())
    manifest["parts"].append("frobnicator")
    (tmp_path / "d" / "snapshot.json").write_text(json.dumps(manifest))
    part = {
        "schema": {"name": "frob", "version": 7, "doc": "Frobnicates.",
                   "fields": [{"name": "level", "type": "u8", "doc": "how much"}]},
        "state": {"level": 200},
    }  # fmt: skip
    (tmp_path / "d" / "parts" / "frobnicator.json").write_text(json.dumps(part))
    text("snapshot", "pack", tmp_path / "d", tmp_path / "a")
    shown = text("snapshot", "show", tmp_path / "a")
    assert "frob version 7" in shown and "how much" in shown and "0xc8" in shown
    assert "a part this machine does not know: frobnicator" in refusal("restore", tmp_path / "a")


def test_a_later_version_is_named(saved, tmp_path):
    text("snapshot", "unpack", saved / "a", tmp_path / "d")
    path = tmp_path / "d" / "parts" / "rtc.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2', 1))
    text("snapshot", "pack", tmp_path / "d", tmp_path / "a")
    assert "rtc.mc146818: version 2 is not known here" in refusal("restore", tmp_path / "a")


def test_schemas_and_their_check(saved, tmp_path):
    dump = text("snapshot", "schemas")
    (tmp_path / "old").write_text(dump)
    (tmp_path / "new").write_text(dump.replace('"name": "lcr"', '"name": "line_control"'))
    assert text("snapshot", "check-schemas", tmp_path / "old", tmp_path / "old") == ""
    assert "uart.16550a version 1: field lcr is gone" in text(
        "snapshot", "check-schemas", tmp_path / "old", tmp_path / "new", status=1
    )


def test_saving_for_a_release(saved, tmp_path):
    older = (*OWN_GUEST, "--board", "isapc", "--at", 100_000, "--json", "--save")
    text(*older, tmp_path / "slow", "--tsc-khz", 1_000_000)
    text("restore", tmp_path / "slow", "--at", 110_000, "--save", tmp_path / "old", "--for-version", "0.1.0", "--json")
    text(*older, tmp_path / "fast")
    later = ("--at", 9_000_000, "--json", "--save", tmp_path / "x", "--for-version")
    assert "machine.tsc_khz" in refusal("restore", tmp_path / "fast", *later, "0.1.0")
    assert "no board 'pc': it wakes those of --board isapc" in refusal("restore", saved / "a", *later, "0.2.0")
    assert "no release '9'" in refusal("restore", saved / "a", "--save", tmp_path / "x", "--for-version", "9")


def test_what_cannot_be_saved_is_said_before_the_run(saved, tmp_path):
    """The position asked for is never reached in the time a test has."""
    for_ever = ("restore", saved / "a", "--at", 1 << 55, "--json", "--save")
    assert "is not a folder" in refusal(*for_ever, tmp_path / "none" / "x")
    assert "is a directory" in refusal(*for_ever, tmp_path, status=2)
    assert "not in the folder of" in refusal(*for_ever, tmp_path / "x", "--parent", saved / "a")


def test_check_reads_the_ram_too(saved, tmp_path):
    """What it says will load does load."""
    damaged = tmp_path / "damaged"
    data = bytearray((saved / "a").read_bytes())
    at = data.rindex(b"anyhyve own guest")  # in RAM
    data[at] ^= 1
    damaged.write_bytes(data)
    assert "does not match its digest" in refusal("snapshot", "check", damaged)
    assert "will load on emu" in text("snapshot", "check", damaged, "--quick")


def test_edit_leaves_a_difference_beside_what_it_stands_on(saved, tmp_path):
    edit = ("snapshot", "edit", saved / "b", "--set", "com1.scr=3", "--out")
    said = refusal(*edit, tmp_path / "elsewhere")
    assert said.endswith(f"it is a difference to a, which is not there in the folder of {tmp_path / 'elsewhere'}")
    (tmp_path / "a").write_bytes((saved / "c").read_bytes())
    assert "which is another snapshot in the folder of" in refusal(*edit, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_show_leaves_nothing_out(saved):
    state = json.loads(text("snapshot", "show", saved / "b", "--json"))["parts"]["cpu.0"]["state"]
    shown = text("snapshot", "show", saved / "b")
    assert json.dumps(state["fpu"]) in shown and "…" not in shown
