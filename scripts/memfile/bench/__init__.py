# SPDX-License-Identifier: GPL-2.0
"""For scripts/bench: what it counts, judges and prints."""
