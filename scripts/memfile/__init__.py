# SPDX-License-Identifier: GPL-2.0
"""What the programs in scripts/ share.

environment, paths   the variables that programs take, and where things are
ktap, reports        results: read as KTAP, written for other programs
load                 the programs as modules, for their tests
bench/               scripts/bench: counts, tables, the page
"""
