# What a host's CPU must do for a guest's kernel, a check each. vmm/debug/selftest.py runs it and has the checks' names.
#
# A flat binary for physical 0x100000, entered in 64-bit mode, ring 0, interrupts off; 8 MiB of RAM. Checks begin at
# number FIRST and end before number LAST, both laid down by the host; NOW says which one runs, and in OUTCOMES each one
# that holds leaves a 1. A trap that a check awaits has the vector in R12 and goes on at R13, every other fails the check.
# References: SDM vol. 3A chapters 4, 5, 6; SYSCALL and SYSRET in vol. 2B; 8259A and 8254 datasheets.
#
# as --64 --fatal-warnings -mx86-used-note=no -o selftest.o selftest.S
# ld -m elf_x86_64 -Ttext=0x100000 --oformat binary -o selftest.bin selftest.o

.equ FIRST,    0x210000
.equ LAST,     0x210008
.equ NOW,      0x210010
.equ OUTCOMES, 0x210100
.equ PML4,     0x200000             # and the tables below it, a page each
.equ PDPT,     0x201000
.equ PD,       0x202000
.equ PT,       0x203000
.equ IDT,      0x204000
.equ TSS,      0x205000
.equ STACK,    0x208000             # tops
.equ RING0,    0x20a000
.equ P_CODE,   0x300000             # the user's pages, at 4 MiB and on
.equ P_DATA,   0x301000
.equ P_OTHER,  0x302000
.equ U_CODE,   0x400000             # read-only
.equ U_DATA,   0x401000
.equ U_HOLE,   0x402000             # not there
.equ KCODE,    0x10
.equ KDATA,    0x18
.equ UDATA,    0x28 | 3
.equ UCODE,    0x30 | 3
.equ TR,       0x38
.equ NONE,     -1
.equ SYSCALL,  0x100              # as a vector

        .code64
        mov     $STACK, %esp
        mov     $PML4, %edi                     # to be filled: tables, IDT, TSS
        xor     %eax, %eax
        mov     $(0x206000 - PML4) / 8, %ecx
        rep stosq
        movq    $PDPT + 7, PML4
        movq    $PD + 7, PDPT
        movq    $0x83, PD                       # 2 MiB: the image. The kernel's alone
        movq    $0x200083, PD + 8
        movq    $PT + 7, PD + 16
        movq    $P_CODE + 5, PT
        movq    $P_DATA + 7, PT + 8
        lea     user(%rip), %rsi
        mov     $P_CODE, %edi
        mov     $user_end - user, %ecx
        rep movsb

        mov     $IDT, %edi
        lea     stubs(%rip), %rax
        mov     $0x81, %ecx
1:      mov     %ax, (%rdi)
        movl    $0x8e000000 + KCODE, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        movw    $0x10, 6(%rdi)                  # all lies between 0x100000 and 0x10ffff
        add     $16, %rdi
        add     $16, %rax
        loop    1b
        movw    $0xee00, IDT + 16 * 0x80 + 4    # the user may call it
        lidt    idtr(%rip)
        movq    $RING0, TSS + 4
        movw    $104, TSS + 102
        lgdt    gdtr(%rip)
        mov     $TR, %eax
        ltr     %ax
        mov     $KDATA, %eax
        mov     %eax, %ss
        mov     $PML4, %eax
        mov     %rax, %cr3
        mov     %cr0, %rax
        or      $0x10022, %eax                  # WP, NE, MP
        and     $~0xc, %eax                     # not EM, not TS
        mov     %rax, %cr0
        mov     %cr4, %rax
        or      $0x600, %eax                    # OSFXSR, OSXMMEXCPT
        mov     %rax, %cr4
        mov     $0xc0000080, %ecx               # EFER.SCE
        rdmsr
        or      $1, %eax
        wrmsr
        inc     %ecx                            # STAR
        xor     %eax, %eax
        mov     $(UDATA - 8) << 16 | KCODE, %edx
        wrmsr
        inc     %ecx                            # LSTAR
        lea     entry(%rip), %eax
        xor     %edx, %edx
        wrmsr
        mov     $0xc0000084, %ecx               # SFMASK: IF
        mov     $0x200, %eax
        wrmsr

        mov     FIRST, %ebx
next:   cmp     LAST, %ebx
        jae     done
        mov     %rbx, NOW
        mov     $NONE, %r12
        mov     $STACK, %esp
        mov     checks(,%rbx,8), %rax
        jmp     *%rax
good:   movb    $1, OUTCOMES(%rbx)
bad:    inc     %ebx
        jmp     next
done:   mov     $0x501, %edx                    # QEMU's isa-debug-exit
        xor     %eax, %eax
        out     %al, (%dx)
        hlt

        .balign 8
