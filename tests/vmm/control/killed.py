"""A named machine that is killed at any moment while it is saved, and started again, many times.

    python -m tests.vmm.control.killed COUNT SEED FOLDER

prints one JSON object and exits 0 when each time every snapshot was whole, none that had been answered for was lost,
the next machine of the name began, and nothing else was left.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from snapshot.verify import verify
from tests.snapshot.hostile import PROGRAM
from vmm.cli.main import main as anyhyve
from vmm.control import catalog
from vmm.control.client import Client, Failed
from vmm.errors import BackendError, RequestError
from vmm.machine.machine import Machine

PR_SET_CHILD_SUBREAPER = 36
SAVES = ("checkpoint", "checkpoint", "checkpoint --hold", "autosave", "suspend")


def start(guest: Path, log: Path) -> int:
    """The command line's own machine, in a fork of this process, which has imported all of it."""
    if pid := os.fork():
        return pid
    status = 7
    try:
        nowhere, said = os.open(os.devnull, os.O_RDWR), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for fd, to in ((0, nowhere), (1, nowhere), (2, said)):
            os.dup2(to, fd)
        words = ["run", "--kernel", str(guest), "--flat", "--memory", "2M", "--name", "box", "--suspend-on-term"]
        anyhyve(words, prog_name="anyhyve")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 7
    finally:
        os._exit(status)


def reach(sockets: Path) -> Client:
    limit = time.monotonic() + 30
    while True:
        try:
            client = Client(sockets, "box", timeout_s=30)
            if client.call("status")["state"] == "running":
                return client
            client.close()
        except (BackendError, RequestError):
            assert time.monotonic() < limit, "the next machine did not begin"
        time.sleep(0.002)


def ask(client: Client, what: str) -> int:
    if what == "suspend":
        return client.ask("suspend", path=str(catalog.folder("box") / catalog.SUSPENDED))
    path = catalog.folder("box") / catalog.AUTOSAVED if what == "autosave" else catalog.new("box")
    return client.ask("checkpoint", path=str(path), hold="hold" in what)


def orphans() -> None:
    """Until what the killed one was writing is written or given up."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def main(count: int, seed: int, folder: Path) -> int:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    os.environ["XDG_STATE_HOME"] = os.environ["XDG_RUNTIME_DIR"] = str(folder)
    home, sockets, guest = folder / "anyhyve" / "box", folder / "anyhyve", folder / "guest"
    home.mkdir(parents=True, mode=0o700)
    sockets.chmod(0o700)
    guest.write_bytes(PROGRAM)
    seen, dice = Counter[str](), random.Random(seed)
    promised = 0  # the sequence of the last save that was answered for
    for _ in range(count):
        pid = start(guest, folder / "log")
        with reach(sockets) as client:
            what = dice.choice(SAVES)
            if promised:
                assert not list(home.glob("*.tmp")), "the next start clears up"
            with contextlib.suppress(Failed):
                for _ in range(dice.randrange(2)):  # one that is answered for
                    client.call("checkpoint", path=str(home / catalog.AUTOSAVED))
                    promised = catalog.entry(home / catalog.AUTOSAVED).sequence
            ask(client, what)
            time.sleep(dice.random() ** 2 * 0.08)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        orphans()
        left = sorted(home.glob("*.tmp"))
        seen["left a temporary"] += bool(left)
        found = catalog.entries("box")
        for entry in found:
            assert entry.problem is None, entry
            verify(entry.path)
        assert not found or found[-1].sequence >= promised, "a save that was answered for is lost"
        seen["new" if found and found[-1].sequence > promised else "old"] += 1
        promised = found[-1].sequence if found else 0
        catalog.prune("box", 3)
    pid = start(guest, folder / "log")
    with reach(sockets) as client:
        client.call("suspend", path=str(home / catalog.SUSPENDED))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    Machine.restore(catalog.newest("box"), verify=True).close()
    assert catalog.newest("box").name == catalog.SUSPENDED
    rest = [each.name for each in [*home.iterdir(), *sockets.iterdir()] if each.suffix not in (".snapshot", "")]
    assert not rest, rest
    print(json.dumps({"kills": count, **seen}))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
