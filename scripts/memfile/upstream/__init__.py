# SPDX-License-Identifier: GPL-2.0
"""The same programs on two kernels: what runs, what came of it, and what differs.

scripts/check compares the kernel's own selftests with this, scripts/regress a user's
programs.
"""
