# What the engine calls while it runs, so that a block entry, an exception or an RDTSC costs no Python.
#
# System V AMD64 functions, position-independent: each engine has a copy of its own, and the loader (emu.native.code)
# fills the table at the end. emu.callbacks is the same in Python, for hosts where memory cannot be made executable.
# `python -m emu.native.build` assembles this file; names in capitals come from there: fields of the engine's CPU
# (ENV_*, TLB_*) and the clock's words (WORD_*).

        .text

# UC_HOOK_BLOCK(uc, address, size, words): charge the block, or refuse it when it would cross the limit.
        .globl  block
block:  mov     %edx, %eax
        add     WORD_TIME(%rcx), %rax           # time after this block
        cmp     WORD_LIMIT(%rcx), %rax
        ja      1f
        mov     %rax, WORD_TIME(%rcx)
        je      2f
        ret
1:      mov     %edx, WORD_REFUSED(%rcx)
        jmp     *emu_stop(%rip)
2:      testb   $1, WORD_STEPPING(%rcx)         # a block that ends at the limit: the next will be refused,
        jz      3f                              # and that costs less where it is one instruction long
        mov     env(%rip), %rax
        movl    $1, CPU_CFLAGS_NEXT_TB(%rax)
3:      ret

# UC_HOOK_INTR(uc, number, cpu): deliver through the guest's IDT. `other(uc, number, cpu)` is asked about what is no
# vector (intercepts, 0x100 and up), and returns nonzero when something is to be delivered.
#
# At INT n the engine has moved RIP behind the instruction, and would push that of a fault of its delivery too. So RIP
# is put back: where it goes on is kept beside it. `raise_interrupt`, below, has left the instruction's length in the
# error code, which INT n has none of; without it Python delivers.
#
# RF is on in the RFLAGS that a fault pushes (SDM vol. 3, 17.3.1.1); #DB, the one trap that comes here, is left alone.
        .globl  interrupt
interrupt:
        cmp     $0x100, %esi
        jae     2f
        mov     env(%rip), %rax
        cmpl    $0, ENV_EXCEPTION_IS_INT(%rax)
        jne     4f
        cmp     $1, %esi
        je      deliver
        orl     $RF, ENV_EFLAGS(%rax)
        testl   $HF_LMA, ENV_HFLAGS(%rax)       # in long mode the engine says where in the IDT a gate is that it
        jz      deliver                         # refuses; the error code has its number (SDM vol. 3, 6.13)
        cmp     $13, %esi
        je      1f
        cmp     $11, %esi
        jne     deliver
1:      mov     ENV_ERROR_CODE(%rax), %ecx
        mov     %ecx, %r8d
        and     $7, %r8d
        cmp     $2, %r8d
        jne     deliver
        shr     %ecx                            # from 16 n + 2 to 8 n + 2
        inc     %ecx
        mov     %ecx, ENV_ERROR_CODE(%rax)

# deliver(uc, -, cpu). The delivery may fault and leave by longjmp; the engine has then cleared exception_is_int itself.
# Left set by an INT n it makes the engine move RIP at the next intercept, so it is cleared here.
#
# A handler that cannot be fetched faults again, for ever, and no block is entered that a limit could refuse: deliveries
# at one guest time are counted.
deliver:
        mov     words(%rip), %rax
        incq    WORD_EXCEPTIONS(%rax)
        mov     WORD_TIME(%rax), %rcx
        cmp     %rcx, WORD_DELIVERED_AT(%rax)
        je      1f
        mov     %rcx, WORD_DELIVERED_AT(%rax)
        movq    $0, WORD_DELIVERIES(%rax)
1:      incq    WORD_DELIVERIES(%rax)
        cmpq    $MOST_DELIVERIES, WORD_DELIVERIES(%rax)
        ja      3f
        sub     $8, %rsp
        mov     %rdx, %rdi
        call    *do_interrupt(%rip)
        mov     env(%rip), %rax
        andl    $0, ENV_EXCEPTION_IS_INT(%rax)
        add     $8, %rsp
        ret
2:      push    %rdi
        push    %rdx
        sub     $8, %rsp
        call    *other(%rip)
        add     $8, %rsp
        pop     %rdx
        pop     %rdi
        test    %eax, %eax
        jnz     deliver
        ret
