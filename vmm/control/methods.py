"""What can be asked of a running machine, a function a method (vmm.control.dispatch says how one is declared).

python -m vmm.control.methods     # as the table of docs/control.md
"""

from __future__ import annotations

import asyncio
import os
import resource
import typing
from concurrent.futures import Future
from pathlib import Path
from typing import Annotated, Any

from vmm.control.dispatch import ALL, Methods, Session, Was
from vmm.control.lifecycle import ALIVE, State
from vmm.control.protocol import INVALID_PARAMS, RpcError
from vmm.errors import BackendError
from vmm.saving import releases

MAX_TYPED = 1 << 16  # bytes waiting for the guest to read its serial port
MAX_READ = 1 << 16  # bytes of console output in one answer
EVENTS = ("state", "progress", "saved", "save failed", "panic", "warning")

METHODS = Methods()
_AWAKE = frozenset((State.RUNNING, State.PAUSED))
T = typing.TypeVar("T")


# --- the methods


@METHODS.method("status", ALL)
async def status(session: Session) -> Any:
    """What the machine is doing: state, backend, guest time, and a save that is under way."""
    vm = session.vm
    machine, saving = vm.machine, vm.saving()
    return {
        "name": session.name,
        "state": vm.state,
        "backend": machine.backend,
        "pid": os.getpid(),
        "memory_bytes": machine.config.memory_bytes,
        "position": machine.position,
        "guest_ns": machine.clock.now_ns(),
        "saving": None if saving is None else str(saving),
    }


@METHODS.method("pause", _AWAKE)
async def pause(session: Session) -> Any:
    """Let the guest stand still. `changed` is false when it did already."""
    return {"changed": await _safe(session, session.vm.pause())}


@METHODS.method("resume", _AWAKE)
async def resume(session: Session) -> Any:
    """Let a guest that stands still go on. `changed` is false when it ran already."""
    return {"changed": await _safe(session, session.vm.resume())}


@METHODS.method("checkpoint", _AWAKE)
async def checkpoint(
    session: Session,
    path: Annotated[Path, "the file, replaced only by a whole new one"],
    hold: Annotated[bool, "stand still until it is on disk", Was("stop")] = False,
    pack: Annotated[bool, "pack the RAM with zstd"] = False,
    parent: Annotated[Path | None, "save only what differs from this snapshot, in the same folder"] = None,
    for_version: Annotated[str | None, "save what this older release can wake"] = None,
    force: Annotated[bool, "replace any file, also one that others stand on"] = False,
) -> Any:
    """Save and go on: the file is the state at one instant, and is written while the machine runs. The answer comes
    when it is on disk."""
    return await _save(session, path, hold=hold, pack=pack, parent=parent, for_version=for_version, force=force)


@METHODS.method("suspend", _AWAKE | {State.SAVING, State.STOPPED})
async def suspend(
    session: Session,
    path: Annotated[Path, "the file, replaced only by a whole new one"],
    pack: Annotated[bool, "pack the RAM with zstd"] = False,
    parent: Annotated[Path | None, "save only what differs from this snapshot, in the same folder"] = None,
    for_version: Annotated[str | None, "save what this older release can wake"] = None,
    force: Annotated[bool, "replace any file, also one that others stand on"] = False,
) -> Any:
    """Save, then end the machine. When it cannot be saved the machine goes on. A save under way is finished first; the
    same suspend, asked for by two, is one, also when the second comes after its end."""
    return await _save(session, path, end=True, pack=pack, parent=parent, for_version=for_version, force=force)


@METHODS.method("cancel", ALL)
async def cancel(session: Session) -> Any:
    """Give up the save that is under way. `path` is its file, null when there was none."""
    path = session.vm.cancel()
    return {"path": None if path is None else str(path)}


@METHODS.method("stop", ALIVE)
async def stop(session: Session) -> Any:
    """End the machine without saving. A save that is under way is finished."""
    await _safe(session, session.vm.stop())
    return {}


@METHODS.method("reset", _AWAKE)
async def reset(session: Session) -> Any:
    """Start the guest again, as after power-on. A machine that was woken finds kernel and initrd by the digests that
    its snapshot names: beside the snapshot, or in its working folder; else it is the error REQUEST, and runs on."""
    await _safe(session, session.vm.reset())
    return {}


