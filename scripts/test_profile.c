// SPDX-License-Identifier: GPL-2.0
/*
 * As much of QEMU as scripts/profile.c wants, for scripts/test_bench.py: each
 * line "address bytes" of the input, in hexadecimal, is an instruction that is
 * translated and executed once; a third word is the address that it writes, of
 * which the plugin is told twice.  The
 * arguments are the plugin's.
 */
#include "profile.c"

struct insn {
	uint64_t address;
	uint8_t bytes[LONGEST];
	size_t size;
};
/* The instruction under translation, and what the plugin registers for it. */
struct tb {
	struct insn insn;
};
static void (*executed[4])(unsigned int cpu, void *data);
static uint64_t *added[4];
static void (*on_write)(unsigned int cpu, uint32_t info, uint64_t address, void *data);
static void *write_data;
static int n_executed, n_added;
static void (*on_translation)(plugin_id id, struct tb *tb);
static void (*at_exit)(plugin_id id, void *data);

size_t qemu_plugin_tb_n_insns(const struct tb *tb) { return 1; }
struct insn *qemu_plugin_tb_get_insn(const struct tb *tb, size_t n) { return (struct insn *)&tb->insn; }
uint64_t qemu_plugin_insn_vaddr(const struct insn *insn) { return insn->address; }
size_t qemu_plugin_insn_size(const struct insn *insn) { return insn->size; }

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id, void (*function)(plugin_id id, struct tb *tb))
{
	on_translation = function;
}

void qemu_plugin_register_atexit_cb(plugin_id id, void (*function)(plugin_id id, void *data), void *data)
{
	at_exit = function;
}

void qemu_plugin_register_vcpu_insn_exec_cb(struct insn *insn,
		void (*function)(unsigned int cpu, void *data), int flags, void *data)
{
	executed[n_executed++] = function;
}

void qemu_plugin_register_vcpu_mem_cb(struct insn *insn,
		void (*function)(unsigned int cpu, uint32_t info, uint64_t address, void *data),
		int flags, int rw, void *data)
{
	on_write = function;
	write_data = data;
}

#if QEMU_PLUGIN_API >= 3
size_t qemu_plugin_insn_data(const struct insn *insn, void *dest, size_t len)
{
	memcpy(dest, insn->bytes, len);
	return len;
}
#else
const void *qemu_plugin_insn_data(const struct insn *insn) { return insn->bytes; }
#endif

#if QEMU_PLUGIN_API >= 2
struct score *qemu_plugin_scoreboard_new(size_t size) { return calloc(size, 1); }
void *qemu_plugin_scoreboard_find(struct score *score, unsigned int cpu) { return score; }

void qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(struct insn *insn, int op,
		struct entry entry, uint64_t number)
{
	added[n_added++] = (uint64_t *)((char *)entry.score + entry.offset);
}
#else
void qemu_plugin_register_vcpu_insn_exec_inline(struct insn *insn, int op, void *counter, uint64_t number)
{
	added[n_added++] = counter;
}
#endif

int main(int argc, char **argv)
{
	struct tb tb;
	char text[128], bytes[64];
	unsigned long long written;
	int n, words;

	if (qemu_plugin_install(0, NULL, argc - 1, argv + 1))
		return 1;
	while (fgets(text, sizeof(text), stdin)) {
		words = sscanf(text, "%llx %63s %llx", (unsigned long long *)&tb.insn.address, bytes, &written);
		if (words < 2)
			return 1;
		tb.insn.size = strlen(bytes) / 2;
		for (n = 0; n < (int)tb.insn.size; n++)
			sscanf(bytes + 2 * n, "%2hhx", &tb.insn.bytes[n]);
		n_executed = n_added = 0;
		on_write = NULL;
		on_translation(0, &tb);
		for (n = 0; n < n_added; n++)
			++*added[n];
		for (n = 0; n < n_executed; n++)
			executed[n](0, NULL);
		/* As QEMU does for some. */
		for (n = 0; words == 3 && on_write && n < 2; n++)
			on_write(0, 0, written, write_data);
	}
	at_exit(0, NULL);
	return 0;
}
