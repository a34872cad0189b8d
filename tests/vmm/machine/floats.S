# A Linux program that keeps known values in x87 and SSE registers for ever, and prints a sum over them.
#
#   "sum XXXXXXXXXXXXXXXX"   each line follows from the one before; a register lost or changed shows in all that follow
#
# Between two lines every value lives in registers only: ST0..ST6, XMM1..XMM15, MXCSR and the x87 control word.
        .globl  _start
_start:
        fninit                          # constants first: Unicorn's do not heed the control word's rounding
        fldpi
        fldl2e
        fldl2t
        fldlg2
        fldln2
        fld1
        fldt    odd(%rip)
        fldcw   control(%rip)
        ldmxcsr rounding(%rip)
        mov     $0x9e3779b97f4a7c15, %rax
        .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        mov     $0x12345678 + \n, %edx
        imul    %rdx, %rax
        movq    %rax, %xmm\n
        movddup %xmm\n, %xmm\n
        .endr
        xor     %ebp, %ebp              # the sum
        mov     $1000, %r12d            # turns until a line is due
        mov     %r12, %r13

again:  # each turn changes every register by the others, and the sum by all of them
        .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14
        paddq   %xmm15, %xmm\n
        pxor    %xmm\n, %xmm15
        .endr
        movq    %xmm15, %rax
        xor     %rax, %rbp
        rol     $7, %rbp
        psrlq   $1, %xmm15
        pxor    %xmm1, %xmm15
        cvtsi2sd %rbp, %xmm0            # rounds as MXCSR says
        movq    %xmm0, %rax
        add     %rax, %rbp
        fld     %st(6)                  # the x87 stack turns round: the deepest value comes up, scaled by one below
        fmul    %st(2), %st
        fdiv    %st(1), %st
        fstpt   scratch(%rip)
        add     scratch(%rip), %rbp
        rol     $11, %rbp
        add     scratch+8(%rip), %bp
        fxch    %st(3)
        fxch    %st(5)
        fnstcw  scratch(%rip)
        add     scratch(%rip), %bp
        stmxcsr scratch(%rip)
        mov     scratch(%rip), %eax
        and     $~0x3f, %eax            # the exception flags are left out: Unicorn's SSE does not raise them
        add     %rax, %rbp
        dec     %r13
        jnz     again
        mov     %r12, %r13

        mov     %rbp, %rax
        lea     digits_end(%rip), %rdi
        mov     $16, %ecx
1:      mov     %eax, %edx
        and     $15, %edx
        cmp     $10, %edx
        jb      2f
        add     $'a' - '0' - 10, %edx
2:      add     $'0', %edx
        dec     %rdi
        mov     %dl, (%rdi)
        shr     $4, %rax
        dec     %ecx
        jnz     1b
        mov     $1, %eax                # write(1, line, size)
        mov     $1, %edi
        lea     line(%rip), %rsi
        mov     $line_end - line, %edx
        syscall
        jmp     again

        .data
control:  .word  0x0f7f                 # all exceptions masked, extended precision, round towards zero
rounding: .long  0x5f80                 # all masked, round up
odd:      .quad  0xc90fdaa22168c235     # some value whose last bits matter
          .word  0x3ffd
          .balign 16
scratch:  .quad  0, 0
line:     .ascii "sum "
          .space 16
digits_end:
          .ascii "\n"
line_end:
