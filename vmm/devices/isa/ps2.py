"""The two devices at the ends of the PS/2 cables: a 101/102-key keyboard and a mouse, as states and functions.

They belong to the controller's state (i8042.py), so that the three are one device. Nothing here knows the
controller: a byte from the host goes in by `*_write`, a person's doing by `keyboard_key` and `mouse_move`, and what
they have to say is taken one byte at a time by `*_take`.

IBM Personal System/2 Hardware Interface Technical Reference: "Keyboards (101- and 102-Key)", cited as Keyboard;
"Auxiliary Device" and the IBM PS/2 Mouse Technical Reference, cited as Mouse. Microsoft Keyboard Scan Code
Specification 1.3a for the three sets; Microsoft's IntelliMouse and Explorer for the rate knocks.

Absent: the serial line (nothing takes time, nothing fails in parity); the completion codes sent unasked at power-on
(firmware has eaten them); typematic repeat (the host's input repeats; the rate is only kept); the make-only key
types of set 3 (every key is make/break; F7-FD are acknowledged); pacing by sample rate (a movement is a packet as
soon as there is room); any effect of resolution (movements come in counts).
"""

from __future__ import annotations

from typing import Annotated

from snapshot.field_types import MaxSize, Range, Size, u2, u3, u5, u7, u8
from snapshot.schema import state

ACK, RESEND, BAT_OK = 0xFA, 0xFE, 0xAA
BREAK = 0xF0
FIFO_BYTES = 16

# Microsoft specification, appendix A: what set 1 has for each code of set 2 below 80. Above, only F7 and SysRq change;
# responses and the E0 and E1 prefixes pass as they are.
SET_2_TO_1 = bytes.fromhex(
    "ff 43 41 3f 3d 3b 3c 58 64 44 42 40 3e 0f 29 59 65 38 2a 70 1d 10 02 5a 66 71 2c 1f 1e 11 03 5b"
    "67 2e 2d 20 12 05 04 5c 68 39 2f 21 14 13 06 5d 69 31 30 23 22 15 07 5e 6a 72 32 24 16 08 09 5f"
    "6b 33 25 17 18 0b 0a 60 6c 34 35 26 27 19 0c 61 6d 73 28 74 1a 0d 62 6e 3a 36 1c 1b 75 2b 63 76"
    "55 56 77 78 79 7a 0e 7b 7c 4f 7d 4b 47 7e 7f 6f 52 53 50 4c 4d 48 01 45 57 4e 51 4a 37 49 46 54"
) + bytes({0x83: 0x41, 0x84: 0x54}.get(code, code) for code in range(0x80, 0x100))

# The same appendix: the keys whose code in set 3 is not that of set 2, without a prefix in set 2 and with E0.
_SET_3 = dict(
    zip(
        bytes.fromhex("05 06 04 0c 03 0b 83 0a 01 09 78 07 7e 76 77 7c 7b 79 5d 58 14 11 61"),
        bytes.fromhex("07 0f 17 1f 27 2f 37 3f 47 4f 56 5e 5f 08 76 7e 84 7c 5c 14 11 19 13"),
        strict=True,
    )
)
_SET_3_E0 = dict(
    zip(
        bytes.fromhex("70 6c 7d 4a 71 69 7a 75 5a 11 14 6b 72 74 1f 27 2f 7c"),
        bytes.fromhex("67 6e 6f 77 64 65 6d 63 79 39 58 61 60 6a 8b 8c 8d 57"),
        strict=True,
    )
)
_SET_3_PAUSE = b"\x62"
_FAKE_SHIFTS = (0x12, 0x59)  # E0 12 and E0 59 only keep old software from seeing a shift; set 3 has none


@state("i8042.keyboard", version=1)
class KeyboardState:
    """The keyboard at the end of the cable."""

    scan_set: Annotated[int, Range(1, 3), "scan code set chosen by F0"] = 2
    scanning: Annotated[bool, "keys are looked at (F4), or not (F5)"] = True
    leds: Annotated[u3, "lamps: bit 0 scroll lock, 1 num lock, 2 caps lock"] = 0
    typematic: Annotated[u7, "rate and delay set by F3; kept, not acted on"] = 0x2B
    awaiting: Annotated[u8, "command whose argument comes next; 0 none"] = 0
    replies: Annotated[bytes, MaxSize(FIFO_BYTES), "responses not yet sent; they go before scan codes"] = b""
    fifo: Annotated[bytes, MaxSize(FIFO_BYTES + 1), "scan codes not yet sent, the 17th byte only for an overrun"] = b""
    last: Annotated[u8, "byte sent last, for FE"] = BAT_OK


