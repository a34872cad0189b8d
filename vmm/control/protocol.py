"""JSON-RPC 2.0, one object a line: what is said on a machine's socket. See docs/control.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from snapshot.errors import SnapshotError
from vmm.control.supervisor import WrongState
from vmm.errors import BackendError, Cancelled, GuestError, RequestError
from vmm.host.shown import shown

MAX_LINE = 1 << 20  # bytes of one message, to a machine
MAX_ANSWER = 16 << 20  # and from it

PARSE, INVALID_REQUEST, UNKNOWN_METHOD, INVALID_PARAMS, INTERNAL = -32700, -32600, -32601, -32602, -32603
SNAPSHOT, HOST, GUEST, WRONG_STATE, CANCELLED, REFUSED, REQUEST = 1, 2, 3, 4, 5, 6, 7

CODES = {
    PARSE: "not JSON",
    INVALID_REQUEST: "not a request: no object with jsonrpc, method and id; or a line over the limit",
    UNKNOWN_METHOD: "there is no such method",
    INVALID_PARAMS: "a parameter is missing, unknown or wrong",
    INTERNAL: "our own fault",
    SNAPSHOT: "SnapshotError: a snapshot is at fault",
    HOST: "BackendError: this computer is at fault",
    GUEST: "GuestError: the guest is at fault",
    WRONG_STATE: "the machine's state does not allow it",
    CANCELLED: "it was cancelled",
    REFUSED: "this user may not, or there are too many clients",
    REQUEST: "RequestError: what was asked for is at fault: there is no such thing, or it cannot be done now",
}

_FAULTS: tuple[tuple[type[Exception], int], ...] = (
    (WrongState, WRONG_STATE),
    (SnapshotError, SNAPSHOT),
    (BackendError, HOST),
    (GuestError, GUEST),
    (RequestError, REQUEST),
    (Cancelled, CANCELLED),
)


class RpcError(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def of(cls, error: Exception) -> RpcError:
        """The answer that an exception becomes: its code says whose fault it is."""
        if isinstance(error, RpcError):
            return error
        for kind, code in _FAULTS:
            if isinstance(error, kind):
                return cls(code, str(error))
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            return cls(HOST, f"{where}{error.strerror or error}")
        if isinstance(error, MemoryError):
            return cls(HOST, "out of memory")
        return cls(INTERNAL, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Request:
    """One call. Without `id` no answer is wanted."""

    method: str
    params: dict[str, Any]
    id: str | int | float | None
    wants_answer: bool


def parse(line: bytes) -> Request:
    """The request that a line is. Raises RpcError for what is none."""
    try:
        value = json.loads(line.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RpcError(PARSE, "not JSON") from None
    if not isinstance(value, dict) or value.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'a request is one object with "jsonrpc": "2.0"')
    name, params, call = value.get("method"), value.get("params", {}), value.get("id")
    if not isinstance(name, str):
        raise RpcError(INVALID_REQUEST, "a request has a method's name")
    if isinstance(call, bool) or not isinstance(call, str | int | float | None):
        raise RpcError(INVALID_REQUEST, "an id is a string or a number")
    if not isinstance(params, dict):
        raise RpcError(INVALID_PARAMS, "parameters are given by name")
    return Request(name, params, call, "id" in value)


def id_of(line: bytes) -> Any:
    """The id of what could not be parsed as a request, if it has one."""
    try:
        found = json.loads(line.decode(), parse_constant=_no_constant)["id"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return found if isinstance(found, str | int | float) and not isinstance(found, bool) else None


def pack(**message: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")).encode() + b"\n"


def pack_error(error: Exception, call: Any) -> bytes:
    rpc = RpcError.of(error)
    return pack(error={"code": rpc.code, "message": shown(rpc)}, id=call)


def _no_constant(name: str) -> Any:
    raise ValueError(name)
