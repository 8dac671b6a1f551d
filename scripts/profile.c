// SPDX-License-Identifier: GPL-2.0
/*
 * A plugin of QEMU's that counts, for scripts/bench, every instruction the
 * guest's kernel executes while the guest does what is to be profiled.
 *
 * The guest tells by an instruction that does nothing else: nopl MARK + 1(%rax)
 * begins a window, nopl MARK(%rax) ends it.  At the end the file (argument out=)
 * gets a line "window address count" per address, where windows count from 0;
 * user space, nested guests and all else below the kernel have the address 0.
 * Nothing is sampled, so interrupts that are off hide nothing.  A repeated string
 * instruction counts once per turn.
 *
 * One CPU only.  Debian has no header for plugins: the declarations below are
 * what QEMU's documentation of its plugin interface says.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MARK		0x4d454d00u	/* see mark() in selftests/src/bench.rs */
#define WINDOWS		8
#define SLOTS		(1u << 20)
#define KERNEL		(1ull << 63)

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
void qemu_plugin_register_atexit_cb(plugin_id id,
		void (*ends)(plugin_id id, void *data), void *data);

int qemu_plugin_version = QEMU_PLUGIN_API;

/* A hash table of the addresses that were translated; a boot and a bench need a third of it. */
static struct slot {
	uint64_t address;
	uint64_t count[WINDOWS];
} *slots;
static struct slot below_the_kernel;
static unsigned int windows;
static int counting;
static FILE *out;

static struct slot *slot_of(uint64_t address)
{
	uint32_t n = address * 0x9e3779b97f4a7c15ull >> 44;
	uint32_t tries;

	if (address < KERNEL)
		return &below_the_kernel;
	for (tries = 0; tries < SLOTS; tries++, n++) {
		struct slot *slot = &slots[n % SLOTS];

		if (!slot->address)
			slot->address = address;
		if (slot->address == address)
			return slot;
	}
	fprintf(stderr, "profile: more than %u instructions\n", SLOTS);
	abort();
}

static void executed(unsigned int cpu, void *data)
{
	struct slot *slot = data;

	if (counting)
		slot->count[windows - 1]++;
}

static void marked(unsigned int cpu, void *data)
{
	counting = data != NULL;
	windows += counting;
	if (windows > WINDOWS) {
		fprintf(stderr, "profile: more than %u windows\n", WINDOWS);
		abort();
	}
}

static int is_mark(const struct insn *insn, uint32_t mark)
{
	uint8_t wanted[7] = { 0x0f, 0x1f, 0x80 };

	memcpy(wanted + 3, &mark, sizeof(mark));
	if (qemu_plugin_insn_size(insn) != sizeof(wanted))
		return 0;
#if QEMU_PLUGIN_API >= 3
	uint8_t bytes[sizeof(wanted)];

	return qemu_plugin_insn_data(insn, bytes, sizeof(bytes)) == sizeof(bytes) &&
	       !memcmp(bytes, wanted, sizeof(bytes));
#else
	return !memcmp(qemu_plugin_insn_data(insn), wanted, sizeof(wanted));
#endif
}

static void translated(plugin_id id, struct tb *tb)
{
	size_t i, n = qemu_plugin_tb_n_insns(tb);

	for (i = 0; i < n; i++) {
		struct insn *insn = qemu_plugin_tb_get_insn(tb, i);

		if (is_mark(insn, MARK))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, marked, 0, NULL);
		else if (is_mark(insn, MARK + 1))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, marked, 0, &counting);
		else
			qemu_plugin_register_vcpu_insn_exec_cb(insn, executed, 0,
					slot_of(qemu_plugin_insn_vaddr(insn)));
	}
}

static void print(const struct slot *slot)
{
	unsigned int n;

	for (n = 0; n < windows; n++)
		if (slot->count[n])
			fprintf(out, "%u %llx %llu\n", n,
				(unsigned long long)slot->address,
				(unsigned long long)slot->count[n]);
}

static void ends(plugin_id id, void *data)
{
	uint32_t n;

	print(&below_the_kernel);
	for (n = 0; n < SLOTS; n++)
		print(&slots[n]);
	fclose(out);
}

int qemu_plugin_install(plugin_id id, const struct info *info, int argc, char **argv)
{
	if (argc != 1 || strncmp(argv[0], "out=", 4)) {
		fprintf(stderr, "profile: the argument is out=FILE\n");
		return -1;
	}
	out = fopen(argv[0] + 4, "w");
	slots = calloc(SLOTS, sizeof(*slots));
	if (!out || !slots) {
		perror("profile");
		return -1;
	}
	qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
	qemu_plugin_register_atexit_cb(id, ends, NULL);
	return 0;
}
