# SPDX-License-Identifier: GPL-2.0
"""The parts of the programs in scripts/: a program has its options and the order of its work there, the rest here.

environment, paths   the variables that programs take, and where things are
ktap, reports        results: read as KTAP, written for other programs
boot/                one machine, from the kernel to its end
check/               a run of the tests; its suites.py has the tables of suites
upstream/            programs on two kernels: the kernel's own selftests, or a user's
mutants/             known defects, and the tests that find them
bench/               what is counted, judged and printed
differences/         kinds of memory, compared
docs/, layers/       proofs that the documents and the layers of the code are as they say
load, surroundings   for tests: the programs as modules, and folders and tools that do harm
"""
