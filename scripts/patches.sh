# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034,SC2154 # lib.sh comes before it; scripts use what it sets
#
# Shared by the scripts that put the series of patches on a tree. Sourced after lib.sh, never run.
#
# Patches are only ever applied in a scratch folder that holds the touched
# files, never in the tree itself: so a series goes in as a whole or not at
# all, and git, which here must not know of any repository around the folder,
# cannot skip files in silence.

# copy_source FROM TO [OPTION...]: a source tree without what was built in it, as a
# whole or not at all; with options of tar.
copy_source() {
	rm -rf "$2.new"
	mkdir -p "$2.new"
	tar -C "$1" --exclude='./build-*' "${@:3}" -cf - . | tar -C "$2.new" -xf -
	mv "$2.new" "$2"
}

# touched_files: what the series changes, adds or removes, one path a line.
touched_files() {
	local p
	while read -r p; do
		sed -nE 's#^(--- a|\+\+\+ b)/([^\t]*).*#\2#p; s#^rename (from|to) ##p' "$PATCHES/$p" || return
	done < <(series) | sort -u
}

# touched_ever TREE: the same, and what earlier series have touched in the tree: its .memfile-files.
touched_ever() { { touched_files; cat "$1/.memfile-files" 2>/dev/null || true; } | sort -u; }

# copy_files FROM TO: those of the files named on stdin that FROM has.
copy_files() {
	local f
	while read -r f; do
		[ -f "$1/$f" ] || continue
		mkdir -p "$2/$(dirname "$f")" && cp -p "$1/$f" "$2/$f" || return
	done
}

# apply_patch DIR PATCH [--reverse]: in a scratch folder, errors on stderr. Files that are
# not code, such as MAINTAINERS, stay as they are where their change does not fit.
apply_patch() {
	(
		unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
		export GIT_CEILING_DIRECTORIES
		GIT_CEILING_DIRECTORIES=$(dirname "$(realpath "$1")")
		cd "$1" || exit
		set -- git apply ${3:+"$3"} --whitespace=nowarn "$2"
		"$@" 2>/dev/null || "$@" --exclude=MAINTAINERS --exclude='Documentation/*'
	)
}

# apply_series DIR: the first that fails is named in $failure.
apply_series() {
	local p errors
	failure=''
	while read -r p; do
		[ -f "$PATCHES/$p" ] || die "${PATCHES#"$ROOT"/}/series names $p, which does not exist"
		errors=$(apply_patch "$1" "$PATCHES/$p" 2>&1) || { failure=$(explain "$p" "$errors"); return 1; }
	done < <(series)
}

# reverse_series DIR: the last patch first.
reverse_series() {
	local p errors
	failure=''
	while read -r p; do
		errors=$(apply_patch "$1" "$PATCHES/$p" --reverse 2>&1) || { failure=$(explain "$p" "$errors"); return 1; }
	done < <(series | tac)
}

# explain PATCH ERRORS: one sentence with the patch and the file.
explain() {
	local file
	file=$(sed -nE 's/^error: (patch failed: )?([^:]+).*/\2/p' <<<"$2" | head -n 1)
	printf '%s does not fit %s (%s)' "$1" "${file:-the tree}" "$(head -n 1 <<<"$2")"
}

# put_files FROM TO: makes the files named on stdin in TO what they are in
# FROM, by rename and only where they differ, so that make sees real changes.
put_files() {
	local f
	while read -r f; do
		if [ ! -f "$1/$f" ]; then
			rm -f "$2/$f" || return
		elif ! cmp -s "$1/$f" "$2/$f"; then
			# The name of the copy may be there, as a link.
			mkdir -p "$2/$(dirname "$f")" && cp --remove-destination "$1/$f" "$2/$f.memfile-new" &&
				mv "$2/$f.memfile-new" "$2/$f" || return
		fi
	done
}

# patched_tree: makes or renews the patched copy of the pristine source.
# .memfile-files lists what earlier series touched, so that it can go back.
# In a subshell, so that the lock is held no longer than that.
patched_tree() (
	base=$("$ROOT/scripts/$FETCH")
	lock source
	if [ -d "$PATCHED_TREE/.git" ]; then
		"$ROOT/scripts/apply-patches" --check "$PATCHED_TREE" | grep -q 'already applied$' ||
			die "the work tree $PATCHED_TREE differs from ${PATCHES#"$ROOT"/}; run scripts/refresh-patches on it, or build it as a tree of your own"
		exit 0
	fi
	scratch=$(mktemp -d)
	trap 'rm -rf "$scratch"' EXIT
	union=$scratch/union
	touched_ever "$PATCHED_TREE" >"$union"
	mkdir "$scratch/tree"
	copy_files "$base" "$scratch/tree" <"$union"
	apply_series "$scratch/tree" || die "$failure; ${PATCHES#"$ROOT"/} is not made for $base"
	[ -d "$PATCHED_TREE" ] || copy_source "$base" "$PATCHED_TREE"
	cp "$union" "$PATCHED_TREE/.memfile-files"
	put_files "$scratch/tree" "$PATCHED_TREE" <"$union"
	touched_files >"$PATCHED_TREE/.memfile-files"
)

