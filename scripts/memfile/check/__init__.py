# SPDX-License-Identifier: GPL-2.0
"""For scripts/check: what runs in which machine, and how it is judged.

suites       the tables of suites and variants
session      one run: what it says, and how it builds, boots and judges
builds, host, guest, comparison, controls    the parts of a run, each a list of jobs
kernel_log   what in a console is a failure
outcome, results    the exit code, and what a run leaves
"""
