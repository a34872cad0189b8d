"""Machine code that Unicorn calls directly, so that a block entry, an exception or an RDTSC costs no Python.

Each function returns the bytes of one System V x86-64 callback. They are small enough to read beside their listing,
and the tests disassemble every one with Capstone. `emu.callbacks` holds the same functions in Python for hosts
where memory cannot be made executable.

They share a clock's words with Python: vmm.clock.Word says which there are.
"""

from __future__ import annotations

import struct

from vmm.clock import Word


def _mov_rax(value: int) -> bytes:
    return b"\x48\xb8" + struct.pack("<Q", value)


def _at(word: Word) -> bytes:
    """A word's displacement from the first."""
    return bytes([8 * word])


def block(emu_stop: int) -> bytes:
    """UC_HOOK_BLOCK(uc, address, size, words): charge the block, or refuse it when it would cross the limit."""
    return (
        bytes.fromhex("89d0")  # mov eax, edx
        + bytes.fromhex("480341")
        + _at(Word.TIME)  # add rax, [rcx+TIME]      time after this block
        + bytes.fromhex("483b41")
        + _at(Word.LIMIT)  # cmp rax, [rcx+LIMIT]
        + bytes.fromhex("7705")  # ja refuse
        + bytes.fromhex("488941")
        + _at(Word.TIME)  # mov [rcx+TIME], rax
        + bytes.fromhex("c3")  # ret
        + bytes.fromhex("8951")
        + _at(Word.REFUSED)  # refuse: mov [rcx+REFUSED], edx
        + _mov_rax(emu_stop)
        + bytes.fromhex("ffe0")  # jmp rax                  uc_emu_stop(uc)
    )


