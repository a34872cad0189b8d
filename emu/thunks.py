"""Machine code that Unicorn calls directly, so that a block entry, an exception or an RDTSC costs no Python.

Each function returns the bytes of one System V x86-64 callback. They are small enough to read beside their listing,
and the tests disassemble every one with Capstone. `emu.callbacks` holds the same functions in Python for hosts
where memory cannot be made executable.

The clock words they share with Python (see vmm.clock): [0] position, [1] limit, [2] skipped_ns,
[3] size of the block that was refused, [4] exceptions delivered, [5] TSC offset.
"""

from __future__ import annotations

import struct


def _mov_rax(value: int) -> bytes:
    return b"\x48\xb8" + struct.pack("<Q", value)


def block(emu_stop: int) -> bytes:
    """UC_HOOK_BLOCK(uc, address, size, words): charge the block, or refuse it when it would cross the limit."""
    return (
        bytes.fromhex("89d0")  # mov eax, edx
        + bytes.fromhex("480301")  # add rax, [rcx]           position after this block
        + bytes.fromhex("483b4108")  # cmp rax, [rcx+8]         limit
        + bytes.fromhex("7704")  # ja refuse
        + bytes.fromhex("488901")  # mov [rcx], rax
        + bytes.fromhex("c3")  # ret
        + bytes.fromhex("895118")  # refuse: mov [rcx+0x18], edx
        + _mov_rax(emu_stop)
        + bytes.fromhex("ffe0")  # jmp rax                  uc_emu_stop(uc)
    )


def interrupt(exceptions: int, do_interrupt: int, is_int: int, other: int) -> bytes:
    """UC_HOOK_INTR(uc, number, cpu): deliver through the guest's IDT; `other(uc, number, cpu)` takes what is no vector
    (intercepts, 0x100 and up) and returns nonzero when it has set up an exception to be delivered.

    `exception_is_int` is cleared afterwards: left set by an INT n, it makes the engine move RIP at the next intercept.
    The delivery may fault and leave by longjmp; the engine then has cleared it itself."""
    deliver = (
        _mov_rax(exceptions)
        + bytes.fromhex("48ff00")  # inc qword [rax]
        + bytes.fromhex("52")  # push rdx                 and the stack is aligned
        + bytes.fromhex("4889d7")  # mov rdi, rdx
        + _mov_rax(do_interrupt)
        + bytes.fromhex("ffd0")  # call rax                 x86_cpu_do_interrupt(cpu)
        + bytes.fromhex("5a")  # pop rdx
        + _mov_rax(is_int)
        + bytes.fromhex("832000")  # and dword [rax], 0
        + bytes.fromhex("c3")  # ret
    )
    ask = (
        bytes.fromhex("52")  # push rdx                 and the stack is aligned
        + _mov_rax(other)
        + bytes.fromhex("ffd0")  # call rax
        + bytes.fromhex("5a")  # pop rdx
        + bytes.fromhex("85c0")  # test eax, eax
    )
    back = -(len(ask) + 2 + len(deliver))
    return (
        bytes.fromhex("81fe00010000")  # cmp esi, 0x100
        + b"\x73"
        + bytes([len(deliver)])  # jae ask
        + deliver
        + ask
        + b"\x75"
        + struct.pack("b", back)  # jnz deliver
        + bytes.fromhex("c3")  # ret
    )


def invalid_opcode(exceptions: int, do_interrupt: int) -> bytes:
    """UC_HOOK_INSN_INVALID(uc, cpu) -> true: deliver #UD, which Unicorn has already set up."""
    return (
        bytes.fromhex("50")  # push rax                 aligns the stack
        + _mov_rax(exceptions)
        + bytes.fromhex("48ff00")  # inc qword [rax]
        + bytes.fromhex("4889f7")  # mov rdi, rsi
        + _mov_rax(do_interrupt)
        + bytes.fromhex("ffd0")  # call rax
        + bytes.fromhex("b801000000")  # mov eax, 1
        + bytes.fromhex("59")  # pop rcx
        + bytes.fromhex("c3")  # ret
    )


def rdtsc(regs: int, cr4: int, hflags: int, tsc_aux: int | None = None) -> bytes:
    """UC_HOOK_INSN RDTSC/RDTSCP(uc, words) -> handled: EDX:EAX = guest ns + offset; RDTSCP also ECX = TSC_AUX.
    With CR4.TSD at CPL > 0 it declines, and the engine raises #GP."""
    body = (
        bytes.fromhex("488b06")  # mov rax, [rsi]           position
        + bytes.fromhex("48c1e802")  # shr rax, 2               4 bytes of code a ns
        + bytes.fromhex("48034610")  # add rax, [rsi+0x10]      skipped_ns
        + bytes.fromhex("48034628")  # add rax, [rsi+0x28]      TSC offset
        + bytes.fromhex("48b9")
        + struct.pack("<Q", regs)  # mov rcx, &env.regs
        + bytes.fromhex("89c2")  # mov edx, eax
        + bytes.fromhex("488911")  # mov [rcx], rdx           RAX
        + bytes.fromhex("48c1e820")  # shr rax, 32
        + bytes.fromhex("48894110")  # mov [rcx+0x10], rax      RDX
    )
    if tsc_aux is not None:
        body += _mov_rax(tsc_aux) + bytes.fromhex("8b00") + bytes.fromhex("48894108")  # mov eax,[rax]; mov [rcx+8],rax
    body += bytes.fromhex("b801000000c3")  # mov eax, 1; ret
    decline = bytes.fromhex("31c0c3")  # xor eax, eax; ret
    privileged = (
        _mov_rax(hflags)
        + bytes.fromhex("f60003")  # test byte [rax], 3       CPL
        + bytes.fromhex("7403")  # jz body
        + decline
    )
    return (
        _mov_rax(cr4)
        + bytes.fromhex("f60004")  # test byte [rax], 4       CR4.TSD
        + b"\x74"
        + bytes([len(privileged)])  # jz body
        + privileged
        + body
    )