def keyboard_take(k: KeyboardState) -> int | None:
    """The next byte up the cable, if there is one."""
    if k.replies:
        k.last, k.replies = k.replies[0], k.replies[1:]
    elif k.fifo:
        k.last, k.fifo = k.fifo[0], k.fifo[1:]
    else:
        return None
    return k.last


def keyboard_key(k: KeyboardState, code: bytes) -> None:
    """A key was pressed, repeated or released: `code` is all its bytes in set 2. It is kept whole or not at all."""
    if not k.scanning:
        return
    if k.scan_set == 1:
        code = _to_set_1(code)
    elif k.scan_set == 3:
        code = _to_set_3(code)
    if len(k.fifo) + len(code) <= FIFO_BYTES:
        k.fifo += code
        return
    # Keyboard, "Overrun": 00 in sets 2 and 3, FF in set 1, once, in the place of the first key that is lost
    overrun = b"\xff" if k.scan_set == 1 else b"\x00"
    if len(k.fifo) <= FIFO_BYTES and not k.fifo.endswith(overrun):
        k.fifo += overrun


def keyboard_write(k: KeyboardState, byte: int) -> None:
    """A byte down the cable: Keyboard, "Commands from the System"."""
    command, k.awaiting = k.awaiting, 0
    # a command in the place of an argument is a command
    reply = _keyboard_argument(k, command, byte) if command and byte < 0xED else _keyboard_command(k, byte)
    if len(k.replies) + len(reply) <= FIFO_BYTES:
        k.replies += reply


def _keyboard_command(k: KeyboardState, command: int) -> bytes:
    match command:
        case 0xED | 0xF0 | 0xF3:  # lamps; scan code set; typematic rate and delay
            k.awaiting = command
        case 0xEE:  # echo
            return bytes((0xEE,))
        case 0xF2:  # read id
            return bytes((ACK, 0xAB, 0x83))
        case 0xF4:  # enable
            k.fifo, k.scanning = b"", True
        case 0xF5:  # default disable
            _keyboard_defaults(k)
            k.scanning = False
        case 0xF6:  # set default
            _keyboard_defaults(k)
        case 0xF7 | 0xF8 | 0xF9 | 0xFA:  # set 3, all keys: typematic, make/break, make, all three
            k.fifo = b""
        case 0xFB | 0xFC | 0xFD:  # set 3, the keys listed next: typematic, make/break, make
            k.fifo, k.awaiting = b"", command
        case 0xFE:  # resend
            return bytes((k.last,))
        case 0xFF:  # reset: the self-test's completion code follows
            _keyboard_defaults(k)
            return bytes((ACK, BAT_OK))
        case _:
            return bytes((RESEND,))
    return bytes((ACK,))


def _keyboard_argument(k: KeyboardState, command: int, argument: int) -> bytes:
    match command:
        case 0xED:
            k.leds = argument & 7
        case 0xF3:
            k.typematic = argument & 0x7F
        case 0xF0 if argument == 0:
            return bytes((ACK, k.scan_set))
        case 0xF0 if argument <= 3:
            k.fifo, k.scan_set = b"", argument
        case 0xFB | 0xFC | 0xFD:
            k.awaiting = command  # the list of keys ends at the next command
        case _:
            k.awaiting = command
            return bytes((RESEND,))
    return bytes((ACK,))


def _keyboard_defaults(k: KeyboardState) -> None:
    k.fifo, k.scan_set, k.scanning, k.leds, k.typematic = b"", 2, True, 0, 0x2B


def _to_set_1(code: bytes) -> bytes:
    out, released = bytearray(), 0
    for byte in code:
        if byte == BREAK:
            released = 0x80
        else:
            out.append(SET_2_TO_1[byte] | released)
            released = 0
    return bytes(out)


