# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # used by the scripts that source it
#
# Shared by the scripts: paths, messages, tools. Sourced, never run. No other script
# names a path of the cache.

set -euo pipefail
# As everywhere: else what fails in $(...) only does so if it comes last.
shopt -s inherit_errexit

# clean_environment FILE ARGUMENT...: begins the script anew with what the file
# names of the environment, unless there is nothing else. So a child gets no
# more either, no function and no option of bash; -p has bash itself ignore them.
clean_environment() {
	local entry name patterns kept=(LC_ALL=C.UTF-8) dropped=0
	patterns=$(command sed '/^#/d; /^$/d' "$1" | command tr '\n' '|')
	while IFS= read -r -d '' entry; do
		name=${entry%%=*}
		if [ "$entry" = LC_ALL=C.UTF-8 ]; then
			continue
		elif [[ $name != @(${patterns%|}) || $entry == "$name=" ]]; then
			dropped=1
		elif [ "$name" = TMPDIR ] && { [ ! -d "$TMPDIR" ] || [ ! -w "$TMPDIR" ]; }; then
			dropped=1
		else
			kept+=("$entry")
		fi
	done < <(command env -0)
	if [ $dropped = 1 ] || [ "${LC_ALL:-}" != C.UTF-8 ]; then
		exec env -i "${kept[@]}" bash "-p${-//[!x]/}" "$0" "${@:2}"
	fi
}
clean_environment "${BASH_SOURCE[0]%/*}/environment" "$@"

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
PROG=$(basename "$0")

# default_cache SHARED: the folder for all users if this one can write there, else one
# of this user's own. memfile/environment.py decides in the same way.
default_cache() {
	local shared=$1 own=${XDG_CACHE_HOME:-}
	[[ $own == /* ]] || own=${HOME:-/nonexistent}/.cache
	if [ -w "$shared" ] || { [ ! -e "$shared" ] && [ -w "${shared%/*}" ]; }; then
		printf '%s' "$shared"
	else
		printf '%s' "$own/memfile"
	fi
}
# Absolute, because scripts change the folder.
CACHE=$(realpath -ms -- "${MEMFILE_CACHE:-$(default_cache /var/cache/memfile)}")
export MEMFILE_CACHE=$CACHE
DL=$CACHE/dl
SRC=$CACHE/src
BUILD=$CACHE/build
LOGS=$CACHE/logs
TOOLS=$CACHE/tools
VENV=$TOOLS/venv
WORK=$CACHE/work
# The guest's programs, memfile-plot and memfile-fuzz, and what cargo builds them in.
PROGRAMS=$BUILD/selftests/bin
PLOT=$BUILD/selftests/memfile-plot
FUZZER=$BUILD/fuzz/memfile-fuzz
CARGO_DIR=$BUILD/cargo

# Exit status of every script: 0 ok, 1 a test failed, 2 usage, tool or build. The help
# of a script has further ones.
say() { printf '%s\n' "$*"; }
note() { printf '%s: %s\n' "$PROG" "$*" >&2; }
die() {
	note "$*"
	exit 2
}

# The comment at the top of a script is its help text.
usage() {
	sed -n '4,/^[^#]/{/^#/!q;s/^# \{0,1\}//;p}' "$0"
}

have() { command -v "$1" >/dev/null 2>&1; }
# need PROGRAM...: each of them is there.
need() {
	local program
	for program in "$@"; do have "$program" || die "$program is missing; scripts/setup installs it"; done
}

# plain_path WHAT PATH REMEDY: refuses a path with what make, the shells that it
# starts, or QEMU take apart.
plain_path() {
	local special="[][:space:]:,;#%\$&'\"\`\\()[{}*?<>|=!]"
	[[ $2 =~ $special ]] || return 0
	die "the path of $1, \"$2\", has a \"${BASH_REMATCH[0]}\" in it, which make or QEMU takes apart: $3"
}

# plain_paths: those that everything is built from and in.
plain_paths() {
	plain_path "the checkout" "$ROOT" "move it"
	plain_path "the cache" "$CACHE" "name another with MEMFILE_CACHE"
	[ -z "${KERNEL_SRC:-}" ] || plain_path "KERNEL_SRC" "$(realpath -m -- "$KERNEL_SRC")" "move it"
	[ -z "${QEMU_SRC:-}" ] || plain_path "QEMU_SRC" "$(realpath -m -- "$QEMU_SRC")" "move it"
}

# The kernel that everything is made for: BASE, or else the one that patches/DEFAULT names. Builds
# of another base than that have its name: build/plain, but build/plain-7.2. memfile/paths.py does
# the same.
DEFAULT_BASE=$(sed '/^#/d' "$ROOT/patches/DEFAULT")
BASE=${BASE:-$DEFAULT_BASE}
PATCHES=$ROOT/patches/$BASE
if [[ ! $BASE =~ ^[0-9]+\.[0-9]+$ || ! -f $PATCHES/BASE ]]; then
	die "there are no patches for BASE=$BASE, but for: $(cd "$ROOT/patches" && echo [0-9]*)"
fi
if [ "$BASE" = "$DEFAULT_BASE" ]; then OF_BASE=''; else OF_BASE=-$BASE; fi
# The pinned source: PACKAGE VERSION KERNEL POOL SHA256 [TARBALL_SHA256]
# shellcheck source=../patches/7.3/BASE
. "$PATCHES/BASE"
BASE_TREE=$SRC/base-$KERNEL
PATCHED_TREE=$SRC/memfile-$KERNEL
SOURCE="Linux $KERNEL"
FETCH=fetch-kernel
# The files that scripts/mutants writes, and the tree that contains those of the kernel.
MUTANTS=$CACHE/mutants$OF_BASE
MUTANTS_TREE=$MUTANTS/tree

# use_qemu: from here on source and series are those of QEMU.
# Pinned: RELEASE PACKAGE VERSION POOL SHA256 DEBIAN_SHA256 MESON MESON_SHA256
use_qemu() {
	PATCHES=$ROOT/patches/qemu-10.0
	# shellcheck source=../patches/qemu-10.0/BASE
	. "$PATCHES/BASE"
	BASE_TREE=$SRC/qemu-base-$RELEASE
	PATCHED_TREE=$SRC/qemu-$RELEASE
	SOURCE="QEMU $RELEASE"
	FETCH=fetch-qemu
}

# Tools. Each is a variable with a default, so that a user can name another.
export PATH="$TOOLS/bin:$PATH"
LLVM=${LLVM:--19}
BINDGEN=${BINDGEN:-bindgen}
CLIPPY_DRIVER=${CLIPPY_DRIVER:-/usr/bin/clippy-driver}
JOBS=${JOBS:-$(nproc)}
# The kernel needs the rustc that has its library's source: Debian's, not rustup's.
RUSTC=${RUSTC:-/usr/bin/rustc}
for tool in BINDGEN CLIPPY_DRIVER RUSTC; do
	[[ ${!tool} != */* ]] || printf -v "$tool" %s "$(realpath -ms -- "${!tool}")"
done

# clang's name for this LLVM: "1" is the plain names, "-19" a suffix, "/x/" a prefix.
llvm_tool() {
	case $LLVM in
	*/) printf '%s%s' "$LLVM" "$1" ;;
	-*) printf '%s%s' "$1" "$LLVM" ;;
	*) printf '%s' "$1" ;;
	esac
}