3:      jmp     *emu_stop(%rip)
4:      mov     ENV_ERROR_CODE(%rax), %ecx
        test    %ecx, %ecx
        jz      2b
        sub     %rcx, ENV_EIP(%rax)
        jmp     deliver

# UC_HOOK_INSN_INVALID(uc, cpu) -> true: deliver #UD, or INT 6, of which the engine makes no difference. RIP is still at
# the instruction.
        .globl  invalid_opcode
invalid_opcode:
        mov     env(%rip), %rax
        cmpl    $0, ENV_EXCEPTION_IS_INT(%rax)
        jne     1f
        orl     $RF, ENV_EFLAGS(%rax)
1:      mov     %rsi, %rdx
        sub     $8, %rsp
        call    deliver
        add     $8, %rsp
        mov     $1, %eax
        ret

# UC_HOOK_INSN RDTSC/RDTSCP(uc, words) -> handled: EDX:EAX = guest time in ticks + offset; RDTSCP also ECX = TSC_AUX.
# Then the time that reading it takes passes.
# With CR4.TSD at CPL > 0 it declines, and the engine raises #GP.
        .globl  rdtsc, rdtscp
rdtscp: mov     env(%rip), %rcx
        call    rdtsc
        test    %eax, %eax
        jz      1f
        mov     ENV_TSC_AUX(%rcx), %edx
        mov     %rdx, ENV_REGS + 8 * 1(%rcx)
1:      ret
rdtsc:  mov     env(%rip), %rcx
        testb   $4, ENV_CR + 8 * 4(%rcx)        # CR4.TSD
        jz      1f
        testb   $3, ENV_HFLAGS(%rcx)            # CPL
        jz      1f
        xor     %eax, %eax
        ret
1:      mov     WORD_TIME(%rsi), %rax
        mulq    WORD_TSC_SCALE(%rsi)
        shrd    $32, %rdx, %rax                 # rounded down
        add     WORD_TSC_OFFSET(%rsi), %rax
        mov     %eax, %edx
        mov     %rdx, ENV_REGS + 8 * 0(%rcx)
        shr     $32, %rax
        mov     %rax, ENV_REGS + 8 * 2(%rcx)
        addq    $RDTSC_NS, WORD_SKIPPED_NS(%rsi)
        addq    $RDTSC_NS * BYTES_PER_NS, WORD_TIME(%rsi)
        mov     $1, %eax
        ret

# uc->memory_mapping(uc, address): before a slow store goes on, let a page without code become fast.
#
# The engine keeps every store to an executable page slow for ever, code or no code; and until late in its boot all of
# Linux's data is mapped executable. The call at `store_site`, in the engine's slow store, has the virtual page in R12,
# its distance to the RAM offset in R13 and the TLB entry in RBP. Where the page holds no translated code this clears
# the entry's execute half (a fetch will fill it again), and the engine then marks the page fast itself.
        .globl  store_filter
store_filter:
        mov     store_site(%rip), %rax
        cmp     %rax, (%rsp)
        jne     5f
        lea     (%r12, %r13), %rdx
        shr     $12, %rdx                       # the page in all RAM
        mov     UC_V_L1_SHIFT(%rdi), %ecx
        mov     %rdx, %rax
        shr     %cl, %rax
        mov     UC_V_L1_SIZE(%rdi), %r8d
        dec     %r8d
        and     %r8, %rax
        mov     UC_L1_MAP(%rdi), %r8
        lea     (%r8, %rax, 8), %r8
        mov     UC_V_L2_LEVELS(%rdi), %r9d
        imul    $10, %r9d, %r9d
1:      test    %r9d, %r9d                      # while levels are left: r8 = &(*r8)[page >> shift & 0x3ff]
        jz      2f
        mov     (%r8), %r8
        test    %r8, %r8
        jz      4f
        mov     %rdx, %rax
        mov     %r9d, %ecx
        shr     %cl, %rax
        and     $0x3ff, %eax
        lea     (%r8, %rax, 8), %r8
        sub     $10, %r9d
        jmp     1b
2:      mov     (%r8), %r8                      # the leaf table
        test    %r8, %r8
        jz      4f
        and     $0x3ff, %edx
        lea     (%rdx, %rdx, 2), %rax           # 24 bytes a page
        cmpq    $0, (%r8, %rax, 8)              # first_tb
        jne     5f
4:      movq    $-1, TLB_ADDR_CODE(%rbp)
5:      jmp     *memory_mapping(%rip)

