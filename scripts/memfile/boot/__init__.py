# SPDX-License-Identifier: GPL-2.0
"""For scripts/boot: the parts of a boot, from the kernel to the machine's end."""
