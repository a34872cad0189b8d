"""A machine's socket: answers many clients at once, in a thread of its own, and never keeps the machine waiting.

    with Server(vm, Place(rundir(), "box")):
        vm.run()

Rules
* A client has its own buffer, bounded both ways: one that does not read is not read from, and loses events (it is told
  how many), and nobody else notices.
* Who may ask is the kernel's word (SO_PEERCRED, unix(7)): the machine's own user, or root.
* At the end every answer that is due is still given, within a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import threading
from typing import Any

from vmm.control import protocol
from vmm.control.methods import METHODS
from vmm.control.place import Place
from vmm.control.protocol import INVALID_REQUEST, MAX_LINE, PARSE, REFUSED, RpcError
from vmm.control.supervisor import Supervisor
from vmm.errors import BackendError
from vmm.host import threads

MAX_CLIENTS = 256
MAX_CALLS = 32  # of one client, unanswered
MAX_EVENTS = 256  # waiting for one client
_SETTLE_S = 0.01  # how long console output is gathered before those who wait for it are told
_FAREWELL_S = 1.0
_UCRED = struct.Struct("3i")  # pid, uid, gid


class Server:
    """Context manager. Raises BackendError when it cannot listen."""

    def __init__(self, vm: Supervisor, place: Place) -> None:
        self.vm = vm
        self.name = place.name
        self._place = place
        self._loop = asyncio.new_event_loop()
        self._clients: set[_Client] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._grown = asyncio.Event()  # the console has more; made anew each time
        self._awaited = False  # whether anybody wants to hear of console output
        self._up = threading.Event()

    def __enter__(self) -> Server:
        try:
            self._thread = threads.start("control", self._serve)
        except BackendError:
            self._loop.close()
            self._place.close()
            raise
        self._up.wait()
        self.vm.listeners.append(self._event)
        self.vm.machine.board.console.listen(self._output)
        return self

    def __exit__(self, *_: object) -> None:
        self.vm.close()
        self.vm.listeners.remove(self._event)
        self.vm.machine.board.console.unlisten(self._output)
        self._place.withdraw()
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._place.close()

    # --- from the machine's threads

    def _event(self, kind: str, details: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._spread, kind, details)

    def _output(self, _byte: int) -> None:
        if self._awaited:
            self._awaited = False  # told once; whoever waits on asks again
            self._loop.call_soon_threadsafe(self._loop.call_later, _SETTLE_S, self._tell_grown)

    # --- the server's thread

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._live())

    async def _live(self) -> None:
        self._ended = asyncio.Event()
        self._place.socket.setblocking(False)
        accepting = asyncio.create_task(self._accept())
        self._up.set()
        await self._ended.wait()
        accepting.cancel()
        self._tell_grown()
        # Whatever is due is answered by now or in a moment: the machine has refused what it did not get to.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                await asyncio.gather(*(client.farewell() for client in self._clients), return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                accepted, _ = await self._loop.sock_accept(self._place.socket)
            except (OSError, MemoryError):  # out of descriptors, say, or the client is gone already
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._meet(accepted))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _meet(self, accepted: socket.socket) -> None:
        try:
            uid = _UCRED.unpack(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[1]
            reader, writer = await asyncio.open_connection(sock=accepted, limit=MAX_LINE)
        except (OSError, MemoryError):  # what it cannot be given it finds out by being cut off
            accepted.close()
            return
        client = _Client(self, reader, writer)
        refusal = None
        if uid not in (os.geteuid(), 0):
            refusal = f"uid {uid} may not control this machine"
        elif len(self._clients) >= MAX_CLIENTS:
            refusal = f"there are {MAX_CLIENTS} clients already"
        try:
            with contextlib.suppress(OSError):
                if refusal is not None:
                    writer.write(protocol.pack_error(RpcError(REFUSED, refusal), None))
                    await writer.drain()
                    return
                self._clients.add(client)
                await client.serve()
        finally:
            self._clients.discard(client)
            client.leave()

    def _spread(self, kind: str, details: dict[str, Any]) -> None:
        for client in self._clients:
            client.tell(kind, details)

    def _tell_grown(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    async def grown(self, offset: int) -> None:
        """Wait until the console has written more than `offset` bytes, or the machine has ended."""
        console = self.vm.machine.board.console
        while not self._ended.is_set():
            event, self._awaited = self._grown, True
            if console.total > offset:
                return
            await event.wait()


class _Client:
    """One connection."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.vm = server.vm
        self.name = server.name
        self.events: set[str] = set()
        self._server = server
        self._reader = reader
        self._writer = writer
        self._calls: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(MAX_CALLS)
        self._news: asyncio.Queue[bytes] = asyncio.Queue(MAX_EVENTS)
        self._lost = 0
        self._teller = asyncio.create_task(self._tell_news())

    async def serve(self) -> None:
        """Answer a client until it has said all and heard all."""
        while line := await self._line():
            await self._room.acquire()
            self._call(line)
        while self._calls:
            await asyncio.wait(self._calls)

    async def farewell(self) -> None:
        """Say what is due when the machine has ended: answers, and its last events."""
        while self._calls:
            await asyncio.wait(self._calls)
        await self._news.join()
        await self._writer.drain()

    def leave(self) -> None:
        self._teller.cancel()
        for call in self._calls:
            call.cancel()  # nobody is there to hear the answer; what was begun is finished
        self._writer.close()

    def tell(self, kind: str, details: dict[str, Any]) -> None:
        if kind not in self.events:
            return
        lost = {"lost": self._lost} if self._lost else {}
        try:
            self._news.put_nowait(protocol.pack(method="event", params={"kind": kind, **details, **lost}))
            self._lost = 0
        except asyncio.QueueFull:
            self._lost += 1

    async def output(self, offset: int, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._server.grown(offset), wait_s)

    async def _line(self) -> bytes:
        """A whole line; empty at the end, after telling what was wrong with it."""
        try:
            return await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as rest:
            if rest.partial:
                await self._say(protocol.pack_error(RpcError(PARSE, "half a line"), None))
        except asyncio.LimitOverrunError:
            await self._say(
                protocol.pack_error(RpcError(INVALID_REQUEST, f"a line of more than {MAX_LINE} bytes"), None)
            )
        return b""

    def _call(self, line: bytes) -> None:
        task = asyncio.create_task(self._answer(line))
        self._calls.add(task)

        def done(_: object) -> None:
            self._calls.discard(task)
            self._room.release()

        task.add_done_callback(done)

    async def _answer(self, line: bytes) -> None:
        call, wanted = None, True
        try:
            request = protocol.parse(line)
            call, wanted = request.id, request.wants_answer
            answer = protocol.pack(result=await METHODS.call(self, request.method, request.params), id=call)
        except Exception as error:
            answer = protocol.pack_error(error, protocol.id_of(line) if call is None else call)
        if wanted:
            await self._say(answer)

    async def _say(self, message: bytes) -> None:
        with contextlib.suppress(OSError):
            self._writer.write(message)
            await self._writer.drain()

    async def _tell_news(self) -> None:
        while True:
            await self._say(await self._news.get())
            self._news.task_done()
