"""What programs on several CPUs begin with: the first CPU starts the others, which come to `ap`.

    start   count       in the first CPU's program: all others are started, and have come to `ap` when it goes on
    ap:                 each of them, in 64-bit mode on the same tables, with its own stack

%rbx is where the local APIC is, %edi the CPU's number. `COUNTS` has eight bytes a CPU, of its interrupts 0x38; `ipi`
sends one.
"""

from __future__ import annotations

COUNTS, TABLE = 0x2E0000, 0x2E1000
SEVERAL = f"""
        .equ    COUNTS, {COUNTS:#x}
        .equ    TABLE, {TABLE:#x}                 # for the test
"""
SEVERAL += """
        .equ    ONLINE, 0x2e0ff8
        .equ    AT, 0x20000                     # of the trampoline
        .macro  ipi     destination, low        # by ICR
        movl    \\destination, 0x310(%rbx)
        movl    \\low, 0x300(%rbx)
        .endm
        .macro  start   count
        gate    0x38, counted
        mov     $0xfee00000, %ebx
        xor     %edi, %edi
        movl    $0x1ff, 0xf0(%rbx)
        lea     trampoline(%rip), %rsi
        mov     $AT, %edi
        mov     $trampoline_end - trampoline, %ecx
        rep movsb
        mov     %cr3, %rax
        mov     %eax, AT + tramp_cr3 - trampoline
        sgdt    AT + tramp_gdt - trampoline
        ipi     $0, $0xc4500                    # INIT, all but this one
        ipi     $0, $0xc4600 | (AT >> 12)
        xor     %edi, %edi
8:      rep nop                                 # (a macro here is called pause)
        cmpl    $\\count - 1, ONLINE
        jb      8b
        .endm
        jmp     over
        .code16
trampoline:
        cli
        mov     %cs, %ax
        mov     %ax, %ds
        lgdtl   tramp_gdt - trampoline
        mov     tramp_cr3 - trampoline, %ecx
        mov     %ecx, %cr3
        mov     $0xa0, %eax                     # PAE, PGE
        mov     %eax, %cr4
        mov     $0xc0000080, %ecx
        rdmsr
        or      $0x100, %eax                    # LME
        wrmsr
        mov     $0x80000033, %eax
        mov     %eax, %cr0
        ljmpl   $0x10, $AT + tramp_64 - trampoline
        .code64
tramp_64:
        mov     $0xfee00000, %ebx
        mov     0x20(%rbx), %edi
        shr     $24, %edi
        mov     %edi, %eax
        shl     $12, %eax
        mov     $0x70000, %esp
        sub     %eax, %esp
        xor     %eax, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $idtr, %eax
        lidt    (%rax)
        movl    $0x1ff, 0xf0(%rbx)
        lock incl ONLINE
        mov     $ap, %eax
        jmp     *%rax
        .balign 8
tramp_gdt:
        .quad   0, 0
tramp_cr3:
        .long   0
trampoline_end:
counted:
        push    %rax
        mov     0x20(%rbx), %eax
        shr     $24, %eax
        lock incq COUNTS(, %rax, 8)
        movl    $0, 0xb0(%rbx)
        pop     %rax
        iretq
over:
"""
