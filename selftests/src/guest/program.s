# SPDX-License-Identifier: GPL-2.0
#
# The guest program: an interpreter of one-word commands in long mode.
#
# Position-independent, no data of its own, no exceptions expected (one ends the VM). The host puts
# a command into the mailbox and enters; the guest obeys and leaves by OUT. A fault in the middle of
# a command leaves by its own exit and the command goes on at the next entry.
#
# r15 = mailbox of this vCPU, rsp = its stack. Offsets in the mailbox, in bytes:
#   0x00 command   0x08 + 8n argument n (0..7)   0x80 + 8n result n (0..5)
#   0xc0 stop, set by the host   0xc8 rounds done   0xd0 rounds discarded
#
# Numeric labels avoid the digits 0 and 1, which Intel syntax would read as binary numbers.

        .pushsection .rodata.memfile_guest, "a", @progbits
        .balign 16
        .globl memfile_guest_start
memfile_guest_start:
.Lnext:
        mov     edx, 0x6d66             # "mf", the port that means: done, or ready at first
        xor     eax, eax
        out     dx, al
        mov     rax, [r15]
        mov     rdi, [r15 + 0x08]
        mov     rsi, [r15 + 0x10]
        cmp     rax, 2
        je      .Lfill
        cmp     rax, 3
        je      .Lverify
        cmp     rax, 4
        je      .Lload
        cmp     rax, 5
        je      .Lstore
        cmp     rax, 6
        je      .Lexecute
        cmp     rax, 7
        je      .Lhypercall
        cmp     rax, 8
        je      .Lwatch
        cmp     rax, 9
        je      .Lstress
        cmp     rax, 10
        je      .Loutput
        cmp     rax, 11
        je      .Linput
        cmp     rax, 12
        je      .Lcopy
        cmp     rax, 13
        je      .Lcount
        cmp     rax, 14
        je      .Ltouch
        cmp     rax, 15
        je      .Lvmrun
        cmp     rax, 16
        je      .Lclock
        cmp     rax, 17
        je      .Lsegment
        cmp     rax, 18
        je      .Lcallfar
        ud2                             # unknown command

# KVM emulates the instruction behind this if its parameter force_emulation_prefix is set.
        .macro  emulated
        ud2
        .byte   0x6b, 0x76, 0x6d
        .endm

# Write an arithmetic sequence: start, end, stride, first word, difference.
.Lfill:
        mov     rcx, [r15 + 0x18]
        mov     rax, [r15 + 0x20]
        mov     rdx, [r15 + 0x28]
        cmp     rdi, rsi
        jae     .Lnext
2:      mov     [rdi], rax
        add     rax, rdx
        add     rdi, rcx
        cmp     rdi, rsi
        jb      2b
        jmp     .Lnext

# Compare with an arithmetic sequence: start, end, stride, first word, difference.
# Results: first wrong address, the word there, the word wanted, how many are wrong.
.Lverify:
        mov     rcx, [r15 + 0x18]
        mov     rax, [r15 + 0x20]
        mov     rdx, [r15 + 0x28]
        xor     r8d, r8d
        cmp     rdi, rsi
        jae     5f
2:      mov     rbx, [rdi]
        cmp     rbx, rax
        jne     3f
4:      add     rax, rdx
        add     rdi, rcx
        cmp     rdi, rsi
        jb      2b
5:      mov     [r15 + 0x98], r8
        jmp     .Lnext
3:      test    r8, r8
        jnz     6f
        mov     [r15 + 0x80], rdi
        mov     [r15 + 0x88], rbx
        mov     [r15 + 0x90], rax
6:      inc     r8
        jmp     4b

# Load the word at an address. Result: the word.
.Lload:
        mov     rax, [rdi]
        mov     [r15 + 0x80], rax
        jmp     .Lnext

# Store a word: address, word.
.Lstore:
        mov     [rdi], rsi
        jmp     .Lnext