idtr:   .word   0x81 * 16 - 1
        .quad   IDT
gdtr:   .word   gdt_end - gdt - 1
        .quad   gdt
        .balign 8
gdt:    .quad   0, 0
        .quad   0x00af9b000000ffff              # 10: the kernel's code
        .quad   0x00cf93000000ffff
        .quad   0
        .quad   0x00cff3000000ffff              # 28: the user's data
        .quad   0x00affb000000ffff
        .quad   0x0000890000000067 | (TSS & 0xffffff) << 16
        .quad   0
gdt_end:

        .balign 16
stubs:
        .set    vector, 0
        .rept   0x81
        .balign 16
        .if     vector != 8 && (vector < 10 || vector > 14) && vector != 17
        push    $0
        .endif
        push    $vector
        jmp     trap
        .set    vector, vector + 1
        .endr
trap:   pop     %r8                             # vector
        pop     %r9                             # error code
        cmp     %r8, %r12
        jne     bad
        mov     $NONE, %r12
        jmp     *%r13                           # the frame is on the stack: RIP, CS, RFLAGS, RSP, SS

entry:  cmp     $SYSCALL, %r12                  # where R13 says, with all as it came
        jne     bad
        jmp     *%r13

        .macro  await   vector, place
        mov     $\vector, %r12d
        lea     \place(%rip), %r13
        .endm
        .macro  expect  value, where, size=q    # or the check has failed
        cmp\size    \value, \where
        jne     bad
        .endm
        .macro  to_user place
        pushq   $UDATA
        pushq   $U_DATA + 0x1000
        pushq   $2
        pushq   $UCODE
        pushq   $U_CODE + \place - user
        iretq
        .endm

        .balign 8
checks: .quad   paging, absent, protected, invalidated, string, arithmetic, sse, fences, breakpoint, divided, undefined
        .quad   refused, bases, counter, to_user_and_back, user_runs, user_kept_out, user_privileged
        .quad   system_call, system_return, interrupt, counter_set
checks_end:

paging: mov     $0x12345678, %eax               # the same page by two addresses
        mov     %eax, P_DATA + 8
        expect  %eax, U_DATA+8, l
        jmp     good

absent: await   14, 1f
2:      mov     U_HOLE + 4, %eax
        jmp     bad
1:      expect  $0, %r9
        mov     %cr2, %rax
        expect  $U_HOLE+4, %rax
        lea     2b(%rip), %rax
        expect  %rax, (%rsp)
        jmp     good

protected:
        await   14, 1f
        mov     %eax, U_CODE
        jmp     bad
1:      expect  $3, %r9
        jmp     good

invalidated:
        movq    $P_DATA + 7, PT + 24
        movl    $1, P_DATA
        movl    $2, P_OTHER
        mov     U_HOLE + 0x1000, %eax           # now it is cached
        movq    $P_OTHER + 7, PT + 24
        invlpg  U_HOLE + 0x1000
        mov     U_HOLE + 0x1000, %ecx
        movq    $0, PT + 24
        invlpg  U_HOLE + 0x1000
        expect  $1, %eax, l
        expect  $2, %ecx, l
        jmp     good

string: mov     $P_OTHER, %edi
        mov     $0x5a, %al
        mov     $40, %ecx
        rep stosb
        mov     $P_OTHER, %esi
        mov     $P_OTHER + 100, %edi
        mov     $5, %ecx
        rep movsq
        expect  $P_OTHER+140, %edi, l
        expect  $0x5a, P_OTHER+139, b
        jmp     good

arithmetic:
        mov     $0x8000000000000001, %rax
        xor     %edx, %edx
        mov     $3, %ecx
        mul     %rcx
        expect  $1, %rdx
        cmp     $0, %rax
        jge     bad
        div     %rcx
        mov     $0x8000000000000001, %rcx
        expect  %rcx, %rax
        popcnt  %rax, %rax
        expect  $2, %eax, l
        lea     P_OTHER + 0x100, %esi           # 16 bytes, aligned
        xor     %eax, %eax
        xor     %edx, %edx
        mov     %rax, (%rsi)
        mov     %rax, 8(%rsi)
        push    %rbx
        mov     $7, %ebx
        mov     $9, %ecx
        lock cmpxchg16b (%rsi)
        pop     %rbx
        jnz     bad
        expect  $9, 8(%rsi)
        jmp     good

