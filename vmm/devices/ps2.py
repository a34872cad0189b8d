"""The two devices at the ends of the PS/2 cables: a 101/102-key keyboard and a mouse, as states and functions.

They are part of the controller's state (see i8042.py) and so of one device. Nothing here knows the controller: a
byte from the host goes in by `*_write`, a person's action by `keyboard_key` and `mouse_move`, and the controller
takes what they have to say, one byte at a time, by `*_take`.

IBM Personal System/2 Hardware Interface Technical Reference, "Keyboards (101- and 102-Key)" and "Auxiliary Device";
IBM Personal System/2 Mouse Technical Reference (S68X-2229), "Commands" and "Data Packet";
Microsoft, "Key Scan Code Specification" 1.3a and the IntelliMouse (200/100/80) and Explorer (200/200/80) knocks.

Absent: the serial line (no parity or timeout errors, nothing takes time), the completion codes a device sends on
its own at power-on (firmware has read them), typematic repeat (whoever presses keys repeats them; the rate is only
kept), the make-only key types of set 3 (F7-FD are acknowledged, every key stays make/break), the pacing of packets
by sample rate (a movement is a packet as soon as there is room), and the effect of resolution (movements come in
counts).
"""

from __future__ import annotations

from typing import Annotated

from snapshot.schema import MaxSize, Range, Size, state, u2, u3, u5, u7, u8

ACK, RESEND, BAT_OK, ECHO = 0xFA, 0xFE, 0xAA, 0xEE
KEYBOARD_FIFO, REPLY_FIFO, PACKET_FIFO = 16, 16, 16

# What the 8042 does to a keyboard's byte when translation is on ("Keyboard Scan Code Translation"). Codes from 80
# up pass as they are, but for F7 and for SysRq.
SET_2_TO_1 = bytes.fromhex(
    "ff43413f3d3b3c586444 42403e0f2959 65382a701d10025a66712c1f1e11035b"
    "672e2d201205045c6839 2f211413065d 6931302322 15075e6a72322416 08095f"
    "6b332517180b0a606c34 352626190c61 6d7328741a0d626e3a361c1b752b6376".replace("352626190c61", "352627190c61")
    + "55567778797a0e7b7c4f7d4b477e7f6f 525350 4c4d480145574e514a37494654"
) + bytes({0x83: 0x41, 0x84: 0x54}.get(code, code) for code in range(0x80, 0x100))
