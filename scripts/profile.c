// SPDX-License-Identifier: GPL-2.0
/*
 * A plugin of QEMU's that counts, for scripts/bench, what the emulated CPU
 * executes while the guest does what is to be measured.
 *
 * The guest tells by an instruction that does nothing else: nopl MARK + 1(%rax)
 * begins a window, nopl MARK(%rax) ends it; windows count from 0.  Their counts
 * go to the file (argument out=) line by line, "window what address count":
 *
 *   rep     turns of a repeated string instruction; each is an instruction to
 *           QEMU's -icount, the last one, which only finds that all is done, too
 *   locked  instructions with a lock prefix, and exchanges with memory
 *   line    the same, by the cache line that they write (the address), without those that
 *           address it relative to GS, as per-CPU data; a fifth word is an instruction that
 *           wrote it.  Where a window has more than MANY lines, those that were written
 *           less than FEW times are together line 0
 *   call    direct calls and jumps to one of the functions of the argument
 *           calls=ADDRESS:ADDRESS...; a fifth word is the function
 *   all     with the argument functions=on: all other instructions
 *
 * User space, nested guests and all else below the kernel have the address 0, and
 * are not looked at for locked and call.  Nothing is sampled, so interrupts that
 * are off hide nothing.
 *
 * One CPU only.  Debian has no header for plugins: the declarations below are
 * what QEMU's documentation of its plugin interface says.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MARK		0x4d454d00u	/* see mark() in selftests/src/bench/measure.rs */
#define SLOTS		(1u << 20)
#define TARGETS		64
#define LINES		(1u << 21)
#define MANY		4096
#define FEW		8
#define KERNEL		(1ull << 63)
#define LONGEST		15

typedef uint64_t plugin_id;
struct tb;
struct insn;
struct info;

size_t qemu_plugin_tb_n_insns(const struct tb *tb);
struct insn *qemu_plugin_tb_get_insn(const struct tb *tb, size_t n);
uint64_t qemu_plugin_insn_vaddr(const struct insn *insn);
#if QEMU_PLUGIN_API >= 3
size_t qemu_plugin_insn_data(const struct insn *insn, void *dest, size_t len);
#else
const void *qemu_plugin_insn_data(const struct insn *insn);
#endif
size_t qemu_plugin_insn_size(const struct insn *insn);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id,
		void (*translated)(plugin_id id, struct tb *tb));
void qemu_plugin_register_vcpu_insn_exec_cb(struct insn *insn,
		void (*executed)(unsigned int cpu, void *data), int flags, void *data);
enum { WRITE = 2 };
void qemu_plugin_register_vcpu_mem_cb(struct insn *insn,
		void (*written)(unsigned int cpu, uint32_t info, uint64_t address, void *data),
		int flags, int rw, void *data);
void qemu_plugin_register_atexit_cb(plugin_id id,
		void (*ends)(plugin_id id, void *data), void *data);

/* The counters are the emulated CPU's own: it adds to them without a call. */
enum { ADD_U64 };
#if QEMU_PLUGIN_API >= 2
struct score;
struct entry {
	struct score *score;
	size_t offset;
};
struct score *qemu_plugin_scoreboard_new(size_t size);
void *qemu_plugin_scoreboard_find(struct score *score, unsigned int cpu);
void qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(struct insn *insn, int op,
		struct entry entry, uint64_t number);

static struct score *score;
#else
void qemu_plugin_register_vcpu_insn_exec_inline(struct insn *insn, int op,
		void *counter, uint64_t number);

static uint64_t *counters;
#endif

int qemu_plugin_version = QEMU_PLUGIN_API;

enum what { FREE, REP, LOCKED, CALL, ALL };
static const char *const names[] = { "", "rep", "locked", "call", "all" };

/* A hash table of what is counted; a boot and a bench need a third of it. */
static struct slot {
	uint64_t address;
	uint64_t target;
	enum what what;
} *slots;
/* Another one of the lines written in this window, and the places that are taken. */
static struct line {
	uint64_t address;
	uint64_t site;
	uint64_t count;
} *lines;
static uint32_t *taken;
static uint32_t n_taken;
static int open;
/* An instruction with a lock has not written yet. */
static int pending;
static uint64_t targets[TARGETS];
static unsigned int n_targets;
static int functions;
static int window = -1;
static FILE *out;