# --- Functions of the engine's that are replaced, for every engine of the process (emu.native.replaced). Those of others
# are told by what only ours have in vm_vmcb, and get the function as it was: its first instructions, then its rest.

# cpu_svm_check_intercept_param(env, type, param, ra): of the accesses that are intercepted, let pass those that need no
# look: FS.base, GS.base and KERNEL_GS_BASE = a canonical address, and CR3 = a physical address, where the PDPTEs that
# PAE loads with it need none. helper_write_crN has the value in R12.
        .globl  check_intercept
check_intercept:
        testl   $HF_GUEST, ENV_HFLAGS(%rdi)
        jz      2f
        mov     vmcb(%rip), %rax
        cmp     %rax, ENV_VM_VMCB(%rdi)
        jne     3f
        cmp     $0x13, %esi                     # SVM_EXIT_WRITE_CR3
        je      1f
        cmp     $0x7c, %esi                     # SVM_EXIT_MSR
        jne     3f
        test    %edx, %edx                      # a write
        jz      3f
        mov     ENV_REGS + 8 * 1(%rdi), %eax
        sub     $0xc0000100, %eax
        cmp     $2, %eax
        ja      3f
        mov     ENV_REGS + 8 * 2(%rdi), %eax
        sar     $15, %eax                       # bits 63 to 47: all or none
        inc     %eax
        cmp     $1, %eax
        ja      3f
        ret
1:      mov     %r12, %rax
        shr     $PHYS_BITS, %rax
        jnz     3f
        testl   $HF_LMA, ENV_HFLAGS(%rdi)
        jnz     2f
        testb   $0x20, ENV_CR + 8 * 4(%rdi)     # CR4.PAE
        jnz     3f
2:      ret
3:      jmp     *check_intercept_rest(%rip)

# helper_raise_interrupt(env, vector, length), of INT n: the length is left in the error code.
        .globl  raise_interrupt
raise_interrupt:
        mov     %edx, %r8d
        xor     %ecx, %ecx
        mov     vmcb(%rip), %rax
        cmp     %rax, ENV_VM_VMCB(%rdi)
        jne     1f
        mov     %edx, %ecx
1:      mov     $1, %edx
        jmp     *raise_interrupt_rest(%rip)

# helper_ldmxcsr(env, value): #GP(0) for reserved bits (SDM vol. 2, LDMXCSR).
        .globl  ldmxcsr
ldmxcsr:
        mov     vmcb(%rip), %rax
        cmp     %rax, ENV_VM_VMCB(%rdi)
        jne     1f
        test    $0xffff0000, %esi
        jnz     general_protection
1:      mov     %esi, ENV_MXCSR(%rdi)
        jmp     *update_mxcsr(%rip)

general_protection:
        mov     $13, %esi
        xor     %edx, %edx
        mov     (%rsp), %rcx
        jmp     *raise_exception(%rip)

# helper_fxrstor(env, address): the same, before anything is loaded.
        .globl  fxrstor
fxrstor:
        mov     vmcb(%rip), %rax
        cmp     %rax, ENV_VM_VMCB(%rdi)
        jne     1f
        testb   $2, ENV_CR + 8 * 4 + 1(%rdi)    # CR4.OSFXSR: else MXCSR is left alone
        jz      1f
        test    $15, %sil
        jnz     1f
        mov     (%rsp), %rdx
        push    %rdi
        push    %rsi
        sub     $8, %rsp
        add     $24, %rsi
        call    *load_long(%rip)
        add     $8, %rsp
        pop     %rsi
        pop     %rdi
        test    $0xffff0000, %eax
        jnz     general_protection
1:      push    %r14
        push    %r13
        push    %r12
        push    %rbp
        mov     %rdi, %rbp
        push    %rbx
        mov     0x28(%rsp), %r14
        jmp     *fxrstor_rest(%rip)

# do_fstenv(env, address, 32-bit, ra), for FSTENV and FSAVE: FCS and FDS are stored as zeros, as where they are no longer
# kept (CPUID.7:EBX bit 13). The engine stores those of the last instruction of all, which are no state.
        .globl  fstenv
fstenv: mov     vmcb(%rip), %rax
        cmp     %rax, ENV_VM_VMCB(%rdi)
        jne     1f
        movl    $0, ENV_FPCS(%rdi)
1:      push    %r15
        push    %r14
        push    %r13
        mov     %rcx, %r13
        push    %r12
        push    %rbp
        jmp     *fstenv_rest(%rip)

