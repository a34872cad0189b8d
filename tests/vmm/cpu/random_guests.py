"""Random guests: a CPU state and memory out of a number, in any mode a CPU can be in.

Tables are good but for what chance spoils; code is random bytes, random instructions, and instructions that change the
mode, the flags or the tables. A handler steps over what faulted by a byte or two, so that a guest goes on and on.

    0x00000 IVT   0x01000 IDT   0x02000 GDT   0x02800 LDT   0x03000 TSSs   0x04000 page tables   0x08000 handlers
    0x10000 code  0x20000 data  0x30000 stack of level 0    0x38000 of level 3    0x3c000 of the IST
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from vmm.cpu.protocol import CpuState, FpuState, SegmentState, TableState

SIZE = 0x40000
IDT, GDT, LDT, TSS, TABLES, HANDLERS = 0x1000, 0x2000, 0x2800, 0x3000, 0x4000, 0x8000
CODE, DATA, STACK0, STACK3, STACK_IST = 0x10000, 0x20000, 0x30000, 0x38000, 0x3C000
CODE_SIZE = 0x600

MODES = ("real", "vm86", "16", "32", "32-paged", "pae", "compat", "64")
# With a level: real mode has none, virtual-8086 is 3.
KINDS = ("real", "vm86", *(f"{mode} ring {ring}" for mode in MODES[2:] for ring in (0, 3)))

_LONG = ("compat", "64")
_PAGED = ("32-paged", "pae", *_LONG)

# Selectors.
_CODE0, _DATA0, _CODE3, _DATA3, _CODE64, _CODE64_3 = 0x08, 0x10, 0x18, 0x20, 0x28, 0x30
_CODE16, _DATA16, _CONFORMING, _LDT, _TSS, _TSS2, _TSS16 = 0x38, 0x40, 0x48, 0x50, 0x60, 0x70, 0x80
_CODE16_3, _DATA16_3, _CALL_GATE, _TASK_GATE, _ABSENT, _DOWN = 0x88, 0x90, 0x98, 0xA8, 0xB0, 0xB8
_GDT_LIMIT = 0xFF

_TF, _IF, _VM = 1 << 8, 1 << 9, 1 << 17
_MSRS = (0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103,
         0x10, 0x174, 0x175, 0x176, 0x277, 0x1B, 0x8B, 0x200)  # fmt: skip


@dataclass
class Guest:
    kind: str
    state: CpuState
    memory: bytes


def draw(seed: int, kind: str | None = None, spoil: float = 0.3, breakpoints: bool = True) -> Guest:
    """The guest of that number; with chance `spoil` its tables are damaged. Without `breakpoints` it has none, and sets
    none."""
    rng = random.Random(seed)
    kind = rng.choice(KINDS) if kind is None else kind
    mode, ring = kind.split(" ring ")[0], int(kind[-1]) if " ring " in kind else 3 if kind == "vm86" else 0
    memory = bytearray(b"\xcc" * SIZE)  # INT3: who strays is called back
    memory[IDT:HANDLERS] = bytes(HANDLERS - IDT)
    _descriptors(memory, rng, mode)
    _gates(memory, rng, mode)
    _task_states(memory, rng, mode)
    _page_tables(memory, rng, mode, ring)
    _handlers(memory, mode)
    memory[DATA : DATA + 0x1000] = rng.randbytes(0x1000)
    code = _Code(rng, mode, breakpoints)
    memory[CODE : CODE + CODE_SIZE] = code(CODE_SIZE)
    if rng.random() < spoil:
        for _ in range(rng.choice((1, 3, 20))):
            at = rng.choice((IDT, GDT, LDT, TSS, TABLES, TABLES + 0x1000, TABLES + 0x2000)) + rng.randrange(0x200)
            memory[at] ^= 1 << rng.randrange(8)
    state = _state(rng, mode, ring)
    if not breakpoints:
        state.dr7 = 0x400
    return Guest(kind, state, bytes(memory))


# --- tables


def _descriptor(base: int, limit: int, access: int, flags: int) -> int:
    """Access: P DPL S type; flags: G D L AVL."""
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | access << 40
        | (limit >> 16 & 15) << 48
        | flags << 52
        | (base >> 24 & 0xFF) << 56
    )


def _descriptors(memory: bytearray, rng: random.Random, mode: str) -> None:
    long = mode in _LONG
    system = 0x89
    table = {
        _CODE0: _descriptor(0, 0xFFFFF, 0x9B, 0xC),
        _DATA0: _descriptor(0, 0xFFFFF, 0x93, 0xC),
        _CODE3: _descriptor(0, 0xFFFFF, 0xFB, 0xC),
        _DATA3: _descriptor(0, 0xFFFFF, 0xF3, 0xC),
        _CODE64: _descriptor(0, 0xFFFFF, 0x9B, 0xA),
        _CODE64_3: _descriptor(0, 0xFFFFF, 0xFB, 0xA),
        _CODE16: _descriptor(CODE, 0xFFFF, 0x9B, 0),
        _DATA16: _descriptor(0, 0xFFFF, 0x93, 0),
        _CONFORMING: _descriptor(0, 0xFFFFF, 0x9F, 0xA if mode == "64" else 0xC),
        _LDT: _descriptor(LDT, 0x7F, 0x82, 0),
        _TSS: _descriptor(TSS, 0xFF, system, 0),
        _TSS2: _descriptor(TSS + 0x200, 0x67, system, 0),
        _TSS16: _descriptor(TSS + 0x400, 0x2B, 0x81, 0),
        _CODE16_3: _descriptor(CODE, 0xFFFF, 0xFB, 0),
        _DATA16_3: _descriptor(0, 0xFFFF, 0xF3, 0),
        _CALL_GATE: _gate(HANDLERS + 0x800, _CODE64 if long else _CODE0, 0xEC),
        _TASK_GATE: _gate(0, _TSS2, 0xE5),
        _ABSENT: _descriptor(0, 0xFFFFF, 0x13, 0xC),
        _DOWN: _descriptor(0, 0x0FFF, 0x97, 4),
    }
    if long:
        del table[_TASK_GATE]  # a call gate is of sixteen bytes
    for selector, value in table.items():
        struct.pack_into("<Q", memory, GDT + selector, value)
    for at in range(0, 0x40, 8):
        struct.pack_into("<Q", memory, LDT + at, rng.choice(tuple(table.values())))


def _gate(offset: int, selector: int, access: int, ist: int = 0) -> int:
    return offset & 0xFFFF | selector << 16 | ist << 32 | access << 40 | (offset >> 16 & 0xFFFF) << 48


def _gates(memory: bytearray, rng: random.Random, mode: str) -> None:
    if mode in ("real", "vm86"):
        for vector in range(256):
            struct.pack_into("<HH", memory, vector * 4, HANDLERS + 0x600, 0)
    wide = mode != "16" or rng.random() < 0.5
    for vector in range(0x80):
        level = 0xE0 if vector in (3, 4) or rng.random() < 0.3 else 0x80
        kind = rng.choice((14, 15)) if wide else rng.choice((6, 7))
        handler = HANDLERS + (0x200 if vector in (8, 10, 11, 12, 13, 14, 17) else 0) + (0 if kind >= 14 else 0x400)
        if mode in _LONG:
            ist = rng.choice((0, 0, 0, 1, 2))
            struct.pack_into("<QQ", memory, IDT + vector * 16, _gate(handler, _CODE64, level | kind, ist), 0)
        elif rng.random() < 0.03:
            struct.pack_into("<Q", memory, IDT + vector * 8, _gate(0, rng.choice((_TSS2, _TSS16)), level | 5))
        else:
            struct.pack_into("<Q", memory, IDT + vector * 8, _gate(handler, _CODE0, level | kind))


def _task_states(memory: bytearray, rng: random.Random, mode: str) -> None:
    if mode in _LONG:
        struct.pack_into("<IQQQ", memory, TSS, 0, STACK0, STACK0, STACK0)
        struct.pack_into("<QQ", memory, TSS + 0x24, STACK_IST, STACK_IST - 0x400)
        struct.pack_into("<H", memory, TSS + 0x66, 0x68)
        return
    struct.pack_into("<IIIII", memory, TSS, 0, STACK0, _DATA0, STACK0, _DATA0)
    struct.pack_into("<H", memory, TSS + 0x66, 0x68)
    # Another task, of level 0 or in virtual-8086 mode.
    virtual = rng.random() < 0.3
    segments = [0x1000, CODE >> 4, 0x2000, 0x2000, 0, 0] if virtual else [_DATA0, _CODE0, _DATA0, _DATA0, 0, 0]
    eip = rng.randrange(0, CODE_SIZE) + (0 if virtual else CODE)
    flags = 2 | (_VM | 0x3000 if virtual else rng.choice((0, _IF, _TF)))
    registers = [rng.randrange(DATA, DATA + 0x1000) for _ in range(8)]
    cr3 = TABLES if mode in _PAGED else 0
    struct.pack_into("<IIIIIIII", memory, TSS + 0x200, _TSS, STACK0, _DATA0, STACK0, _DATA0, 0, 0, cr3)
    struct.pack_into("<II", memory, TSS + 0x220, eip, flags)
    struct.pack_into("<8I", memory, TSS + 0x228, *registers[:4], 0x2F00 if virtual else STACK0 - 0x800, *registers[5:])
    struct.pack_into("<6I", memory, TSS + 0x248, *segments)
    struct.pack_into("<HHHHHHH", memory, TSS + 0x400, 0, STACK0 & 0xFFFF, _DATA16, 0, 0, 0, 0)
    struct.pack_into("<HH", memory, TSS + 0x40E, rng.randrange(CODE_SIZE), 2)
    struct.pack_into("<8H", memory, TSS + 0x412, *(register & 0xFFFF for register in registers))
    struct.pack_into("<5H", memory, TSS + 0x422, _DATA16, _CODE16, _DATA16, _DATA16, 0)


def _page_tables(memory: bytearray, rng: random.Random, mode: str, ring: int) -> None:
    """The first 2 MiB as they are, the first 256 KiB by 4 KiB pages."""
    rights = 7 if ring or rng.random() < 0.8 else 3
    if mode == "32-paged":
        struct.pack_into("<I", memory, TABLES, TABLES + 0x3000 | 7)
        for page in range(0x400):
            struct.pack_into("<I", memory, TABLES + 0x3000 + 4 * page, page << 12 | _page(rng, page, rights))
    elif mode in _PAGED:
        directory = TABLES + 0x2000
        if mode == "pae":
            struct.pack_into("<Q", memory, TABLES, directory | 1)
        else:
            struct.pack_into("<Q", memory, TABLES, TABLES + 0x1000 | 7)
            struct.pack_into("<Q", memory, TABLES + 0x1000, directory | 7)
        struct.pack_into("<QQ", memory, directory, TABLES + 0x3000 | 7, 0x200000 | 0x87)
        for page in range(0x200):
            struct.pack_into("<Q", memory, TABLES + 0x3000 + 8 * page, page << 12 | _page(rng, page, rights))


def _page(rng: random.Random, page: int, rights: int) -> int:
    if page << 12 in (DATA + 0x5000, DATA + 0x6000) and rng.random() < 0.7:
        return rng.choice((0, 1, 5))
    return rights


def _handlers(memory: bytearray, mode: str) -> None:
    """At +0 without an error code, +0x200 with one; +0x400 the same for 16-bit gates; +0x600 real mode's; +0x800 what a
    call gate leads to. Each steps over a byte or two."""
    if mode in _LONG:
        plain, coded = "488304240148cf", "4883c4084883042402" + "48cf"
        call = "48cb"
    else:
        plain, coded = "83042401cf", "83c40483042402cf"
        call = "cb"
    for at, code in (
        (0, plain),
        (0x200, coded),
        (0x400, "66cf"),
        (0x600, "5589e583460201" + "5dcf"),
        (0x800, call),
    ):
        raw = bytes.fromhex(code)
        memory[HANDLERS + at : HANDLERS + at + len(raw)] = raw


# --- code


class _Code:
    """Random code of a mode."""

    def __init__(self, rng: random.Random, mode: str, breakpoints: bool) -> None:
        self.rng = rng
        self.breakpoints = breakpoints
        self.word = 2 if mode in ("real", "vm86", "16") else 4
        self.long = mode == "64"

    def __call__(self, size: int) -> bytes:
        code = b""
        while len(code) < size:
            code += self.rng.choices(_PIECES, _WEIGHTS)[0](self)
        return code[:size]

    def immediate(self, value: int) -> bytes:
        return (value & (1 << 8 * self.word) - 1).to_bytes(self.word, "little")

    def raw(self) -> bytes:
        return self.rng.randbytes(self.rng.randrange(1, 12))

    def plain(self) -> bytes:
        """An arithmetic instruction or a move, on registers or memory."""
        rng = self.rng
        prefix = rng.choice((b"", b"", b"", b"\x66", b"\x67", b"\xf0", b"\x64", b"\xf3"))
        if self.long and rng.random() < 0.5:
            prefix += bytes([0x40 | rng.randrange(16)])
        opcode = bytes([rng.choice((*range(0x40), *range(0x80, 0x90), 0xC0, 0xC1, 0xD1, 0xD3, 0xF6, 0xF7, 0xFE, 0xFF))])
        return prefix + opcode + self.modrm() + rng.randbytes(rng.choice((0, 0, 1, 4)))

    def two_bytes(self) -> bytes:
        opcode = self.rng.choice([byte for byte in range(0x100) if byte not in _BIT_TESTS])
        return bytes([0x0F, opcode]) + self.modrm() + self.rng.randbytes(self.rng.choice((0, 0, 1)))

    def modrm(self) -> bytes:
        return bytes([self.rng.choice((0xC0, 0xC0, 0x00, 0x40)) | self.rng.randrange(64)])

    def string(self) -> bytes:
        rng = self.rng
        count = b"\xb9" + self.immediate(rng.randrange(1, 40))
        ends = b"".join(bytes([0xBE + i]) + self.immediate(rng.randrange(DATA, DATA + 0x7000)) for i in (0, 1))
        return (
            count
            + ends
            + rng.choice((b"\xf3", b"\xf2", b""))
            + bytes([rng.choice((0xA4, 0xA5, 0xA6, 0xAA, 0xAB, 0xAC, 0xAE, 0x6C, 0x6E))])
        )

    def flags(self) -> bytes:
        """Load RFLAGS: TF, IF, IOPL, NT, RF, VM, AC, ID."""
        rng = self.rng
        value = (
            2
            | sum(1 << bit for bit in (8, 9, 10, 12, 13, 14, 16, 17, 18, 21) if rng.random() < 0.25)
            | rng.randrange(256)
        )
        return b"\x68" + self.immediate(value) + b"\x9d"

    def single_step(self) -> bytes:
        return b"\x68" + self.immediate(0x102) + b"\x9d"

    def sensitive(self) -> bytes:
        """One that the privilege level, IOPL or the mode decides about."""
        return bytes.fromhex(self.rng.choice(_SENSITIVE))

    def interrupt(self) -> bytes:
        return self.rng.choice((b"\xcc", b"\xce", b"\xf1", b"\xcd" + bytes([self.rng.randrange(0x60)])))

    def control(self) -> bytes:
        """Read, change a bit, write back: a control register."""
        rng = self.rng
        modrm = 0xC0 | rng.choice((0, 0, 2, 3, 4, 4, 8 * self.long)) << 3 & 0x38
        prefix = b"\x44" if self.long and rng.random() < 0.1 else b""
        bit = rng.choice((1, 2, 3, 5, 16, 18, 0, 29, 30, 31, 4, 7, 8, 9, 10, 13, rng.randrange(32)))
        change = rng.choice((b"\x0d", b"\x35")) + self.immediate(1 << bit)  # OR, XOR
        return prefix + bytes([0x0F, 0x20, modrm]) + change + prefix + bytes([0x0F, 0x22, modrm])

    def debug(self) -> bytes:
        rng = self.rng
        register = rng.randrange(8) if self.breakpoints else 6
        value = rng.choice(
            (CODE + rng.randrange(CODE_SIZE), DATA + rng.randrange(0x1000), 0x401, 0x2703, rng.getrandbits(32))
        )
        return b"\xb8" + self.immediate(value) + bytes([0x0F, rng.choice((0x21, 0x23, 0x23)), 0xC0 | register << 3])

    def msr(self) -> bytes:
        rng = self.rng
        address = b"\xb9" + rng.choice(_MSRS).to_bytes(4, "little")
        access = rng.choice((b"\x0f\x32", b"\x0f\x30"))
        if self.word == 2:
            address = b"\x66" + address
        return address + (rng.choice((b"", b"\x31\xd2", b"\xba" + self.immediate(rng.getrandbits(32)))) + access)

    def table(self) -> bytes:
        """LGDT, LIDT, SGDT, SIDT, LMSW, LLDT, LTR, STR, VERR, of memory or a register."""
        rng = self.rng
        if rng.random() < 0.4:
            return b"\xb8" + self.immediate(self.selector()) + bytes([0x0F, 0x00, 0xC0 | rng.randrange(8) << 3])
        return bytes([0x0F, rng.choice((0, 1)), rng.choice((0x00, 0x40)) | rng.randrange(64)]) + rng.randbytes(
            rng.choice((0, 1))
        )

    def selector(self) -> int:
        return self.rng.choice((self.rng.randrange(0, _GDT_LIMIT), self.rng.randrange(4), self.rng.randrange(0x80) | 4))

    def segment(self) -> bytes:
        rng = self.rng
        load = bytes([0x8E, 0xC0 | rng.choice((0, 2, 3, 4, 5)) << 3])
        return (
            b"\xb8"
            + self.immediate(self.selector())
            + (load if rng.random() < 0.8 else b"\x50" + rng.choice((b"\x07", b"\x17", b"\x1f")))
        )

    def far(self) -> bytes:
        """A far transfer: JMP, CALL, RET, IRET."""
        rng = self.rng
        target = (
            self.immediate(CODE + rng.randrange(CODE_SIZE))
            if self.word == 4
            else self.immediate(rng.randrange(CODE_SIZE))
        )
        selector = (
            self.selector()
            if rng.random() < 0.7
            else rng.choice((_TSS, _TSS2, _TSS16, _TASK_GATE, _CALL_GATE)) | rng.randrange(4)
        )
        pushed = b"\x68" + self.immediate(selector) + b"\x68" + target
        match rng.randrange(4):
            case 0:
                return rng.choice((b"\x9a", b"\xea")) + target + selector.to_bytes(2, "little")
            case 1:
                return pushed + (b"\x48\xcb" if self.long else b"\xcb")
            case 2:
                return (
                    b"\x68"
                    + self.immediate(2 | rng.choice((0, 0x3000, _TF, _VM, 0x4000)))
                    + pushed
                    + rng.choice((b"\xcf", b"\x48\xcf"))
                )
            case _:
                stack = (
                    b"\x68"
                    + self.immediate(rng.choice((_DATA3 | 3, _DATA0, 0, 3)))
                    + b"\x68"
                    + self.immediate(STACK3 - 0x100)
                )
                return (
                    stack
                    + b"\x68"
                    + self.immediate(0x3002)
                    + b"\x68"
                    + self.immediate(rng.choice((_CODE3, _CODE64_3, _CODE16_3)) | 3)
                    + b"\x68"
                    + target
                    + (b"\x48\xcf" if self.long else b"\xcf")
                )

    def near(self) -> bytes:
        rng = self.rng
        return rng.choice((bytes([0x70 | rng.randrange(16)]), b"\xeb", b"\xe2")) + bytes(
            [rng.choice((2, 5, 0xF0, 0xFE, rng.randrange(256)))]
        )

    def floating(self) -> bytes:
        rng = self.rng
        if rng.random() < 0.4:  # FXSAVE, FXRSTOR, LDMXCSR, STMXCSR
            return (
                b"\xbe"
                + self.immediate(DATA + 16 * rng.randrange(0x100))
                + bytes([0x0F, 0xAE, rng.randrange(4) << 3 | 6])
            )
        opcode, modrm = rng.randrange(0xD8, 0xE0), self.modrm()
        # FSAVE and FSTENV store the selectors of the last instruction and its operand, which are no part of the state.
        stores = opcode in (0xD9, 0xDD) and modrm[0] < 0xC0 and modrm[0] >> 3 & 7 == 6
        return b"\x90" if stores else bytes([opcode]) + modrm


# BT, BTS, BTR, BTC leave four flags undefined, and in the engine those depend on what stands before them in a block.
_BIT_TESTS = (0xA3, 0xAB, 0xB3, 0xBA, 0xBB)
_SENSITIVE = (
    "9c", "9d", "fa", "fb", "f4", "cf", "0f05", "0f07", "480f07", "0f34", "0f35", "480f35", "0f06", "0f08", "0f09",
    "0f01f8", "0fa2", "0f31", "0f01f9", "0f33", "0f0b", "e460", "e670", "e471", "ec", "ee", "ed", "6c", "6e", "17",
    "1f", "0f01d0", "0f01d8", "0f01d9", "0f01da", "0f01db", "0f01dc", "0f01dd", "0f01de", "0f01df", "0f01c8",
    "0f01c9", "0faa", "f390", "9b", "0fb2c8", "c5", "c4", "62", "d6", "f0", "66cf", "669d", "cb", "ca0400",
    "c8100001", "c9", "90",
)  # fmt: skip
_PIECES = (
    _Code.raw, _Code.plain, _Code.two_bytes, _Code.string, _Code.flags, _Code.single_step, _Code.sensitive,
    _Code.interrupt, _Code.control, _Code.debug, _Code.msr, _Code.table, _Code.segment, _Code.far, _Code.near,
    _Code.floating,
)  # fmt: skip
_WEIGHTS = (1, 14, 2, 2, 2, 0.5, 4, 1, 1, 1, 1, 1, 1.5, 1, 2, 1.5)


# --- the CPU


def _state(rng: random.Random, mode: str, ring: int) -> CpuState:
    long, paged = mode in _LONG, mode in _PAGED
    state = CpuState()
    for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{i}" for i in range(8, 16))):
        values = rng.randrange(DATA, DATA + 0x8000), rng.randrange(0x100), rng.getrandbits(64)
        setattr(state, name, rng.choice(values))
    state.cr0 = 0x10 | rng.choice((0, 0x20, 0x8, 0x2)) | rng.choice((0, 0x10000)) | rng.choice((0, 0x40000))
    state.cr4 = sum(1 << bit for bit in (0, 1, 2, 3, 8, 9, 10) if rng.random() < 0.3)
    if mode == "32-paged":
        state.cr4 |= rng.choice((0, 0x10))
    if mode != "real":
        state.cr0 |= 1
    if paged:
        state.cr0 |= 1 << 31
        state.cr3 = TABLES
        state.cr4 |= 0x20 if mode != "32-paged" else 0
    state.efer = (0x500 if long else 0) | rng.choice((0, 1)) | rng.choice((0, 0x800))
    state.rflags = 2 | (rng.getrandbits(32) & 0x8D5) | sum(
        bit for bit, chance in ((_IF, 0.5), (_TF, 0.1), (0x1000, 0.3), (0x2000, 0.3), (0x4000, 0.05), (1 << 18, 0.1))
        if rng.random() < chance
    )  # fmt: skip
    state.rsp = (STACK0, 0, 0, STACK3)[ring] - 0x100
    if mode in ("real", "vm86"):
        dpl = 3 if mode == "vm86" else 0
        for name, at in (("cs", CODE), ("ds", DATA), ("es", DATA), ("ss", DATA), ("fs", 0), ("gs", 0x1000)):
            kind = 11 if name == "cs" and mode == "real" else 3
            setattr(state, name, SegmentState(selector=at >> 4, base=at, limit=0xFFFF, type=kind, dpl=dpl))
        state.rsp = 0xFF00
        state.rip = rng.randrange(0x400)
        if mode == "vm86":
            state.rflags |= _VM
    else:
        code, data = (
            {"64": (_CODE64, _CODE64_3), "16": (_CODE16, _CODE16_3)}.get(mode, (_CODE0, _CODE3)),
            (_DATA0, _DATA3),
        )
        if mode == "16":
            data = (_DATA16, _DATA16_3)
        wide = mode != "16"
        limit = 0xFFFFFFFF if wide else 0xFFFF
        high = ring == 3
        state.cs = SegmentState(
            selector=code[high] | ring, base=CODE if mode == "16" else 0, limit=limit, type=11, dpl=ring,
            long=mode == "64", db=mode in ("32", "32-paged", "pae", "compat"), granular=wide,
        )  # fmt: skip
        for name in ("ds", "es", "ss", "fs", "gs"):
            segment = SegmentState(selector=data[high] | ring, limit=limit, type=3, dpl=ring, db=wide, granular=wide)
            setattr(state, name, segment)
        state.rip = rng.randrange(0x400) + (0 if mode == "16" else CODE)
        if mode == "16":
            state.rsp &= 0xFFFF
    state.gdtr = TableState(base=GDT, limit=_GDT_LIMIT)
    state.idtr = TableState(base=0, limit=0x3FF) if mode == "real" else TableState(base=IDT, limit=0x7FF)
    state.ldtr = SegmentState(selector=_LDT, base=LDT, limit=0x7F, type=2, s=False)
    state.tr = SegmentState(selector=_TSS, base=TSS, limit=0xFF, type=11, s=False)
    state.star = (_CODE64 if long else _CODE0) << 32 | (_CODE3 | 3) << 48
    state.lstar = state.cstar = CODE + rng.randrange(CODE_SIZE)
    state.sfmask = rng.choice((0, 0x300, 0x47700))
    state.sysenter_cs, state.sysenter_esp, state.sysenter_eip = _CODE0, STACK0, CODE + rng.randrange(CODE_SIZE)
    state.kernel_gs_base = DATA
    if rng.random() < 0.4:
        for name in ("dr0", "dr1", "dr2", "dr3"):
            setattr(state, name, rng.choice((CODE + rng.randrange(CODE_SIZE), DATA + (rng.randrange(0x2000) & ~7))))
        state.dr7 = 0x400 | rng.getrandbits(8) | rng.choice((0, rng.getrandbits(16) << 16 & ~0x22220000))
    state.fpu = FpuState(fcw=rng.choice((0x37F, 0x340, 0x27F)), mxcsr=rng.choice((0x1F80, 0x1F00, 0x9FC0)))
    return state
