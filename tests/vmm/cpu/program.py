"""Small guest programs in assembly, with a trap log: what a CPU backend must do, seen from inside.

The prelude sets up an IDT. Every trap appends (vector, error code, RIP, CR2, RFLAGS) to a log; an exception then goes
on at the address in R15, an interrupt (vectors from 0x30) returns. `done` ends the program; RAX is its result.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from vmm.cpu.backends import MakeCpu
from vmm.guest.image import Image
from vmm.machine.machine import Machine, MachineConfig, Stopped, StopReason

LOG, LOG_END, RESULT = 0x300000, 0x2FFFF8, 0x2FFFF0

PRELUDE = """
        .macro  pause                           # the machine stops here: all before it is done, nothing behind it
        push    %rax
        push    %rdx
        mov     $0x501, %edx
        mov     $PAUSED, %eax
        out     %ax, (%dx)
        pop     %rdx
        pop     %rax
        jmp     .Lpaused\\@                     # the emulated CPU stops at the end of a block
.Lpaused\\@:
        .endm
        .equ    PAUSED, 0xa55a
        .macro  syscalls                        # SYSCALL leads to `entry`
        mov     $0xc0000081, %ecx               # STAR: kernel 0x10, user 0x23 (CS 0x33, SS 0x2b)
        xor     %eax, %eax
        mov     $0x00230010, %edx
        wrmsr
        inc     %ecx                            # LSTAR
        lea     entry(%rip), %rax
        xor     %edx, %edx
        wrmsr
        mov     $0xc0000084, %ecx               # SFMASK: DF
        mov     $0x400, %eax
        wrmsr
        mov     $0xc0000080, %ecx               # EFER.SCE
        rdmsr
        or      $1, %eax
        wrmsr
        .endm
        .macro  gate    vector, label           # its handler is at a label, and no trap
        lea     \\label(%rip), %rax
        mov     %ax, 0x301000 + 16 * \\vector
        shr     $16, %rax
        mov     %ax, 0x301000 + 16 * \\vector + 6
        .endm
        .macro  pic     vectors                 # the first controller's, with the timer's line alone open
        mov     $0x11, %al
        out     %al, $0x20
        mov     $\\vectors, %al
        out     %al, $0x21
        mov     $4, %al
        out     %al, $0x21
        mov     $1, %al
        out     %al, $0x21
        mov     $0xfe, %al
        out     %al, $0x21
        .endm
        .code64
        mov     $0x80000, %esp
        mov     $0x301000, %edi
        lea     stubs(%rip), %rax
        mov     $64, %ecx
1:      mov     %rax, %rdx
        mov     %ax, (%rdi)
        movl    $0x8e000010, 2(%rdi)
        mov     %cs, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        shr     $16, %rdx
        mov     %edx, 6(%rdi)
        movl    $0, 8(%rdi)
        movl    $0, 12(%rdi)
        add     $16, %rdi
        add     $16, %rax
        dec     %ecx
        jnz     1b
        lidt    idtr(%rip)
        mov     $0x300000, %r14d
        jmp     program
done:   mov     %rax, 0x2ffff0
        mov     %r14, 0x2ffff8
        mov     $0x501, %edx
        out     %al, (%dx)
        hlt
idtr:   .word   0x3ff
        .quad   0x301000
        .balign 16
stubs:
        .set    vector, 0
        .rept   64
        .balign 16
        .if     vector != 8 && (vector < 10 || vector > 14) && vector != 17
        push    $0
        .endif
        push    $vector
        jmp     trap
        .set    vector, vector + 1
        .endr
trap:   pop     (%r14)
        pop     8(%r14)
        mov     (%rsp), %r13
        mov     %r13, 16(%r14)
        mov     %cr2, %r13
        mov     %r13, 24(%r14)
        mov     16(%rsp), %r13
        mov     %r13, 32(%r14)
        mov     (%r14), %r13
        add     $40, %r14
        cmp     $0x30, %r13
        jb      1f
        mov     $0x20, %r13
        xchg    %rax, %r13
        out     %al, $0x20
        xchg    %rax, %r13
        iretq
1:      mov     %r15, (%rsp)
        andl    $~0x100, 16(%rsp)               # no further single steps
        iretq
program:
"""


class Trap(NamedTuple):
    vector: int
    error: int
    rip: int
    cr2: int
    rflags: int


@cache
def assemble(source: str, base: int = 0x100000) -> tuple[bytes, dict[str, int]]:
    """Code for address `base` and its labels. Skips where there is no assembler (Debian: binutils)."""
    for tool in ("as", "ld", "nm", "objcopy"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here (Debian: binutils)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "p.s").write_text(source + "\n")

        def run(*command: str) -> str:
            return subprocess.run(command, cwd=path, check=True, capture_output=True, text=True).stdout

        run("as", "--64", "-o", "p.o", "p.s")
        run("ld", f"-Ttext={base:#x}", "-e", f"{base:#x}", "-o", "p.elf", "p.o")
        run("objcopy", "-O", "binary", "-j", ".text", "p.elf", "p.bin")
        labels = {line.split()[2]: int(line.split()[0], 16) for line in run("nm", "p.elf").splitlines()}
        return (path / "p.bin").read_bytes(), labels


def echo_program(port: int) -> str:
    """Sends back each character of the serial port at `port`, one on, until a full stop comes. It polls: no interrupt
    and no timer."""
    return f"""
        mov     ${port + 3:#x}, %edx            # 8 bits, RTS
        mov     $3, %al
        out     %al, (%dx)
        mov     ${port + 4:#x}, %edx
        mov     $3, %al
        out     %al, (%dx)
1:      mov     ${port + 5:#x}, %edx
        in      (%dx), %al
        test    $1, %al
        jz      1b
        mov     ${port:#x}, %edx
        in      (%dx), %al
        cmp     $'.', %al
        je      done
        inc     %al
        out     %al, (%dx)
        jmp     1b
"""


class Program:
    """A program on a machine."""

    def __init__(
        self, source: str, backend: str = "emu", memory: int = 16 << 20, board: str = "isapc", cpus: int = 1,
        make_cpu: MakeCpu | None = None,
    ) -> None:  # fmt: skip
        code, self.labels = assemble(PRELUDE + source)
        config = MachineConfig(memory_bytes=memory, board=board, cpus=cpus)
        self.machine = Machine.boot(config, Image(code, flat=True), backend, make_cpu=make_cpu)

    def finish(self) -> Program:
        stop = self.machine.run()
        assert isinstance(stop, Stopped) and stop.reason == "exit" and stop.status != 0xA55A << 1 | 1, stop
        return self

    def pause(self) -> Program:
        """Run to the next `pause`."""
        assert self.machine.run() == Stopped(StopReason.EXIT, 0xA55A << 1 | 1)
        return self

    def word(self, address: int) -> int:
        return int.from_bytes(self.machine.ram.slice(address, 8), "little")

    @property
    def result(self) -> int:
        return self.word(RESULT)

    @property
    def traps(self) -> list[Trap]:
        return [Trap(*(self.word(at + 8 * i) for i in range(5))) for at in range(LOG, self.word(LOG_END), 40)]