# Copy code and call it: to, from, bytes (0 to call what is there), argument.
# Results: what it returned, and where it said it runs.
.Lexecute:
        mov     rcx, [r15 + 0x18]
        mov     rbx, rdi
        rep     movsb
        mov     rdi, [r15 + 0x20]
        call    rbx
        mov     [r15 + 0x80], rax
        mov     [r15 + 0x88], rdx
        jmp     .Lnext

# Hypercall: number, three arguments, 1 on AMD. Result: what came back.
.Lhypercall:
        mov     rax, rdi
        mov     rbx, rsi
        mov     rcx, [r15 + 0x18]
        mov     rdx, [r15 + 0x20]
        cmp     qword ptr [r15 + 0x28], 0
        je      2f
        vmmcall
        jmp     3f
2:      vmcall
3:      mov     [r15 + 0x80], rax
        jmp     .Lnext

# Touch a word in each stride until told to stop: start, end, stride, 1 to write it back as well.
# Result, after each round: the words of that round, ORed.
.Lwatch:
        mov     rcx, [r15 + 0x18]
        mov     rdx, [r15 + 0x20]
2:      mov     rdi, [r15 + 0x08]
        xor     ebx, ebx
3:      cmp     qword ptr [r15 + 0xc0], 0
        jne     .Lnext
        mov     rax, [rdi]
        or      rbx, rax
        test    rdx, rdx
        jz      4f
        lock add qword ptr [rdi], 0
4:      add     rdi, rcx
        cmp     rdi, rsi
        jb      3b
        mov     [r15 + 0x80], rbx
        inc     qword ptr [r15 + 0xc8]
        jmp     2b

# Check random words of random pages against a table that others change, until told to stop or
# wrong: base address, number of pages, table, seed, offset of our own word in a page, notes.
#
# Table, 32 bytes a page: epoch, first word, difference. An odd epoch means that the page is being
# changed. If the epoch is the same even number before and after the load, the content was that of
# the table all the while, so the loaded word must be it.
# Notes, 16 bytes a page: the epoch in which we wrote our own word, and its value. In the same epoch
# it must still be there.
# Results: 0 = told to stop, 1 = wrong word, 2 = own word lost; address; got; wanted; epoch.
.Lstress:
        mov     rbp, rdi
        mov     r12, rsi
        mov     r13, [r15 + 0x18]
        mov     r9,  [r15 + 0x20]
        mov     r14, [r15 + 0x28]
        mov     r11, [r15 + 0x30]
2:      cmp     qword ptr [r15 + 0xc0], 0
        jne     8f
        mov     rax, r9                 # xorshift64
        shl     rax, 13
        xor     r9, rax
        mov     rax, r9
        shr     rax, 7
        xor     r9, rax
        mov     rax, r9
        shl     rax, 17
        xor     r9, rax
        mov     rax, r9
        mul     r12                     # rdx = page number
        mov     rsi, rdx
        shl     rsi, 5
        add     rsi, r13                # rsi = table entry
        mov     rdi, rdx
        shl     rdi, 12
        add     rdi, rbp                # rdi = page
        mov     r10, rdx
        shl     r10, 4
        add     r10, r11                # r10 = note
        mov     r8, [rsi]
        test    r8, 1
        jnz     3f
        mov     ecx, r9d
        imul    rcx, rcx, 448           # words of a page that are not somebody's own
        shr     rcx, 32
        mov     rbx, [rdi + rcx * 8]
        mov     rax, [rsi + 16]
        imul    rax, rcx
        add     rax, [rsi + 8]
        mov     rdx, [rdi + r14]
        cmp     [rsi], r8
        jne     3f
        cmp     rbx, rax
        jne     5f
        cmp     [r10], r8
        jne     4f
        cmp     [r10 + 8], rdx
        jne     6f
4:      mov     qword ptr [r10], -1
        mov     [rdi + r14], r9
        cmp     [rsi], r8
        jne     3f
        mov     [r10 + 8], r9
        mov     [r10], r8
        inc     qword ptr [r15 + 0xc8]
        jmp     2b
3:      inc     qword ptr [r15 + 0xd0]
        jmp     2b
5:      lea     rdi, [rdi + rcx * 8]
        mov     ecx, 1
        jmp     7f