static uint64_t *all_counters(void)
{
#if QEMU_PLUGIN_API >= 2
	return qemu_plugin_scoreboard_find(score, 0);
#else
	return counters;
#endif
}

static void count(struct insn *insn, enum what what, uint64_t target)
{
	uint64_t address = qemu_plugin_insn_vaddr(insn);
	uint32_t n, tries;

	if (address < KERNEL)
		address = 0;
	n = (address * 8 + what) * 0x9e3779b97f4a7c15ull >> 44;
	for (tries = 0; tries < SLOTS; tries++, n++) {
		struct slot *slot = &slots[n %= SLOTS];

		if (slot->what == FREE)
			*slot = (struct slot) { address, target, what };
		if (slot->what == what && slot->address == address && slot->target == target)
			break;
	}
	if (tries == SLOTS) {
		fprintf(stderr, "profile: more than %u instructions\n", SLOTS);
		abort();
	}
#if QEMU_PLUGIN_API >= 2
	qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn, ADD_U64,
			(struct entry) { score, n * sizeof(uint64_t) }, 1);
#else
	qemu_plugin_register_vcpu_insn_exec_inline(insn, ADD_U64, &counters[n], 1);
#endif
}

static void window_begins(unsigned int cpu, void *data)
{
	window++;
	memset(all_counters(), 0, SLOTS * sizeof(uint64_t));
	while (n_taken)
		lines[taken[--n_taken]].count = 0;
	open = 1;
}

static void lock_begins(unsigned int cpu, void *data)
{
	pending = open;
}

/* Called more than once for some instructions, for those that write 16 bytes for one. */
static void line_written(unsigned int cpu, uint32_t info, uint64_t address, void *data)
{
	uint64_t site = (uintptr_t)data;
	uint32_t n;

	if (!pending)
		return;
	pending = 0;
	address &= ~63ull;
	n = (address >> 6) * 0x9e3779b97f4a7c15ull >> 43;
	while (lines[n].count && lines[n].address != address)
		n = (n + 1) % LINES;
	if (!lines[n].count) {
		if (n_taken == LINES / 2) {
			fprintf(stderr, "profile: more than %u lines\n", LINES / 2);
			abort();
		}
		lines[n] = (struct line) { address, site, 0 };
		taken[n_taken++] = n;
	}
	lines[n].count++;
}

static void print_lines(void)
{
	uint64_t rest = 0;
	uint32_t i;

	for (i = 0; i < n_taken; i++) {
		const struct line *line = &lines[taken[i]];

		if (n_taken > MANY && line->count < FEW)
			rest += line->count;
		else
			fprintf(out, "%d line %llx %llu %llx\n", window, (unsigned long long)line->address,
				(unsigned long long)line->count, (unsigned long long)line->site);
	}
	if (rest)
		fprintf(out, "%d line 0 %llu 0\n", window, (unsigned long long)rest);
}

static void window_ends(unsigned int cpu, void *data)
{
	const uint64_t *counted = all_counters();
	uint32_t n;

	open = 0;
	print_lines();
	for (n = 0; n < SLOTS; n++) {
		const struct slot *slot = &slots[n];

		if (slot->what == FREE || !counted[n])
			continue;
		fprintf(out, "%d %s %llx %llu", window, names[slot->what],
			(unsigned long long)slot->address, (unsigned long long)counted[n]);
		if (slot->what == CALL)
			fprintf(out, " %llx", (unsigned long long)slot->target);
		fputc('\n', out);
	}
}

static size_t bytes_of(const struct insn *insn, uint8_t *bytes)
{
	size_t size = qemu_plugin_insn_size(insn);

	memset(bytes, 0, LONGEST);
	if (size > LONGEST)
		return 0;
#if QEMU_PLUGIN_API >= 3
	if (qemu_plugin_insn_data(insn, bytes, size) != size)
		return 0;
#else
	memcpy(bytes, qemu_plugin_insn_data(insn), size);
#endif
	return size;
}

static int is_mark(const uint8_t *bytes, size_t size, uint32_t mark)
{
	uint8_t wanted[7] = { 0x0f, 0x1f, 0x80 };

	memcpy(wanted + 3, &mark, sizeof(mark));
	return size == sizeof(wanted) && !memcmp(bytes, wanted, sizeof(wanted));
}