# own_tree: prints the path of KERNEL_SRC, if that is a kernel.
own_tree() {
	local own file
	own=$(realpath -e -- "$KERNEL_SRC" 2>/dev/null) || die "KERNEL_SRC=$KERNEL_SRC does not exist"
	for file in Kbuild Makefile mm/shmem.c; do
		[ -f "$own/$file" ] || die "KERNEL_SRC=$KERNEL_SRC is not a source tree of the kernel: it has no $file"
	done
	printf '%s\n' "$own"
}

# refuse_other_series OWN RECORD: users_tree has recorded the series that it has put on the tree, and
# what the files of the patches were then. Where one still is that, and the series is another now,
# the old patches are in the way.
refuse_other_series() {
	local still
	[ -f "$2" ] && [ "$(sed -n 1p "$2")" != "$(series_id)" ] || return 0
	still=$(cd "$1" && sed 1d "$2" | { sha256sum -c 2>/dev/null || true; } | sed -n '/: OK$/p')
	[ -n "$still" ] || return 0
	! "$ROOT/scripts/apply-patches" --check "$1" 2>/dev/null | grep 'already applied$' >/dev/null || return 0
	die "KERNEL_SRC=$KERNEL_SRC has the patches of another series: take them off with scripts/apply-patches --reverse $1 of the checkout or the BASE that has put them on"
}

# sums DIR: of the files that the series touches, where they are there.
sums() { touched_files | (cd "$1" && while read -r f; do [ ! -f "$f" ] || sha256sum "$f" || exit; done) | sort; }

# Where the result of what prints a path is tested, bash goes on after a failure: hence the exits.

# users_tree: prints the path of KERNEL_SRC, and puts the patches on it.
users_tree() (
	own=$(own_tree) || exit 2
	record=$SRC/$(flavour_name unpatched).patches || exit 2
	lock users-tree
	refuse_other_series "$own" "$record"
	before=$(sums "$own") || exit 2
	"$ROOT/scripts/apply-patches" "$own" >&2 || exit 2
	after=$(sums "$own") || exit 2
	if [ "$before" != "$after" ]; then
		mkdir -p "$SRC"
		{ series_id; comm -13 <(printf '%s\n' "$before") <(printf '%s\n' "$after"); } >"$record" || exit 2
	fi
	printf '%s\n' "$own"
)

# unpatched_tree: prints the path of what KERNEL_SRC is without the patches: links to its files,
# and copies of those that the patches touch. It is changed in place, because another build may
# be reading it.
unpatched_tree() (
	own=$(own_tree) || exit 2
	to=$SRC/$(flavour_name unpatched) || exit 2
	lock users-tree
	refuse_other_series "$own" "$to.patches"
	scratch=$(mktemp -d) || exit 2
	trap 'rm -rf "$scratch"' EXIT
	mkdir -p "$scratch/tree" "$to" || exit 2
	touched_files >"$scratch/list" || exit 2
	{ printf 'Kbuild\nMakefile\nmm/shmem.c\n'; cat "$scratch/list"; } | copy_files "$own" "$scratch/tree" || exit 2
	errors=$("$ROOT/scripts/apply-patches" --reverse "$scratch/tree" 2>&1) || {
		errors=${errors//"$scratch/tree"/$own}
		die "the patches cannot be taken off KERNEL_SRC=$KERNEL_SRC: ${errors#apply-patches: }"
	}
	mirror_py "$own" "$to" <"$scratch/list" || die "there is no tree without the patches of KERNEL_SRC=$KERNEL_SRC"
	put_files "$scratch/tree" "$to" <"$scratch/list" || exit 2
	printf '%s\n' "$to"
)

# git_tree [--without-patches] DIR [PATHSPEC...]: makes DIR, which holds base files, a
# repository with the tag "base" and one commit per patch. It tracks the files the
# series touches and those the pathspecs name.
git_tree() {
	local p only=''
	[ "$1" != --without-patches ] || { only=base; shift; }
	local dir=$1 repo=(git -C "$1" -c user.name=memfile -c user.email=memfile@localhost
		-c core.compression=1 -c core.autocrlf=false -c core.hooksPath=/dev/null
		-c commit.gpgSign=false -c gc.auto=0)
	shift
	git init -q -b memfile "$dir"
	# Build products and the rest of the tree are no news.
	printf '*\n' >"$dir/.git/info/exclude"
	while read -r p; do
		[ ! -f "$dir/$p" ] || set -- "$@" "$p"
	done < <(touched_files)
	[ $# = 0 ] || "${repo[@]}" add -f -- "$@"
	GIT_COMMITTER_DATE='2026-01-01T00:00:00Z' GIT_AUTHOR_DATE='2026-01-01T00:00:00Z' \
		"${repo[@]}" commit -q --allow-empty -m "$SOURCE, the part the series may touch"
	"${repo[@]}" tag base
	[ -z "$only" ] || return 0
	while read -r p; do
		"${repo[@]}" am -q --whitespace=nowarn --committer-date-is-author-date "$PATCHES/$p" >/dev/null ||
			die "git am cannot apply $p in $dir"
	done < <(series)
}