6:      mov     rax, [r10 + 8]
        mov     rbx, rdx
        add     rdi, r14
        mov     ecx, 2
7:      mov     [r15 + 0x88], rdi
        mov     [r15 + 0x90], rbx
        mov     [r15 + 0x98], rax
        mov     [r15 + 0xa0], r8
        mov     [r15 + 0x80], rcx
        jmp     .Lnext
8:      mov     qword ptr [r15 + 0x80], 0
        jmp     .Lnext

# Send half words to a port, as a string: address, half words, port.
.Loutput:
        mov     rcx, rsi
        mov     rsi, rdi
        mov     rdx, [r15 + 0x18]
        rep     outsd
        jmp     .Lnext

# Receive half words from a port, as a string: address, half words, port.
.Linput:
        mov     rcx, rsi
        mov     rdx, [r15 + 0x18]
        rep     insd
        jmp     .Lnext

# Copy words one by one: to, from, words.
.Lcopy:
        mov     rcx, [r15 + 0x18]
        rep     movsq
        jmp     .Lnext

# Count a word up by compare and exchange: address, rounds, 1 to have the exchange emulated.
# Result: how often the word had changed meanwhile.
.Lcount:
        mov     rcx, [r15 + 0x18]
        xor     r8d, r8d
2:      mov     rax, [rdi]
3:      lea     rbx, [rax + 1]
        test    rcx, rcx
        jz      4f
        emulated
        lock cmpxchg [rdi], rbx
        jmp     5f
4:      lock cmpxchg [rdi], rbx
5:      jz      6f
        inc     r8
        jmp     3b
6:      inc     qword ptr [r15 + 0xc8]
        dec     rsi
        jnz     2b
        mov     [r15 + 0x80], r8
        jmp     .Lnext

# Let KVM load a word or, if the second argument is 1, store one: address, store, word.
# Result: the word.
.Ltouch:
        mov     rax, [r15 + 0x18]
        test    rsi, rsi
        jz      2f
        emulated
        mov     [rdi], rax
        jmp     3f
2:      emulated
        mov     rax, [rdi]
3:      mov     [r15 + 0x80], rax
        jmp     .Lnext

# Run a guest of our own, on AMD: address of its VMCB.
.Lvmrun:
        mov     rax, rdi
        .byte   0x0f, 0x01, 0xd8        # vmrun rax
        jmp     .Lnext

# Read a clock of KVM's, again if KVM writes it meanwhile: address.
# Results: its version, and the three words behind the first.
.Lclock:
        mov     eax, [rdi]
        test    eax, 1
        jnz     .Lclock
        mov     rbx, [rdi + 8]
        mov     rcx, [rdi + 16]
        mov     rdx, [rdi + 24]
        cmp     eax, [rdi]
        jne     .Lclock
        mov     [r15 + 0x80], rax
        mov     [r15 + 0x88], rbx
        mov     [r15 + 0x90], rcx
        mov     [r15 + 0x98], rdx
        jmp     .Lnext

# Take a table of 32 descriptors: address in rdi.
        .macro  take_descriptors
        sub     rsp, 16
        mov     word ptr [rsp], 32 * 8 - 1
        mov     [rsp + 2], rdi
        lgdt    [rsp]
        add     rsp, 16
        .endm

# Let KVM look up the descriptor of a data segment: table, selector.
.Lsegment:
        take_descriptors
        emulated
        mov     ds, esi
        jmp     .Lnext

# Let KVM do a far call, which pushes twice: table, stack, address of the offset and the selector.
.Lcallfar:
        mov     rax, [r15 + 0x18]
        take_descriptors
        mov     rsp, rsi
        emulated
        .byte   0xff, 0x18              # call fword ptr [rax]
        jmp     .Lnext
        .globl memfile_guest_end
memfile_guest_end:

# A function to run from private memory: returns its argument xor a constant, and its address.
        .balign 16
        .globl memfile_payload_start
memfile_payload_start:
        lea     rdx, [rip + memfile_payload_start]
        movabs  rax, 0x6d656d66696c6521
        xor     rax, rdi
        ret
        .globl memfile_payload_end
memfile_payload_end:
        .popsection
