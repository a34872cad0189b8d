"""Real mode, protected mode with and without paging, and what crosses pages: once per backend."""

from __future__ import annotations

import struct
from functools import partial

import pytest

from tests.conftest import BACKENDS
from tests.vmm.cpu.program import Program, assemble
from vmm.cpu.protocol import CpuState, SegmentState, TableState
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason

each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
CODE, RESULTS = 0x8000, 0x600
END = "mov $0x501, %dx; xor %al, %al; out %al, (%dx); hlt"


def run(source, state, backend, prepare=lambda machine, labels: None):
    """Assemble for CODE, run from there in `state`, give the words the program left at RESULTS."""
    code, labels = assemble(source, CODE)
    machine = Machine.boot(MachineConfig(memory_bytes=4 << 20), Image(b"\xf4", flat=True), backend)
    with machine:
        machine.ram.write(CODE, code)
        prepare(machine, labels)
        state.rip = CODE
        machine.cpu.load(state)
        assert machine.run() == Stopped(StopReason.EXIT, 1)
        return struct.unpack("<8I", machine.ram.read(RESULTS, 32))


def real_mode():
    return CpuState(cs=SegmentState(type=11), rsp=0x7000)


def protected_mode(**more):
    wide = partial(SegmentState, limit=0xFFFFFFFF, db=True, granular=True)
    data = partial(wide, selector=0x10)
    return CpuState(
        cs=wide(selector=8, type=11), ds=data(), es=data(), fs=data(), gs=data(), ss=data(),
        cr0=0x11, rsp=0x7000, **more,
        gdtr=TableState(base=0x500, limit=0x17), idtr=TableState(base=0x1000, limit=0x7FF),
    )  # fmt: skip