sse:    mov     $0x0123456789abcdef, %rax
        movq    %rax, %xmm9
        fninit
        fld1
        fxsave64 P_OTHER + 0x200
        pxor    %xmm9, %xmm9
        fninit
        fxrstor64 P_OTHER + 0x200
        movq    %xmm9, %rcx
        expect  %rax, %rcx
        fstpl   P_OTHER + 0x100
        fwait
        mov     $0x3ff0000000000000, %rax
        expect  %rax, P_OTHER+0x100
        jmp     good

fences: mfence
        lfence
        pause
        mov     $1, %eax
        lock xadd %eax, P_OTHER
        mov     %cr3, %rax
        mov     %rax, %cr3
        wbinvd
        clts
        jmp     good

breakpoint:
        await   3, 1f
        int3
1:      lea     1b(%rip), %rax
        expect  %rax, (%rsp)
        expect  $KCODE, 8(%rsp)
        jmp     good

divided:
        await   0, 1f
        xor     %ecx, %ecx
        div     %ecx
1:      jmp     good

undefined:
        await   6, 1f
        ud2
1:      jmp     good

refused:
        await   13, 1f                          # what Linux tries the MSRs of a processor with
        mov     $0x12345678, %ecx
        rdmsr
        jmp     bad
1:      expect  $0, %r9
        jmp     good

bases:  mov     $0xc0000101, %ecx               # GS.base, and the one SWAPGS has
        xor     %edx, %edx
        mov     $P_OTHER, %eax
        wrmsr
        inc     %ecx
        mov     $P_DATA, %eax
        wrmsr
        movl    $77, P_DATA + 16
        swapgs
        mov     %gs:16, %eax
        swapgs
        expect  $77, %eax, l
        dec     %ecx
        rdmsr
        expect  $P_OTHER, %eax, l
        jmp     good

counter:
        rdtsc
        shl     $32, %rdx
        or      %rax, %rdx
        mov     %rdx, %rsi
        mov     $20, %ecx
1:      loop    1b
        rdtsc
        shl     $32, %rdx
        or      %rax, %rdx
        cmp     %rsi, %rdx
        jbe     bad
        jmp     good

to_user_and_back:
        await   0x80, 1f
        to_user u_int
1:      expect  $U_CODE+u_int+2-user, (%rsp)
        expect  $UCODE, 8(%rsp)
        expect  $U_DATA+0x1000, 24(%rsp)
        expect  $RING0-40, %rsp
        jmp     good

user_runs:
        await   0x80, 1f
        to_user u_sum
1:      expect  $55, %eax, l
        jmp     good

user_kept_out:
        await   14, 1f
        to_user u_hole
1:      expect  $5, %r9
        jmp     good

user_privileged:
        await   13, 1f
        to_user u_priv
1:      jmp     good

system_call:
        await   SYSCALL, 1f
        to_user u_call
1:      expect  $U_CODE+u_back-user, %rcx
        mov     %cs, %eax
        expect  $KCODE, %eax, l
        jmp     good

system_return:
        await   0x80, 1f
        mov     $U_CODE + u_int - user, %ecx
        mov     $2, %r11d
        mov     $U_DATA + 0x1000, %esp
        sysretq
1:      expect  $UCODE, 8(%rsp)
        expect  $UDATA, 32(%rsp)
        jmp     good

interrupt:                                      # of the timer, out of HLT
        mov     $0x11, %al
        out     %al, $0x20
        mov     $0x20, %al
        out     %al, $0x21
        mov     $4, %al
        out     %al, $0x21
        mov     $1, %al
        out     %al, $0x21
        mov     $0xfe, %al
        out     %al, $0x21
        mov     $0x30, %al                      # counter 0: once, in 1,000 of 1,193,182 to the second
        out     %al, $0x43
        mov     $1000 & 0xff, %al
        out     %al, $0x40
        mov     $1000 >> 8, %al
        out     %al, $0x40
        await   0x20, 1f
        sti
2:      hlt
        jmp     2b
1:      mov     $0x20, %al
        out     %al, $0x20
        expect  $KCODE, 8(%rsp)
        jmp     good

counter_set:
        mov     $0x10, %ecx                     # IA32_TIME_STAMP_COUNTER: far from what it was, but not by chance
        xor     %eax, %eax
        mov     $0x40000, %edx
        wrmsr
        rdtsc
        sub     $0x40000, %edx
        cmp     $0x100, %edx                    # 2^40 of its counts: five minutes at least
        jae     bad
        jmp     good

user:                                           # copied into the user's page
u_int:  int     $0x80
u_call: syscall
u_back: int     $0x80
u_hole: mov     0x100000, %eax
u_priv: hlt
u_sum:  mov     $10, %ecx
        xor     %edx, %edx
1:      add     %rcx, %rdx
        mov     %rdx, U_DATA
        loop    1b
        mov     U_DATA, %rax
        int     $0x80
user_end:
