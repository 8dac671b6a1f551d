# SPDX-License-Identifier: GPL-2.0
"""For scripts/mutants: known defects in the sources, disabled, and the tests that find them."""
