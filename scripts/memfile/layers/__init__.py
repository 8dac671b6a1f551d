# SPDX-License-Identifier: GPL-2.0
"""For scripts/check-layers: reads as much of Rust as it takes to see which file uses which."""