@METHODS.method("console.read", ALL)
async def console_read(
    session: Session,
    offset: Annotated[int | None, "from this offset of all that was ever written; null: from what comes next"] = 0,
    wait_s: Annotated[float, "wait this long for more, when there is none"] = 0.0,
) -> Any:
    """Output of the serial console: `data`, each character one byte (ISO 8859-1), and the `offset` it begins at: a
    later one than asked for where the earlier is no longer kept. `next` is the offset to go on from."""
    console = session.vm.machine.board.console
    wanted = console.total if offset is None else offset
    if wait_s and console.total <= wanted:
        await session.output(wanted, wait_s)
    start, data = console.read(wanted, MAX_READ)
    return {"offset": start, "data": data.decode("latin-1"), "next": start + len(data)}


@METHODS.method("console.write", ALIVE)
async def console_write(
    session: Session, data: Annotated[str, "what to type, each character one byte (ISO 8859-1)"]
) -> Any:
    """Type at the serial console. `taken` characters were: the rest must wait for the guest to read them."""
    try:
        typed = data.encode("latin-1")
    except UnicodeEncodeError:
        raise RpcError(INVALID_PARAMS, "console.write: data must be characters up to U+00FF, each one byte") from None
    taken = typed[: max(0, MAX_TYPED - len(session.vm.machine.board.console.typed))]
    session.vm.machine.send(taken)
    return {"taken": len(taken)}


@METHODS.method("snapshot.preflight", _AWAKE)
async def preflight(
    session: Session,
    path: Annotated[Path, "the file it would be"],
    parent: Annotated[Path | None, "the snapshot it would be a difference to"] = None,
    force: Annotated[bool, "replace any file, also one that others stand on"] = False,
) -> Any:
    """Whether a save would succeed, as far as can be told now; with the bytes it may take and the bytes free there."""
    machine = session.vm.machine
    machine.can_save(path, parent, force=force)
    most = await _safe(session, session.vm.at_safe_point(machine.touched_bytes))
    info = os.statvfs(path.parent)
    if (free := info.f_bavail * info.f_frsize) < most and parent is None:
        raise BackendError(f"cannot save to {path}: it may take {most} bytes, and {free} are free there")
    return {"most_bytes": most, "free_bytes": free}


@METHODS.method("devices", _AWAKE | {State.SAVING})
async def devices(session: Session, name: Annotated[str | None, "only this part, with its whole state"] = None) -> Any:
    """Every part of the machine: its name, and its state's schema and version. With `name` also its state."""
    parts = await _safe(session, session.vm.at_safe_point(session.vm.machine.encoded_states))
    if name is None:
        return [{"name": part, "schema": schema, "version": version} for part, (schema, version, _) in parts.items()]
    if name not in parts:
        raise RpcError(INVALID_PARAMS, f"devices: there is no part {name!r}; there are {', '.join(parts)}")
    schema, version, state = parts[name]
    return [{"name": name, "schema": schema, "version": version, "state": state}]


@METHODS.method("stats", ALL)
async def stats(session: Session) -> Any:
    """Counts: exits of the CPU by reason, console bytes, this process' memory and CPU time."""
    machine, used = session.vm.machine, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "position": machine.position,
        "guest_ns": machine.clock.now_ns(),
        "exits": machine.exits(),
        "console_bytes": machine.board.console.total,
        "cpu_s": round(used.ru_utime + used.ru_stime, 3),
        "max_rss_bytes": used.ru_maxrss * 1024,
    }


@METHODS.method("events", ALL)
async def events(
    session: Session, kinds: Annotated[list[str] | None, "these only; an empty list: none; null: all"] = None
) -> Any:
    """From now on tell this client what happens, as notifications of the method `event`: `kind`, and its details."""
    wanted = set(EVENTS if kinds is None else kinds)
    if unknown := wanted - set(EVENTS):
        raise RpcError(INVALID_PARAMS, f"events: there is no kind {min(unknown)!r}; there are {', '.join(EVENTS)}")
    session.events.clear()
    session.events.update(wanted)
    return {"kinds": sorted(wanted)}


# --- inside


async def _save(
    session: Session, path: Path, *, pack: bool, parent: Path | None, for_version: str | None, force: bool, **how: bool
) -> Any:
    versions = None if for_version is None else releases.versions(for_version)
    session.vm.machine.can_save(path, parent, force=force)
    saved = session.vm.save(path, packed=pack, parent=parent, versions=versions, force=force, **how)
    return await asyncio.wrap_future(saved)


async def _safe(session: Session, done: Future[T]) -> T:
    """Wait for what the machine's thread is to do; returns its result. Raises BackendError when it does not come to
    it in time, or what it raises."""
    waiting, limit_s = asyncio.wrap_future(done), session.vm.quiesce_s
    if not (await asyncio.wait({waiting}, timeout=limit_s))[0] and done.cancel():
        raise BackendError(f"no safe point came in {limit_s:g} s; nothing was done, and the machine runs on")
    return await waiting


if __name__ == "__main__":
    print(METHODS.describe())