def _to_set_3(code: bytes) -> bytes:
    if code[:1] == b"\xe1":
        return _SET_3_PAUSE
    out, extended, released = bytearray(), False, False
    for byte in code:
        if byte == 0xE0:
            extended = True
        elif byte == BREAK:
            released = True
        else:
            if not (extended and byte in _FAKE_SHIFTS):
                out += bytes((BREAK,)) * released
                out.append((_SET_3_E0 if extended else _SET_3).get(byte, byte))
            extended = released = False
    return bytes(out)


_KNOCKS = {(200, 100, 80): 3, (200, 200, 80): 4}  # IntelliMouse, IntelliMouse Explorer


@state("i8042.mouse", version=1)
class MouseState:
    """The mouse at the end of the cable."""

    id: Annotated[int, Range(0, 4), "what F2 answers: 0 three buttons, 3 a wheel, 4 a wheel and five buttons"] = 0
    remote: Annotated[bool, "remote mode: packets only when asked by EB"] = False
    wrap: Annotated[bool, "wrap mode: bytes are echoed"] = False
    reporting: Annotated[bool, "stream mode sends packets (F4), or not (F5)"] = False
    doubled: Annotated[bool, "scaling is 2:1 in stream mode"] = False
    resolution: Annotated[u2, "counts in a millimetre, as a power of two; kept, not acted on"] = 2
    rate: Annotated[u8, "sample rate; kept, not acted on"] = 100
    knock: Annotated[bytes, Size(2), "the two sample rates set before this one, older first"] = b"\0\0"
    awaiting: Annotated[u8, "command whose argument comes next; 0 none"] = 0
    buttons: Annotated[u5, "buttons down: bit 0 left, 1 right, 2 middle, 3 fourth, 4 fifth"] = 0
    x: Annotated[int, Range(-256, 255), "movement to the right not yet in a packet"] = 0
    y: Annotated[int, Range(-256, 255), "movement upwards not yet in a packet"] = 0
    x_overflow: Annotated[bool, "x has been cut off at its limit"] = False
    y_overflow: Annotated[bool, "y has been cut off at its limit"] = False
    wheel: Annotated[int, Range(-8, 7), "wheel steps towards the user not yet in a packet"] = 0
    unreported: Annotated[bool, "there was a movement or a button since the last packet"] = False
    replies: Annotated[bytes, MaxSize(FIFO_BYTES), "responses not yet sent; they go before packets"] = b""
    packets: Annotated[bytes, MaxSize(FIFO_BYTES), "packets not yet sent, the first may be begun"] = b""
    last: Annotated[bytes, MaxSize(5), "response or packet made last, for FE"] = bytes((BAT_OK, 0))


def mouse_take(m: MouseState) -> int | None:
    """The next byte up the cable, if there is one."""
    if m.replies:
        byte, m.replies = m.replies[0], m.replies[1:]
    elif m.packets:
        byte, m.packets = m.packets[0], m.packets[1:]
        _stream(m)
    else:
        return None
    return byte


def mouse_move(m: MouseState, dx: int, dy: int, buttons: int, wheel: int) -> None:
    """The mouse was moved right and up, its wheel turned towards the user; `buttons` are those down now."""
    x, y = m.x + dx, m.y + dy
    m.x, m.y = max(-256, min(255, x)), max(-256, min(255, y))
    m.x_overflow |= m.x != x
    m.y_overflow |= m.y != y
    m.wheel = max(-8, min(7, m.wheel + wheel))
    m.unreported |= bool(dx or dy or wheel) or m.buttons != buttons & 0x1F
    m.buttons = buttons & 0x1F
    _stream(m)


def _stream(m: MouseState) -> None:
    """Stream mode: send a packet if there is something to say. One that has no room is not made: its movement stays
    in the counters, so no packet is ever cut and the last word on a button is never lost."""
    if m.unreported and m.reporting and not (m.remote or m.wrap) and len(m.packets) + _packet_bytes(m) <= FIFO_BYTES:
        m.last = _packet(m, m.doubled)
        m.packets += m.last


def _packet_bytes(m: MouseState) -> int:
    return 4 if m.id >= 3 else 3