# Variables every kernel make gets. The compiler is LLVM's, unless the kernel is one of another:
# COMPILER=() has the variables that choose it.
kernel_make_vars() {
	[ -n "${COMPILER+set}" ] || COMPILER=(LLVM="$LLVM")
	KMAKE=("${COMPILER[@]}" RUSTC="$RUSTC" BINDGEN="$BINDGEN"
		CLIPPY_DRIVER="$CLIPPY_DRIVER"
		KBUILD_BUILD_TIMESTAMP=2026-11-22 KBUILD_BUILD_USER=memfile
		KBUILD_BUILD_HOST=memfile LOCALVERSION=)
}

# Identifies the toolchain in a stamp. libclang always reads the headers for Rust.
toolchain_id() {
	need make "$RUSTC" "$(llvm_tool clang)" "$BINDGEN"
	[ "${COMPILER[0]}" != LLVM= ] || { gcc --version | sed -n 1p; ld --version | sed -n 1p; }
	"$RUSTC" -V
	"$(llvm_tool clang)" --version | sed -n 1p
	"$BINDGEN" --version
}

# The rule for the names of build trees stands in memfile/paths.py, that for a tree of links in
# memfile/mirror.py.
paths_py() { (cd "$ROOT/scripts" && exec python3 -EBm memfile.paths "$@"); }
mirror_py() { (cd "$ROOT/scripts" && exec python3 -EBm memfile.mirror "$@"); }

