# SPDX-License-Identifier: GPL-2.0
"""For scripts/check-layers: reads Rust as far as it takes to see who uses whom."""
