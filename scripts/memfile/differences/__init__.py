# SPDX-License-Identifier: GPL-2.0
"""For scripts/differences: kinds of memory, compared by what the same tests saw on them."""