# flavour_name FLAVOUR [SRC]: the name of the build tree of a flavour, of the source SRC
# (default: KERNEL_SRC, or else the base; empty: neither).
flavour_name() {
	local src=${2-${KERNEL_SRC:-}}
	[ -z "$src" ] || src=$(realpath -m -- "$src")
	if [ $# = 1 ] && [ -z "$src" ]; then paths_py "$1"; else paths_py "$1" "$src"; fi
}

# module_name TREE: the name of a build tree in the name of the folder of its module.
module_name() { paths_py --module "$(realpath -ms -- "$1")"; }
module_folder() { printf '%s' "$BUILD/module-$1"; }

# plain_config: the fragments of every configuration of this base, in $fragments.
plain_config() {
	fragments=("$ROOT/configs/plain.config")
	[ ! -f "$ROOT/configs/$BASE.config" ] || fragments+=("$ROOT/configs/$BASE.config")
}

# qemu_folder FLAVOUR: where scripts/build-qemu puts a flavour, of the source QEMU_SRC if it is set.
qemu_folder() { paths_py --qemu "$1" ${QEMU_SRC:+"$(realpath -m -- "$QEMU_SRC")"}; }

# Patches in their order: series without comments and blank lines.
series() {
	[ -f "$PATCHES/series" ] || return 0
	sed 's/#.*//; s/[[:space:]]*$//; /^$/d' "$PATCHES/series"
}

# changes PATCH: what it changes, without its message: another message builds nothing anew. All of
# it if git has not written it.
changes() { if grep -q '^diff --git ' "$1"; then sed -n '/^diff --git /,$p' "$1"; else cat "$1"; fi; }

# series_id: one hash over what the patches change, in their order; "none" if there are none.
series_id() {
	local p list
	list=$(series)
	[ -n "$list" ] || { printf 'none\n'; return; }
	while read -r p; do changes "$PATCHES/$p" || return; done <<<"$list" | sha256sum | cut -d' ' -f1
}

# locks: the folder of the locks. Its first user learns here that the cache is none.
locks() {
	mkdir -p "$CACHE/locks" 2>/dev/null || true
	[ -w "$CACHE/locks" ] || die "the cache $CACHE cannot be written: name another with MEMFILE_CACHE"
	printf '%s' "$CACHE/locks"
}

# take_turn: all that uses what is built waits for the runs of other checkouts: see memfile/turn.py.
# The turn lasts until the script ends.
take_turn() {
	local fd folder
	folder=$(locks)
	[ ! -e "$folder/checkout" ] || [ -w "$folder/checkout" ] ||
		die "$folder/checkout is another user's: name another cache with MEMFILE_CACHE"
	exec {fd}<>"$folder/checkout"
	(cd "$ROOT/scripts" && exec python3 -EBm memfile.turn "$fd" "$PROG") || exit
}

# lock NAME: held until the script ends; the next one waits. Its descriptor is $LOCK.
lock() {
	local folder
	folder=$(locks)
	exec {LOCK}>"$folder/$1"
	flock -n "$LOCK" || {
		note "waiting for another run that holds the lock \"$1\""
		flock "$LOCK"
	}
}

# stop_logged CODE: for logged, whose variables these are.
stop_logged() {
	stopped=$1
	[ -z "$pid" ] || kill -- "-$pid" 2>/dev/null || true
}

# logged FILE TITLE COMMAND...: runs it with its output in FILE and a line
# about every 30 s; on failure shows the errors and the end of the file. A signal, or the
# end of the terminal, ends it with all that it has started, and this script.
logged() {
	local file=$1 title=$2 pid='' start rc=0 stopped=0
	shift 2
	mkdir -p "$(dirname "$file")"
	start=$SECONDS
	trap 'stop_logged 129' HUP
	trap 'stop_logged 130' INT
	trap 'stop_logged 143' TERM
	# A group of processes of its own.
	set -m
	"$@" >"$file" 2>&1 </dev/null &
	pid=$!
	set +m
	# The signal may have come before there was one.
	[ "$stopped" = 0 ] || stop_logged "$stopped"
	while kill -0 "$pid" 2>/dev/null; do
		# Wakes when the command ends, and at once for a trap, because it is not a command itself.
		timeout 30 tail -s 0.2 --pid="$pid" -f /dev/null &
		wait $! || true
		[ "$stopped" = 0 ] || break
		kill -0 "$pid" 2>/dev/null || break
		say "  $title: $((SECONDS - start)) s, $(wc -l <"$file") lines: $(tail -n 1 "$file" | cut -c1-80)"
	done
	wait "$pid" || rc=$?
	trap - HUP INT TERM
	[ "$stopped" = 0 ] || exit "$stopped"
	if [ "$rc" -ne 0 ]; then
		grep -nE '(error|Error|undefined|\*\*\*)' "$file" | head -n 20 >&2 || true
		tail -n 15 "$file" >&2
		note "$title failed; the whole output is in $file"
		return 2
	fi
	say "  $title: done in $((SECONDS - start)) s"
}

# Downloads go into dl of the cache, and count only with the hash that is known.
download() { curl -fsSL --retry 2 --connect-timeout 20 --speed-limit 1000 --speed-time 60 -o "$2" "$1"; }
hash_is() { [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$2" ]; }

# get URL FILE SHA256: true once FILE has that hash, from an earlier run or now.
get() {
	if [ -f "$2" ] && hash_is "$2" "$3"; then return 0; fi
	note "downloading $(basename "$2")"
	download "$1" "$2.part" || { rm -f "$2.part"; return 1; }
	if ! hash_is "$2.part" "$3"; then
		rm -f "$2.part"
		note "$(basename "$2") has not the expected SHA-256; thrown away"
		return 1
	fi
	mv "$2.part" "$2"
}

# The mirrors of this system that carry main.
mirrors() {
	have apt-get || return 0
	# shellcheck disable=SC2016 # apt's variable, not the shell's
	apt-get indextargets --format '$(REPO_URI)' 'Component: main' 'Identifier: Packages' 2>/dev/null |
		sort -u | grep -v -- '-security' || true
}