static int is_string(uint8_t opcode)
{
	return (opcode >= 0xa4 && opcode <= 0xa7) || (opcode >= 0xaa && opcode <= 0xaf) ||
	       (opcode >= 0x6c && opcode <= 0x6f);
}

static void look_at(struct insn *insn, const uint8_t *bytes, size_t size)
{
	int rep = 0, lock = 0, gs = 0, kernel = qemu_plugin_insn_vaddr(insn) >= KERNEL;
	size_t n;

	for (n = 0; n < size; n++) {
		uint8_t byte = bytes[n];

		if (byte == 0xf2 || byte == 0xf3)
			rep = 1;
		else if (byte == 0xf0)
			lock = 1;
		else if (byte == 0x65)
			gs = 1;
		else if (byte != 0x66 && byte != 0x67 && byte != 0x64 &&
			 byte != 0x2e && byte != 0x36 && byte != 0x3e && byte != 0x26)
			break;
	}
	/* A REX prefix. */
	if (n < size && (bytes[n] & 0xf0) == 0x40)
		n++;
	if (n == size)
		return;
	if (rep && is_string(bytes[n])) {
		count(insn, REP, 0);
		return;
	}
	if (functions)
		count(insn, ALL, 0);
	if (!kernel)
		return;
	/* xchg with memory locks without a prefix. */
	if (lock || ((bytes[n] == 0x86 || bytes[n] == 0x87) && n + 1 < size && bytes[n + 1] < 0xc0)) {
		count(insn, LOCKED, 0);
		if (!gs) {
			qemu_plugin_register_vcpu_insn_exec_cb(insn, lock_begins, 0, NULL);
			qemu_plugin_register_vcpu_mem_cb(insn, line_written, 0, WRITE,
					(void *)(uintptr_t)qemu_plugin_insn_vaddr(insn));
		}
	}
	if ((bytes[n] == 0xe8 || bytes[n] == 0xe9) && n + 5 == size) {
		int32_t distance;
		uint64_t target;
		unsigned int t;

		memcpy(&distance, bytes + n + 1, sizeof(distance));
		target = qemu_plugin_insn_vaddr(insn) + size + distance;
		for (t = 0; t < n_targets; t++)
			if (targets[t] == target)
				count(insn, CALL, target);
	}
}

static void translated(plugin_id id, struct tb *tb)
{
	size_t i, n = qemu_plugin_tb_n_insns(tb);

	for (i = 0; i < n; i++) {
		struct insn *insn = qemu_plugin_tb_get_insn(tb, i);
		uint8_t bytes[LONGEST];
		size_t size = bytes_of(insn, bytes);

		if (is_mark(bytes, size, MARK))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, window_ends, 0, NULL);
		else if (is_mark(bytes, size, MARK + 1))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, window_begins, 0, NULL);
		else
			look_at(insn, bytes, size);
	}
}

static void ends(plugin_id id, void *data)
{
	if (fclose(out))
		perror("profile");
}

int qemu_plugin_install(plugin_id id, const struct info *info, int argc, char **argv)
{
	int i;

	for (i = 0; i < argc; i++) {
		char *value = strchr(argv[i], '=');

		if (value && !strncmp(argv[i], "out=", 4)) {
			out = fopen(value + 1, "w");
		} else if (value && !strcmp(argv[i], "functions=on")) {
			functions = 1;
		} else if (value && !strncmp(argv[i], "calls=", 6)) {
			while (*value) {
				if (n_targets == TARGETS) {
					fprintf(stderr, "profile: more than %u functions\n", TARGETS);
					return -1;
				}
				targets[n_targets++] = strtoull(value + 1, &value, 16);
			}
		} else {
			fprintf(stderr, "profile: the argument %s is not known\n", argv[i]);
			return -1;
		}
	}
	slots = calloc(SLOTS, sizeof(*slots));
	lines = calloc(LINES, sizeof(*lines));
	taken = calloc(LINES, sizeof(*taken));
#if QEMU_PLUGIN_API >= 2
	score = qemu_plugin_scoreboard_new(SLOTS * sizeof(uint64_t));
#else
	counters = calloc(SLOTS, sizeof(*counters));
	if (!counters)
		return -1;
#endif
	if (!out || !slots || !lines || !taken) {
		perror("profile");
		return -1;
	}
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ends, NULL);
	return 0;
}
