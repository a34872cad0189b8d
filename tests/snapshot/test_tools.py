"""Diff, edit, described types, schema locks and downgrades: on states of this file's own."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshot import diff, edit, rewrite
from snapshot import promises as lock
from snapshot.chain import Chain
from snapshot.container import BLOCK, Part
from snapshot.describe import described, parse, record
from snapshot.errors import SnapshotError
from snapshot.field_types import Json, MaxSize, OneOf, Range, Size, i64, u2, u7, u8, u64
from snapshot.schema import encode, schema_of, state, without_docs
from snapshot.versions import decode, downgrade, lower, renamed, upgrade
from snapshot.writer import Writer
from vmm.testing import states

PAGE = 4096


@state("test.tools.inner", version=1)
class Inner:
    level: u2 = 0
    up: bool = False


@state("test.tools.chip", version=1)
class Chip:
    """A chip with a field of every type."""

    index: Annotated[u7, "address latch"] = 0
    big: u64 = 0
    signed: i64 = 0
    some: Annotated[int, Range(3, 9)] = 3
    on: bool = False
    mode: Annotated[str, OneOf(("a", "b"))] = "a"
    label: Annotated[str, MaxSize(8)] = ""
    key: Annotated[bytes, Size(2)] = bytes(2)
    fifo: Annotated[bytes, MaxSize(4)] = b""
    pair: Annotated[tuple[u8, ...], Size(2)] = (0, 0)
    queue: Annotated[tuple[Inner, ...], MaxSize(3)] = ()
    inner: Inner = dataclasses.field(default_factory=Inner)
    latch: u8 | None = None


def part(value, name="chip") -> Part:
    return Part(name, schema_of(type(value)).describe(), encode(value))


# --- described types


@given(states(Chip))
def test_a_described_type_takes_what_the_declared_one_gives(value):
    kind = record(schema_of(Chip).describe()["fields"])
    kind.decode(encode(value), "chip")
    for field in schema_of(Chip).fields:
        if "struct" not in json.dumps(field.type.describe()):
            assert described(field.type.describe()) == field.type


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("index", 128), ("index", -1), ("index", True), ("index", "1"), ("big", 1 << 64), ("signed", 1 << 63),
        ("some", 2),
        ("on", 1), ("mode", "c"), ("label", "123456789"), ("label", "\n"), ("key", "00"), ("key", "0g00"),
        ("key", "AA00"),
        ("fifo", "0000000000"), ("pair", [1]), ("pair", [1, 256]), ("queue", [{"level": 4, "up": False}]),
        ("queue", [{"level": 1}]), ("inner", {}), ("inner", None), ("latch", 256),
    ],
)  # fmt: skip
def test_a_described_type_refuses_what_the_declared_one_would(field, value):
    bad = {**encode(Chip()), field: value}
    with pytest.raises(SnapshotError):
        record(schema_of(Chip).describe()["fields"]).decode(bad, "chip")
    with pytest.raises(SnapshotError):
        decode("test.tools.chip", 1, bad, Chip)


@pytest.mark.parametrize(
    "description",
    ["u0", "u65", "u99", "u07", "i8", "int", None, 3, [], {}, {"range": [2, 1]}, {"range": [1]}, {"range": ["a", "b"]},
     {"one_of": [1]}, {"bytes": -1}, {"bytes": 1, "x": 2}, {"list": "u8"}, {"list": "u8", "count": 1, "max": 1},
     {"list": "nothing", "max": 1}, {"optional": "nothing"}, {"struct": 3}, {"struct": [{"name": "a"}]},
     {"text_max": "1"},
     {"struct": [{"name": "a", "type": "u8", "doc": ""}, {"name": "a", "type": "u8", "doc": ""}]}],
)  # fmt: skip
def test_what_describes_nothing(description):
    with pytest.raises(SnapshotError):
        described(description)


@pytest.mark.parametrize(
    "description",
    [{"text_max": 0}, {"bytes": 0}, {"bytes_max": 0}, {"list": "u8", "count": 0}, {"list": "u8", "max": 0}],
)
def test_what_is_empty_is_described_too(description):
    kind = described(description)
    assert described(kind.describe()) == kind


def test_a_description_cannot_nest_for_ever():
    description: Json = "u8"
    for _ in range(1000):
        description = {"optional": description}
    with pytest.raises(SnapshotError, match="too deep"):
        described(description)


# --- edit


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("chip.index=0x7f", "index", 127),
        ("chip.index = 12", "index", 12),
        ("chip.signed=-5", "signed", -5),
        ("chip.on=true", "on", True),
        ("chip.mode=b", "mode", "b"),
        ("chip.label=hi", "label", "hi"),
        ("chip.key=beef", "key", "beef"),
        ("chip.pair[1]=7", "pair", [0, 7]),
        ("chip.pair.0=7", "pair", [7, 0]),
        ("chip.pair=[1, 2]", "pair", [1, 2]),
        ("chip.inner.level=3", "inner", {"level": 3, "up": False}),
        ('chip.queue=[{"level": 1, "up": true}]', "queue", [{"level": 1, "up": True}]),
        ("chip.latch=null", "latch", None),
        ("chip.latch=9", "latch", 9),
    ],
)
def test_set_field(assignment, field, value):
    parts = {"chip": part(Chip(latch=1)), "chip.0": part(Inner(), "chip.0")}
    changed = edit.set_field(parts, assignment)
    assert changed.state == {**encode(Chip(latch=1)), field: value}
    assert parts["chip"].state == encode(Chip(latch=1)), "the part given is not touched"


@pytest.mark.parametrize(
    "assignment",
    ["chip.index=128", "chip.index=x", "chip.index", "chip=1", "chop.index=1", "chip.nothing=1", "chip.index.deeper=1",
     "chip.pair[2]=1", "chip.pair[-1]=1", "chip.mode=c", "chip.on=yes", "chip.key=b", "chip.pair=[1]", "chip.inner={}",
     "chip.=1", "chip.pair=[[[[[[", ""],
)  # fmt: skip
def test_set_field_refuses(assignment):
    with pytest.raises(SnapshotError):
        edit.set_field({"chip": part(Chip())}, assignment)


def test_the_longest_part_name_is_meant():
    changed = edit.set_field({"chip": part(Chip()), "chip.0": part(Inner(), "chip.0")}, "chip.0.level=2")
    assert changed.name == "chip.0"


@given(states(Chip))
def test_every_value_can_be_written_as_text(value):
    for field, encoded in zip(schema_of(Chip).fields, encode(value).values(), strict=True):
        kind = described(field.type.describe())
        if isinstance(encoded, str) and encoded == "null":
            continue
        text = encoded if isinstance(encoded, str) else json.dumps(encoded)
        assert parse(kind, text, "x") == encoded


# --- diff


def save(path, memory, *values):
    with Writer(path) as writer:
        for i, value in enumerate(values):
            writer.part("config" if not i else f"chip.{i}", value)
        writer.ram("ram.0", 0, memoryview(memory), None)
        writer.commit()
    return path


def test_diff_names_fields_and_pages(tmp_path):
    first, second = bytearray(3 * BLOCK), bytearray(3 * BLOCK)
    second[PAGE + 17] = 1
    second[2 * PAGE] = 1
    second[2 * BLOCK : 2 * BLOCK + 4 * PAGE] = b"\1" * (4 * PAGE)
    save(tmp_path / "a", first, Inner(), Chip(), Chip())
    save(tmp_path / "b", second, Inner(level=2), Chip(pair=(0, 5), queue=(Inner(),)))
    with Chain(tmp_path / "a") as a, Chain(tmp_path / "b") as b:
        found = [(d.part, d.field, d.first, d.second) for d in diff.state(a, b)]
        runs = [(run.start, run.end, run.at) for run in diff.ram(a, b)]
        assert not list(diff.state(a, a)) and not list(diff.ram(a, a))
    assert ("config", "level", 0, 2) in found and ("chip.1", "pair[1]", 0, 5) in found
    assert ("chip.2", "", "", "(not there)") in found
    assert {d[1] for d in found if d[0] == "chip.1"} == {"pair[1]", "queue[0].level", "queue[0].up"}
    assert runs == [(PAGE, 3 * PAGE, PAGE + 17), (2 * BLOCK, 2 * BLOCK + 4 * PAGE, 2 * BLOCK)]


def test_diff_of_a_chain_is_that_of_its_memory(tmp_path):
    memory = bytearray(b"\1" * (2 * BLOCK))
    save(tmp_path / "a", memory, Inner())
    rewrite.rebase(tmp_path / "a", tmp_path / "a", tmp_path / "b")
    with Chain(tmp_path / "a") as a, Chain(tmp_path / "b") as b:
        assert len(b.readers) == 2 and not list(diff.ram(a, b)) and not list(diff.state(a, b))


def test_diff_of_other_sizes_is_refused(tmp_path):
    save(tmp_path / "a", bytes(PAGE), Inner())
    save(tmp_path / "b", bytes(2 * PAGE), Inner())
    with Chain(tmp_path / "a") as a, Chain(tmp_path / "b") as b, pytest.raises(SnapshotError, match="other sizes"):
        list(diff.ram(a, b))


# --- locks


def dump(*fields, version=1, name="chip", upgrades=()):
    return {
        "states": [{"name": name, "version": version, "doc": "", "fields": [
            {"name": n, "type": t, "doc": d} for n, t, d in fields]}],
        "upgrades": list(upgrades), "downgrades": [], "renames": {},
    }  # fmt: skip


OLD = dump(("a", "u8", "doc"), ("b", "bool", ""))
NEXT = dump(("a", "u8", "doc"), ("c", "u8", ""), version=2)


def both(*dumps, upgrades=()):
    return {
        "states": [s for d in dumps for s in d["states"]],
        "upgrades": list(upgrades),
        "downgrades": [],
        "renames": {},
    }


@pytest.mark.parametrize(
    ("new", "complaint"),
    [
        (OLD, None),
        (dump(("a", "u8", "another doc"), ("b", "bool", "")), None),
        (dump(("a", "u8", "")), "field b is gone"),
        (dump(("a", "u8", ""), ("b", "bool", ""), ("c", "u8", "")), "field c is new"),
        (dump(("a", "u16", ""), ("b", "bool", "")), 'field a is now "u16", was "u8"'),
        (dump(("b", "bool", ""), ("a", "u8", "")), "in another order"),
        (dump(("a", "u8", ""), name="chop"), "no version of it is left"),
        (NEXT, "version 1: it is gone"),
        (both(OLD, NEXT), "no upgrade leads to version 2"),
        (both(OLD, NEXT, upgrades=[["chip", 1, 2]]), None),
        (both(OLD, NEXT, upgrades=[["chop", 1, 2]]), "no upgrade leads to version 2"),
        (both(OLD, NEXT, upgrades=[["chip", 1, 1]]), "no upgrade leads to version 2"),
        ({**dump(("a", "u8", ""), ("b", "bool", ""), name="chop"), "renames": {"chip": "chop"}}, None),
        ({**dump(("a", "u8", ""), name="chop"), "renames": {"chip": "chop"}}, "chop version 1: field b is gone"),
    ],
)
def test_complaints(new, complaint):
    found = lock.complaints(OLD, new)
    assert (found == []) if complaint is None else (len(found) == 1 and complaint in found[0])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"states": [1]}', '{"states": [], "upgrades": [1]}'])
def test_what_is_no_dump(tmp_path, text):
    (tmp_path / "dump").write_text(text)
    with pytest.raises(SnapshotError, match="not a dump"):
        lock.load(tmp_path / "dump")


def test_dump_and_load_are_inverse(tmp_path):
    found = lock.dump(("test.tools.",))
    (tmp_path / "dump").write_text(json.dumps(found))
    assert lock.complaints(lock.load(tmp_path / "dump"), found) == []
    assert lock.versions(found)["test.tools.lowered"] == 3


# --- upgrades and downgrades


@state("test.tools.lowered", version=1)
class V1:
    seconds: u8 = 0


@state("test.tools.lowered", version=2)
class V2:
    millis: u64 = 0


@state("test.tools.lowered", version=3)
class V3:
    nanos: u64 = 0


@upgrade
def v1_to_v2(old: V1) -> V2:
    return V2(millis=old.seconds * 1000)


@upgrade
def v2_to_v3(old: V2) -> V3:
    return V3(nanos=old.millis * 10**6)


@downgrade
def v3_to_v2(new: V3) -> V2:
    if new.nanos % 10**6:
        raise SnapshotError("test.tools.lowered.nanos: version 2 has no part of a millisecond")
    return V2(millis=new.nanos // 10**6)


@downgrade
def v2_to_v1(new: V2) -> V1:
    return V1(seconds=new.millis // 1000)


@given(st.integers(0, 255))
def test_down_and_up_again(seconds):
    value = V3(nanos=seconds * 10**9)
    for version, cls in ((3, V3), (2, V2), (1, V1)):
        old = lower(value, version)
        assert type(old) is cls
        assert decode("test.tools.lowered", version, encode(old), V3) == value


def test_what_an_older_version_cannot_say():
    with pytest.raises(SnapshotError, match="no part of a millisecond"):
        lower(V3(nanos=1), 1)
    with pytest.raises(SnapshotError, match=r"not an integer in 0\.\.255"):
        lower(V3(nanos=10**15), 1)
    with pytest.raises(SnapshotError, match="no downgrade from version 1 to version 0"):
        lower(V1(), 0)
    with pytest.raises(SnapshotError, match="version 4 is not among"):
        lower(V3(), 4)


def test_a_state_that_was_renamed_is_read_under_its_old_name():
    renamed("test.tools.raised", "test.tools.lowered")
    assert decode("test.tools.raised", 1, {"seconds": 2}, V3) == V3(nanos=2 * 10**9)
    assert lock.dump(("test.tools.",))["renames"] == {"test.tools.raised": "test.tools.lowered"}
    for old in ("test.tools.raised", "test.tools.inner"):
        with pytest.raises(TypeError, match="renamed before"):
            renamed(old, "test.tools.lowered")
    with pytest.raises(SnapshotError, match="expected a"):
        decode("test.tools.another", 1, {"seconds": 2}, V3)


def test_a_step_that_leads_nowhere_is_our_mistake():
    for register, function in ((upgrade, "V3->V1"), (downgrade, "V1->V3")):
        old, new = function.split("->")
        namespace = dict(globals())
        exec(f"def step(value: {old}) -> {new}: ...", namespace)
        with pytest.raises(TypeError):
            register(namespace["step"])


def test_docs_may_change():
    fields = without_docs(schema_of(Chip).describe()["fields"])
    assert isinstance(fields, list) and fields[0] == {"name": "index", "type": "u7"}
