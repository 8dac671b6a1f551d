// SPDX-License-Identifier: GPL-2.0
/*
 * The kernel's memfd_test, for its hugetlbfs mode: without the parts about F_SEAL_EXEC.
 * hugetlbfs lets a file's mode be changed in spite of that seal, so they end the program
 * on every kernel, and what comes after them would never run.
 *
 * A call has no argument, the definition has "void": that tells one from the other.
 */
#include <stdio.h>

#define test_exec_seal(...)		exec_seal_##__VA_ARGS__
#define exec_seal_void			unused_exec_seal(void)
#define exec_seal_			printf("without SEAL-EXEC\n")

#define test_noexec_seal(...)		noexec_seal_##__VA_ARGS__
#define noexec_seal_void		unused_noexec_seal(void)
#define noexec_seal_			printf("without MFD_NOEXEC_SEAL\n")

#define pid_ns_supported(...)		pid_ns_##__VA_ARGS__
#define pid_ns_void			unused_pid_ns(void)
#define pid_ns_				0

#include "memfd_test.c"
