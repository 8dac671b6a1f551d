# SPDX-License-Identifier: GPL-2.0
#
# The targets for people; kbuild reads Kbuild only. Everything is built in the cache,
# nothing in the checkout; "Cache" in README.md says where that is.

KERNEL ?= plain
export BASE KERNEL_SRC RUSTC LLVM BINDGEN QEMU QEMU_SRC MEMFILE_CACHE KDIR
# An empty variable in the environment would hide a script's default.
$(foreach v,BASE KERNEL_SRC RUSTC LLVM BINDGEN QEMU QEMU_SRC MEMFILE_CACHE KDIR,$(if $($v),,$(eval unexport $v)))

SHELL := /bin/bash
# As the scripts are run: nothing of bash's own from the environment.
.SHELLFLAGS := -pc
.DEFAULT_GOAL := help
.PHONY: help setup lint ci docs demo demo-guest check regress guest guest-shell bench trace proof fuzz pressure mutants shell kernel module selftests clippy patches clean distclean

help:		## print this list
	@echo 'usage: make TARGET [KERNEL=plain|debug|kcsan|cfi|gcc|unprotected] [BASE=7.3|7.2] [KERNEL_SRC=DIR] [TESTS=GLOBS] [V=1]'
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: all	## print what real guests on each kind of memory cost, also under pressure; write a page
	@scripts/demo $(KERNEL)

demo-guest: all	## the same story with a real Linux in a real QEMU, on every kind of memory
	@scripts/demo --guest $(KERNEL)

# The script gets the user's text as it is, with its quotes.
guest guest-shell: export MEMFILE_GUEST_CMD = $(value CMD)
guest guest-shell: export MEMFILE_GUEST_ARGS = $(value ARGS)
guest guest-shell: export MEMFILE_GUEST_KERNEL = $(value GUEST_KERNEL)
guest guest-shell: export MEMFILE_GUEST_MEM = $(value MEM)
guest guest-shell: export MEMFILE_GUEST_TIMEOUT = $(value TIMEOUT)
guest: all	## a real Linux in a real QEMU, 32 GiB private in 2; CMD= in the guest, ARGS= of QEMU, GUEST_KERNEL=, MEM=
	@scripts/guest

guest-shell: all	## the same with a shell in the guest
	@scripts/guest --shell

# These need QEMU with the project's patches.
demo-guest check guest guest-shell: SETUP = --qemu
pressure: SETUP = --pressure

check: setup	## run every test; TESTS='punch.* upstream.*' chooses, ALL=1 all of upstream, V=1 shows the consoles
	@set -f; scripts/check --kernel $(KERNEL) $(if $(filter-out 0,$(ALL)),--all) $(if $(filter-out 0,$(V)),--verbose) -- $(TESTS)

regress: all	## run your own programs on the patched and on the unpatched kernel: PROGRAMS='DIR FILE'
	@scripts/build-kernel base
	@set -f; scripts/regress --kernel $(KERNEL) -- $(PROGRAMS)

bench: export MEMFILE_BENCH_BASELINE = $(value BASELINE)
bench: all	## count instructions, with ratios and aims; BASELINE=bench.json of another run compares with it
	@scripts/build-kernel base
	@scripts/bench $${MEMFILE_BENCH_BASELINE:+--baseline "$$MEMFILE_BENCH_BASELINE"}

trace: all	## print the life of one page, from the tracepoints of a small guest
	@scripts/trace $(KERNEL)

proof:		## test the core on the host, in depth: OPS=1000000 operations, PREEMPTIONS=4, SEED=, SANITIZER=miri|address
	@scripts/proof

fuzz: setup	## random scripts on a kernel with coverage, kept by the code they reach: TIME=600 seconds, SEED=, USER_ID=
	@scripts/fuzz --time $(or $(TIME),600) $(if $(SEED),--seed $(SEED)) $(if $(USER_ID),--user $(USER_ID))

pressure: KERNEL = debug
pressure: setup	## stress-ng and trinity beside running guests, on the debug kernel
	@scripts/check --kernel $(KERNEL) $(if $(filter-out 0,$(V)),--verbose) -- 'pressure_host.*'

mutants: setup	## put known defects back, each must be found by its tests; NAMES='hole-* seal-*'
	@set -f; scripts/mutants -- $(NAMES)

shell: all	## open a shell on the same kernel, module loaded (virtme-ng)
	@scripts/shell $(KERNEL)

setup:		## install what is missing
	@scripts/setup $(SETUP)

kernel: setup	## fetch, patch and build the kernel
	@scripts/build-kernel $(KERNEL)

module:		## build only memfile.ko, against KDIR=<a built, patched kernel>
	@scripts/build-module $(KERNEL)

selftests:	## build the guest's test programs
	@scripts/build-selftests

lint:		## check the style of scripts, Rust, patches and documents; builds no kernel
	@scripts/setup --lint
	@scripts/lint

ci:		## run everything a change must pass: lint, and check on several kernels
	@.ci/run

docs:		## make one HTML page of all documents
	@scripts/setup --lint
	@scripts/docs

clippy:		## check the module with clippy, warnings are errors
	@scripts/build-module --clippy $(KERNEL)

patches:	## write the patches of the base anew from its work tree (scripts/work-tree)
	@scripts/refresh-patches

clean:		## remove what kbuild or cargo left in the checkout
	@scripts/clean

distclean:	## also remove built kernels, sources and logs, not downloads, tools and work trees
	@scripts/clean --all

# The kernel's Rust comes first and keeps one core busy: cargo takes the other.
.PHONY: all
all: setup
	@scripts/build-selftests & programs=$$!; scripts/build-kernel $(KERNEL) & kernel=$$!; \
	stop() { kill $$programs $$kernel 2>/dev/null; wait; exit $$1; }; \
	trap 'stop 129' HUP; trap 'stop 130' INT; trap 'stop 143' TERM; \
	wait $$kernel || { rc=$$?; wait; exit $$rc; }; \
	wait $$programs && scripts/build-module $(KERNEL)