def interrupt(exceptions: int, do_interrupt: int, is_int: int, eflags: int, other: int) -> bytes:
    """UC_HOOK_INTR(uc, number, cpu): deliver through the guest's IDT; `other(uc, number, cpu)` is asked first about
    INT n and about what is no vector (intercepts, 0x100 and up), and returns nonzero when something is to be delivered.

    RF is on in the RFLAGS that a fault pushes (SDM vol. 3, 17.3.1.1); #DB, the one trap that comes here, is left alone.
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
    set_rf = _set_rf(eflags)
    fault = bytes.fromhex("83fe01") + b"\x74" + bytes([len(set_rf)]) + set_rf  # cmp esi, 1; je deliver
    software = _mov_rax(is_int) + bytes.fromhex("833800")  # cmp dword [rax], 0
    return (
        bytes.fromhex("81fe00010000")  # cmp esi, 0x100
        + b"\x73"
        + bytes([len(software) + 2 + len(fault) + len(deliver)])  # jae ask
        + software
        + b"\x75"
        + bytes([len(fault) + len(deliver)])  # jne ask
        + fault
        + deliver
        + ask
        + b"\x75"
        + struct.pack("b", back)  # jnz deliver
        + bytes.fromhex("c3")  # ret
    )


def _set_rf(eflags: int) -> bytes:
    return _mov_rax(eflags) + bytes.fromhex("810800000100")  # or dword [rax], 0x10000


def invalid_opcode(exceptions: int, do_interrupt: int, eflags: int) -> bytes:
    """UC_HOOK_INSN_INVALID(uc, cpu) -> true: deliver #UD, which Unicorn has already set up."""
    return (
        bytes.fromhex("50")  # push rax                 aligns the stack
        + _set_rf(eflags)
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
    """UC_HOOK_INSN RDTSC/RDTSCP(uc, words) -> handled: EDX:EAX = guest time + offset; RDTSCP also ECX = TSC_AUX.
    With CR4.TSD at CPL > 0 it declines, and the engine raises #GP."""
    body = (
        bytes.fromhex("488b46")
        + _at(Word.TIME)  # mov rax, [rsi+TIME]
        + bytes.fromhex("48f766")
        + _at(Word.TSC_SCALE)  # mul qword [rsi+TSC_SCALE]   in ticks,
        + bytes.fromhex("480facd020")  # shrd rax, rdx, 32        rounded down
        + bytes.fromhex("480346")
        + _at(Word.TSC_OFFSET)  # add rax, [rsi+TSC_OFFSET]
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


def store_filter(site: int, original: int) -> bytes:
    """uc->memory_mapping(uc, address): before a slow store goes on, let a page without code become fast.

    The engine keeps every store to an executable page slow for ever, code or no code; and until late in its boot all
    of Linux's data is mapped executable. The call at `site`, in the engine's slow store, has the virtual page in R12,
    its distance to the RAM offset in R13 and the TLB entry in RBP. Where the page holds no translated code this
    clears the entry's execute half (a fetch will fill it again), and the engine then marks the page fast itself.
    """
    find = (
        bytes.fromhex("4b8d142c")  # lea rdx, [r12+r13]       RAM offset
        + bytes.fromhex("48c1ea0c")  # shr rdx, 12              its page
        + bytes.fromhex("8b8ff4020000")  # mov ecx, [rdi+0x2f4]     v_l1_shift
        + bytes.fromhex("4889d0")  # mov rax, rdx
        + bytes.fromhex("48d3e8")  # shr rax, cl
        + bytes.fromhex("448b87f0020000")  # mov r8d, [rdi+0x2f0]     v_l1_size
        + bytes.fromhex("41ffc8")  # dec r8d
        + bytes.fromhex("4c21c0")  # and rax, r8
        + bytes.fromhex("4c8b87e0020000")  # mov r8, [rdi+0x2e0]      l1_map
        + bytes.fromhex("4d8d04c0")  # lea r8, [r8+rax*8]
        + bytes.fromhex("448b8ff8020000")  # mov r9d, [rdi+0x2f8]     v_l2_levels
        + bytes.fromhex("456bc90a")  # imul r9d, r9d, 10
    )
    # level: while levels are left, r8 = &(*r8)[page >> shift & 0x3ff]
    step = (
        bytes.fromhex("4d8b00")  # mov r8, [r8]
        + bytes.fromhex("4d85c0")  # test r8, r8
        + bytes.fromhex("74aa")  # jz empty                 (patched below)
        + bytes.fromhex("4889d0")  # mov rax, rdx
        + bytes.fromhex("4489c9")  # mov ecx, r9d
        + bytes.fromhex("48d3e8")  # shr rax, cl
        + bytes.fromhex("25ff030000")  # and eax, 0x3ff
        + bytes.fromhex("4d8d04c0")  # lea r8, [r8+rax*8]
        + bytes.fromhex("4183e90a")  # sub r9d, 10
    )
    leaf = (
        bytes.fromhex("4d8b00")  # mov r8, [r8]             the leaf table
        + bytes.fromhex("4d85c0")  # test r8, r8
        + bytes.fromhex("74aa")  # jz empty
        + bytes.fromhex("81e2ff030000")  # and edx, 0x3ff
        + bytes.fromhex("488d0452")  # lea rax, [rdx+rdx*2]     24 bytes a page
        + bytes.fromhex("49833cc000")  # cmp qword [r8+rax*8], 0  first_tb
        + bytes.fromhex("75aa")  # jnz original
    )
    empty = bytes.fromhex("48c74510ffffffff")  # mov qword [rbp+0x10], -1  addr_code
    tail = _mov_rax(original) + bytes.fromhex("ffe0")  # jmp rax
    test = bytes.fromhex("4585c9") + b"\x74" + bytes([len(step) + 2])  # test r9d, r9d; jz leaf
    loop = test + step + b"\xeb" + struct.pack("b", -(len(test) + len(step) + 2))
    body = find + loop + leaf

    def patch(at: int, target: int) -> None:
        nonlocal body
        body = body[:at] + struct.pack("b", target - at - 1) + body[at + 1 :]

    patch(len(find) + len(test) + 7, len(body))
    patch(len(find) + len(loop) + 7, len(body))
    patch(len(body) - 1, len(body) + len(empty))
    return (
        _mov_rax(site)
        + bytes.fromhex("48390424")  # cmp [rsp], rax
        + b"\x75"
        + bytes([len(body) + len(empty)])  # jne original
        + body
        + empty
        + tail
    )