def tables(machine, labels):
    """A flat GDT; every vector of the IDT goes to `trap`."""
    machine.ram.write(0x500, struct.pack("<3Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF))
    gate = labels["trap"] & 0xFFFF | 8 << 16 | 0x8E00 << 32
    machine.ram.write(0x1000, struct.pack("<Q", gate) * 256)


@each_backend
def test_real_mode(backend):
    """Segments times sixteen, the vector table at 0, a wrap at 64 KiB, #DE and INT n."""
    found = run(
        f"""
        .code16
        xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        movw    $soft, 0x21 * 4
        movw    $0, 0x21 * 4 + 2
        movw    $divide, 0
        movw    $0, 2
        mov     $0x1000, %ax
        mov     %ax, %es
        movl    $0x55aa1234, %es:0x10
        mov     0x600 - 0x600 + 0x7ffe, %bx
        int     $0x21
        xor     %dx, %dx
        mov     $7, %ax
        xor     %cx, %cx
        div     %cx
        movl    $0x77, 0x608
        mov     $0xffff, %ax
        mov     %ax, %fs
        mov     %fs:0x20, %eax          # 0xffff0 + 0x20 = 0x100010, and A20 is on
        mov     %eax, 0x60c
        {END}
soft:   movl    $0x1111, 0x600
        mov     %sp, 0x604
        iret
divide: pop     %ax
        add     $2, %ax
        push    %ax
        iret
        """,
        real_mode(),
        backend,
        lambda machine, _: machine.ram.write(0x100010, b"\xef\xbe\xad\xde"),
    )
    assert found[:4] == (0x1111, 0x7000 - 6, 0x77, 0xDEADBEEF)


TRAP = """
trap:   pop     %eax                    # the error code
        mov     %eax, 0x600
        mov     %cr2, %eax
        mov     %eax, 0x604
        pop     %eax
        mov     %eax, 0x608
        mov     $0x500, %esp
        jmp     *%esi
"""


@each_backend
def test_protected_mode(backend):
    """#GP with the selector for one beyond the GDT; 32-bit arithmetic; a far jump."""
    found = run(
        f"""
        .code32
        mov     $next, %esi
        mov     $0x48, %eax
at:     mov     %eax, %ds
next:   ljmp    $8, $far
far:    mov     $0x89abcdef, %eax
        mov     $0x10000, %ecx
        mul     %ecx
        mov     %eax, 0x60c
        mov     %edx, 0x610
        {END}
{TRAP}
        """,
        protected_mode(),
        backend,
        tables,
    )
    assert found[0] == 0x48 and found[3:5] == (0xCDEF0000, 0x89AB)


PAGING = {
    # CR4, and the tables' entries for 4 KiB identity pages; the page at 0x3000 is read-only, 0x4000 is absent
    "32-bit": (0, 4),
    "PAE": (0x20, 8),
}


@each_backend
@pytest.mark.parametrize("kind", PAGING)
@pytest.mark.parametrize(("address", "error"), [(0x3000, 3), (0x4008, 2)])
def test_paging_of_protected_mode(backend, kind, address, error):
    cr4, width = PAGING[kind]

    def prepare(machine, labels):
        tables(machine, labels)
        entry = "<I" if width == 4 else "<Q"
        pages = b"".join(
            struct.pack(entry, 0 if page == 4 else page << 12 | (1 if page == 3 else 3)) for page in range(64)
        )
        machine.ram.write(0x22000, pages)
        machine.ram.write(0x21000, struct.pack(entry, 0x22003))
        machine.ram.write(0x20000, struct.pack("<Q", 0x21001))  # PAE's pointer; else the directory is at 0x21000

    state = protected_mode(cr4=cr4, cr3=0x20000 if kind == "PAE" else 0x21000)
    found = run(
        f"""
        .code32
        mov     %cr0, %eax
        or      $0x80010000, %eax
        mov     %eax, %cr0
        mov     $next, %esi
        movl    $5, {address:#x}
next:   movl    $9, 0x60c
        {END}
{TRAP}
        """,
        state,
        backend,
        prepare,
    )
    assert (found[0], found[1], found[3]) == (error, address, 9)


@each_backend
def test_mmio_of_every_width(backend):
    program = Program(
        """
        mov     $0xd0000000, %edi
        movabs  $0x1122334455667788, %rax
        mov     %al, (%rdi)
        mov     %ax, 0x10(%rdi)
        mov     %eax, 0x20(%rdi)
        mov     %rax, 0x30(%rdi)
        xor     %ebx, %ebx
        mov     0x41(%rdi), %bl
        mov     %rbx, 0x2f0000
        mov     0x42(%rdi), %bx
        mov     %rbx, 0x2f0008
        mov     0x44(%rdi), %ebx
        mov     %rbx, 0x2f0010
        mov     0x48(%rdi), %rbx
        mov     %rbx, 0x2f0018
        jmp     done
        """,
        backend,
    )
    written = {}
    bus = program.machine.board.buses[0]

    def write(address, size, value):
        written.update({address - 0xD0000000 + i: value >> 8 * i & 0xFF for i in range(size)})

    def read(address, size):
        return int.from_bytes(bytes((address + i) & 0xFF for i in range(size)), "little")

    bus.__dict__.update(mmio_write=write, mmio_read=read)
    program.finish()
    value = 0x1122334455667788
    wanted = {at + i: value >> 8 * i & 0xFF for at, size in ((0, 1), (16, 2), (32, 4), (48, 8)) for i in range(size)}
    assert written == wanted
    assert [program.word(0x2F0000 + 8 * i) for i in range(4)] == [
        0x41, 0x4342, 0x47464544, 0x4F4E4D4C4B4A4948
    ]  # fmt: skip


@each_backend
def test_string_io_across_the_end_of_a_page(backend):
    program = Program(
        """
        mov     $0x3ff, %edx                    # COM1's scratch register
        mov     $0x5a, %al
        out     %al, (%dx)
        mov     $0x2f0fe0, %edi
        mov     $64, %ecx
        cld
        rep insb
        mov     $0x3f8, %edx
        lea     text(%rip), %rsi
        mov     $0x2f2ffb, %edi
        mov     $11, %ecx
        rep movsb
        mov     $0x2f2ffb, %esi
        mov     $11, %ecx
        rep outsb
        jmp     done
text:   .ascii  "hello world"
        """,
        backend,
    ).finish()
    assert bytes(program.machine.ram.slice(0x2F0FE0, 65)) == b"\x5a" * 64 + b"\0"
    assert program.machine.board.console.output == b"hello world"


@each_backend
def test_string_input_faults_where_the_mapping_ends(backend):
    """REP INSB into an absent page: what went before is there, and the instruction goes on from it."""
    program = Program(
        """
        movq    $0x310003, 0xb000 + 0x1000      # at 1 GiB: one page of RAM, and then none
        movq    $0x2f0003, 0x310000
        mov     %cr3, %rax
        mov     %rax, %cr3
        lea     next(%rip), %r15
        mov     $0x3ff, %edx
        mov     $0x5a, %al
        out     %al, (%dx)
        mov     $0x40000ff0, %edi
        mov     $40, %ecx
        rep insb
next:   mov     %rcx, %rax
        jmp     done
        """,
        backend,
    ).finish()
    (trap,) = program.traps
    assert (trap.vector, trap.error & 2, trap.cr2) == (14, 2, 0x40001000)
    assert program.result == 24 and bytes(program.machine.ram.slice(0x2F0FF0, 16)) == b"\x5a" * 16


@each_backend
def test_x87_and_sse_registers_are_in_the_state(backend, tmp_path):
    program = Program(
        """
        mov     %cr4, %rax
        or      $0x600, %eax
        mov     %rax, %cr4
        mov     %cr0, %rax
        and     $~0xc, %eax
        mov     %rax, %cr0
        fninit
        fldpi
        fld1
        fldl2e
        mov     $0x123456789abcdef, %rax
        movq    %rax, %xmm3
        movq    %rax, %xmm15
        pslldq  $8, %xmm15
        pause
        faddp
        fmulp
        fistpll 0x2f0000
        movq    %xmm3, %rax
        jmp     done
        """,
        backend,
    ).pause()
    fpu = program.machine.cpu.save().fpu
    top = fpu.fsw >> 11 & 7
    assert top == 5 and fpu.ftw == 0b11100000
    assert [fpu.st[i].hex() for i in (7, 6, 5)] == [
        "35c26821a2da0fc90040",
        "0000000000000080ff3f",
        "bcf0175c293baab8ff3f",
    ]
    assert fpu.xmm[3] == (0x123456789ABCDEF).to_bytes(16, "little") and fpu.xmm[15][8:] == fpu.xmm[3][:8]
    program.machine.save(tmp_path / "full")
    with Machine.restore(tmp_path / "full", backend) as woken:
        program.machine = woken
        assert program.finish().result == 0x123456789ABCDEF
        assert program.word(0x2F0000) == 8  # (log2(e) + 1) * pi


@each_backend
def test_a_breakpoint_of_the_guests_own(backend):
    """DR0 on an instruction: #DB before it, as a fault, and DR6 says which (SDM vol. 3, 17.2)."""
    program = Program(
        """
        lea     next(%rip), %r15
        lea     at(%rip), %rax
        mov     %rax, %dr0
        mov     $0x402, %eax
        mov     %rax, %dr7
        mov     $1, %ebx
at:     mov     $2, %ebx
next:   mov     %dr6, %rax
        and     $0xf, %eax
        shl     $8, %rax
        or      %rbx, %rax
        mov     %rax, %rcx
        xor     %eax, %eax
        mov     %rax, %dr7
        mov     %rcx, %rax
        jmp     done
        """,
        backend,
    ).finish()
    assert program.result == 0x101
    assert [(t.vector, t.rip) for t in program.traps] == [(1, program.labels["at"])]


@each_backend
def test_each_of_many_breakpoints_is_met(backend):
    """One after another in the same code, more than a CPU could keep translations for: each once, where it is."""
    program = Program(
        """
        .equ    MANY, 600
        xor     %r12d, %r12d
        lea     sled(%rip), %rbx
        mov     $MANY, %ecx
        mov     $0x402, %eax
        mov     %rax, %dr7
again:  mov     %rbx, %dr0
        lea     next(%rip), %r15
        movl    $0, 0x300010
        jmp     sled
next:   xor     %edx, %edx
        cmp     %rbx, 0x300010                  # RIP, in the first entry of the log
        sete    %dl
        add     %edx, %r12d
        mov     $0x300000, %r14d
        inc     %rbx
        dec     %ecx
        jnz     again
        xor     %eax, %eax
        mov     %rax, %dr7
        mov     %r12, %rax
        jmp     done
sled:   .rept   MANY
        nop
        .endr
        jmp     next
        """,
        backend,
    )
    assert program.finish().result == 600