def _packet(m: MouseState, doubled: bool) -> bytes:
    """Mouse, "Data Packet": buttons, signs and overflows; x; y; the wheel. The counters start again."""
    x, x_overflow = _scaled(m.x, m.x_overflow) if doubled else (m.x, m.x_overflow)
    y, y_overflow = _scaled(m.y, m.y_overflow) if doubled else (m.y, m.y_overflow)
    flags = m.buttons & 7 | 0x08 | (x < 0) << 4 | (y < 0) << 5 | x_overflow << 6 | y_overflow << 7
    z = m.wheel & 0x0F | (m.buttons & 0x18) << 1 if m.id == 4 else m.wheel & 0xFF
    _clear_counters(m)
    return bytes((flags, x & 0xFF, y & 0xFF, z))[: _packet_bytes(m)]


def _scaled(count: int, overflow: bool) -> tuple[int, bool]:
    """Mouse, "Set Scaling 2:1": small movements by a table, others doubled, within the same nine bits."""
    size = abs(count)
    size = (0, 1, 1, 3, 6, 9)[size] if size < 6 else 2 * size
    wanted = size if count >= 0 else -size
    value = max(-256, min(255, wanted))
    return value, overflow or value != wanted


def _clear_counters(m: MouseState) -> None:
    m.x, m.y, m.wheel, m.x_overflow, m.y_overflow, m.unreported = 0, 0, 0, False, False, False


def mouse_write(m: MouseState, byte: int) -> None:
    """A byte down the cable: Mouse, "Commands". Any byte ends the sending of packets."""
    command, m.awaiting = m.awaiting, 0
    m.packets = b""
    if m.wrap and byte not in (0xEC, 0xFF):
        reply = bytes((byte,))
    elif command and byte < 0xE6:
        reply = _mouse_argument(m, command, byte)
    else:
        reply = _mouse_command(m, byte)
    if byte != 0xFE:
        _clear_counters(m)
    m.last = reply
    if len(m.replies) + len(reply) <= FIFO_BYTES:
        m.replies += reply


def _mouse_command(m: MouseState, command: int) -> bytes:
    match command:
        case 0xE6 | 0xE7:  # scaling 1:1, 2:1
            m.doubled = command == 0xE7
        case 0xE8 | 0xF3:  # resolution; sample rate
            m.awaiting = command
        case 0xE9:  # status request
            down = (m.buttons & 1) << 2 | (m.buttons & 4) >> 1 | (m.buttons & 2) >> 1
            return bytes((ACK, m.remote << 6 | m.reporting << 5 | m.doubled << 4 | down, m.resolution, m.rate))
        case 0xEA:  # stream mode
            m.remote = False
        case 0xEB:  # read data
            return bytes((ACK,)) + _packet(m, doubled=False)
        case 0xEC:  # reset wrap mode
            m.wrap = False
        case 0xEE:  # wrap mode
            m.wrap = True
        case 0xF0:  # remote mode
            m.remote = True
        case 0xF2:  # read device type
            return bytes((ACK, m.id))
        case 0xF4 | 0xF5:  # enable, disable
            m.reporting = command == 0xF4
        case 0xF6:  # set default
            _mouse_defaults(m)
        case 0xFE:  # resend
            return m.last
        case 0xFF:  # reset: the self-test's completion code and the id follow
            _mouse_defaults(m)
            m.id, m.wrap = 0, False
            return bytes((ACK, BAT_OK, m.id))
        case _:
            return bytes((RESEND,))
    return bytes((ACK,))


def _mouse_argument(m: MouseState, command: int, argument: int) -> bytes:
    match command:
        case 0xE8 if argument <= 3:
            m.resolution = argument
        case 0xF3 if argument in (10, 20, 40, 60, 80, 100, 200):
            m.knock, m.rate = bytes((m.knock[1], m.rate)), argument
            m.id = _KNOCKS.get((*m.knock, m.rate), m.id)
        case _:
            m.awaiting = command
            return bytes((RESEND,))
    return bytes((ACK,))


def _mouse_defaults(m: MouseState) -> None:
    m.rate, m.resolution, m.doubled, m.remote, m.reporting = 100, 2, False, False, False
    m.knock = b"\0\0"  # a knock is three rates set one after another