# helper_sysret(env, size): VM and RF of R11 are not loaded (SDM vol. 2, SYSRET). Where it raises nothing, it can be
# called; where it may, it must find the translated code's own address on the stack.
        .globl  sysret
sysret: mov     vmcb(%rip), %rax
        cmp     %rax, ENV_VM_VMCB(%rdi)
        jne     1f
        testl   $VM | RF, ENV_REGS + 8 * 11(%rdi)
        jz      1f
        testb   $1, ENV_EFER(%rdi)              # SCE
        jz      1f
        testb   $3, ENV_HFLAGS(%rdi)            # CPL
        jnz     1f
        testb   $1, ENV_CR(%rdi)                # PE
        jz      1f
        push    %rdi
        call    1f
        pop     %rdi
        andl    $~(VM | RF), ENV_EFLAGS(%rdi)
        ret
1:      push    %rbp
        mov     %rdi, %rbp
        testb   $1, ENV_EFER(%rdi)
        je      2f
        jmp     *sysret_rest(%rip)
2:      jmp     *sysret_undefined(%rip)

# helper_iret_protected(env, size, next): the flags that it will load are looked at first, for two bits.
#
# VM in long mode is #GP(0): the engine would go to virtual-8086 mode, which there is none of. And RF is to last for one
# instruction (SDM vol. 3, 17.3.1.1); the engine clears it where a block ends by other than a jump. The shadow that STI
# has makes an instruction a block of its own, which ends so.
        .globl  iret
iret:   mov     vmcb(%rip), %rax
        cmp     %rax, ENV_VM_VMCB(%rdi)
        jne     4f
        mov     ENV_REGS + 8 * 4(%rdi), %rax
        cmp     $1, %esi
        jb      4f                              # 16 bits: neither
        ja      1f
        add     $8, %rax
        jmp     2f
1:      add     $16, %rax
2:      testl   $HF_CS64, ENV_HFLAGS(%rdi)
        jnz     3f
        testl   $HF_SS32, ENV_HFLAGS(%rdi)
        mov     %eax, %ecx
        movzwl  %ax, %eax
        cmovnz  %ecx, %eax
        add     ENV_SEGS + 24 * 2 + 8(%rdi), %eax
3:      push    %rdi
        push    %rsi
        push    %rdx
        mov     24(%rsp), %rdx
        mov     %rax, %rsi
        call    *load_long(%rip)
        pop     %rdx
        pop     %rsi
        pop     %rdi
        test    $RF, %eax
        jz      5f
        orl     $HF_INHIBIT_IRQ, ENV_HFLAGS(%rdi)
5:      test    $VM, %eax
        jz      4f
        testl   $HF_LMA, ENV_HFLAGS(%rdi)
        jnz     general_protection
4:      push    %r15
        push    %r14
        push    %r13
        push    %r12
        push    %rbp
        mov     %rdi, %rbp
        push    %rbx
        jmp     *iret_rest(%rip)

# Filled by the loader.
        .balign 8
        .globl  env, words, emu_stop, do_interrupt, other, store_site, memory_mapping
env:            .quad   0                       # the engine's CPUX86State
words:          .quad   0                       # the clock's, vmm.clock.Word
emu_stop:       .quad   0                       # uc_emu_stop(uc)
do_interrupt:   .quad   0                       # x86_cpu_do_interrupt(cpu)
other:          .quad   0                       # a hook in Python
store_site:     .quad   0
memory_mapping: .quad   0                       # as it was

# Of the replaced functions.
        .globl  vmcb, check_intercept_rest, update_mxcsr, raise_exception, load_long, fxrstor_rest, sysret_rest
        .globl  sysret_undefined, iret_rest, fstenv_rest, raise_interrupt_rest
vmcb:                   .quad   0               # what our engines have in vm_vmcb
check_intercept_rest:   .quad   0
update_mxcsr:           .quad   0               # update_mxcsr_status(env)
raise_exception:        .quad   0               # raise_exception_err_ra(env, vector, error, ra)
load_long:              .quad   0               # cpu_ldl_data_ra(env, address, ra)
fxrstor_rest:           .quad   0
sysret_rest:            .quad   0
sysret_undefined:       .quad   0
iret_rest:              .quad   0
fstenv_rest:            .quad   0
raise_interrupt_rest:   .quad   0               # raise_interrupt(env, vector, 1, error code, length)
