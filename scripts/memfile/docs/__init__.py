# SPDX-License-Identifier: GPL-2.0
"""For scripts/check-docs: what the documents and the code refer to, and whether it exists."""
