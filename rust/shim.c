// SPDX-License-Identifier: GPL-2.0

#include <linux/debugfs.h>
#include <linux/export.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/hugetlb.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/overflow.h>
#include <linux/pagemap.h>
#include <linux/percpu.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/srcu.h>

#include "shim.h"
#include "store.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

loff_t memfile_i_size(struct inode *inode)
{
	return i_size_read(inode);
}

unsigned long memfile_nrpages(struct inode *inode)
{
	return READ_ONCE(inode->i_mapping->nrpages);
}

/* Pages in memory or in swap: all stores account for both in i_blocks. */
bool memfile_has_pages(struct inode *inode)
{
	return READ_ONCE(inode->i_blocks);
}

/* Do new pages come from movable blocks? */
void memfile_set_gfp_movable(struct inode *inode, bool movable)
{
	struct address_space *mapping = inode->i_mapping;
	gfp_t gfp = mapping_gfp_mask(mapping) & ~__GFP_MOVABLE;

	mapping_set_gfp_mask(mapping, movable ? gfp | __GFP_MOVABLE : gfp);
}

/* Does migration look at the pages that are there? */
void memfile_set_migratable(struct inode *inode, bool migratable)
{
	assign_bit(AS_UNMOVABLE, &inode->i_mapping->flags, !migratable);
}

DEFINE_STATIC_SRCU(memfile_allocations);

int memfile_begin_allocation(void)
{
	return srcu_read_lock(&memfile_allocations);
}

void memfile_end_allocation(int index)
{
	srcu_read_unlock(&memfile_allocations, index);
}

void memfile_wait_for_allocations(void)
{
	synchronize_srcu(&memfile_allocations);
}

bool memfile_task_killed(void)
{
	return fatal_signal_pending(current);
}

void memfile_set_evictable(struct inode *inode, bool evictable)
{
	assign_bit(AS_UNEVICTABLE, &inode->i_mapping->flags, !evictable);
}

/* Do pages leave the direct map before a consumer gets them? */
void memfile_set_hiding(struct inode *inode, bool hiding)
{
	assign_bit(AS_HIDE, &inode->i_mapping->flags, hiding);
}

bool memfile_writable(struct file *file)
{
	return file->f_mode & FMODE_WRITE;
}

void memfile_get_file(struct file *file)
{
	get_file(file);
}

pgoff_t memfile_folio_index(struct folio *folio)
{
	return folio->index;
}

unsigned int memfile_folio_order(struct folio *folio)
{
	return folio_order(folio);
}

struct page *memfile_folio_page(struct folio *folio, pgoff_t index)
{
	return folio_file_page(folio, index);
}

static bool page_poisoned(struct folio *folio, struct page *page)
{
#ifdef CONFIG_HUGETLB_PAGE
	if (folio_test_hugetlb(folio))
		return folio_test_hwpoison(folio) &&
		       hugetlb_page_hwpoison(folio, page);
#endif
	return PageHWPoison(page);
}

static enum memfile_poison look_at(struct folio *folio, struct page *page,
				   struct memfile_pfn *pfn)
{
	pfn->pfn = page_to_pfn(page);
	pfn->page = page;
	pfn->order = folio_order(folio);
	if (likely(!folio_contain_hwpoisoned_page(folio)))
		return MEMFILE_POISON_NONE;
	return page_poisoned(folio, page) ? MEMFILE_POISON_PAGE :
					    MEMFILE_POISON_NEIGHBOUR;
}

/* Of the store of another module, which has none of hugetlbfs: see store.h. */
enum memfile_poison memfile_look_at_page(struct page *page,
					 struct memfile_pfn *pfn)
{
	return look_at(page_folio(page), page, pfn);
}

/* The folio is locked and in the page cache, as hugetlb_page_hwpoison() wants. */
enum memfile_poison memfile_look_at_folio(struct folio *folio, pgoff_t index,
					  struct memfile_pfn *pfn)
{
	return look_at(folio, folio_file_page(folio, index), pfn);
}

/*
 * Unlocks a folio that a consumer gets.  It is the only copy from now on: if it
 * were clean, reclaim would drop it as if swap had another one.  Shmem and
 * hugetlbfs keep no more of that than the flag, see noop_dirty_folio(); and
 * PG_reclaim, which folio_mark_dirty() clears, means nothing to a folio that
 * goes to swap.
 */
void memfile_hand_on(struct folio *folio)
{
	if (!folio_test_dirty(folio))
		folio_set_dirty(folio);
	folio_unlock(folio);
}

void memfile_put_folio(struct folio *folio)
{
	folio_put(folio);
}

void memfile_put_page(struct page *page)
{
	put_page(page);
}

#ifdef CONFIG_HUGETLBFS
unsigned int memfile_hugetlb_order(struct inode *inode)
{
	return huge_page_order(hstate_inode(inode));
}

/* The folio with page @index. */
struct folio *memfile_hugetlb_folio(struct file *file, pgoff_t index)
{
	return hugetlbfs_get_folio(file, index >> huge_page_order(hstate_file(file)));
}

long memfile_hugetlb_fallocate(struct file *file, int mode, loff_t offset,
			       loff_t len)
{
	return hugetlbfs_fallocate(file, mode, offset, len);
}

int memfile_hugetlb_migrate_folio(struct address_space *mapping,
				  struct folio *dst, struct folio *src,
				  enum migrate_mode mode)
{
	return hugetlbfs_move_folio(mapping, dst, src, mode);
}
#else
/* There are no such files: not called. */
unsigned int memfile_hugetlb_order(struct inode *inode)
{
	return 0;
}

struct folio *memfile_hugetlb_folio(struct file *file, pgoff_t index)
{
	return ERR_PTR(-EOPNOTSUPP);
}

long memfile_hugetlb_fallocate(struct file *file, int mode, loff_t offset,
			       loff_t len)
{
	return -EOPNOTSUPP;
}

int memfile_hugetlb_migrate_folio(struct address_space *mapping,
				  struct folio *dst, struct folio *src,
				  enum migrate_mode mode)
{
	return -EOPNOTSUPP;
}
#endif

static int memfile_debugfs_open(struct inode *inode, struct file *file)
{
	return single_open(file, inode->i_private, NULL);
}

static const struct file_operations memfile_debugfs_fops = {
	.owner		= THIS_MODULE,
	.open		= memfile_debugfs_open,
	.read		= seq_read,
	.llseek		= seq_lseek,
	.release	= single_release,
};

struct dentry *memfile_debugfs_dir(const char *name)
{
	return debugfs_create_dir(name, NULL);
}

void memfile_debugfs_file(struct dentry *dir, const char *name,
			  memfile_show_t show)
{
	debugfs_create_file(name, 0400, dir, show, &memfile_debugfs_fops);
}

/* With its files.  Waits for tasks that read one. */
void memfile_debugfs_remove(struct dentry *dir)
{
	debugfs_remove(dir);
}

static atomic64_t *early_count(struct memfile_counts *counts, size_t which)
{
	return (atomic64_t *)(counts + 1) + which;
}

/*
 * Nobody waits, and nobody is killed, for counts: without memory nothing changes,
 * and nobody tries again.
 */
void memfile_spread_counts(struct memfile_counts *counts, size_t n)
{
	const gfp_t gfp = GFP_KERNEL_ACCOUNT | __GFP_NORETRY | __GFP_NOWARN;
	s64 __percpu *cpus;

	if (READ_ONCE(counts->tried) || xchg(&counts->tried, true))
		return;
	cpus = __alloc_percpu_gfp(array_size(n, sizeof(s64)), sizeof(s64), gfp);
	/* Readers follow the pointer. */
	smp_store_release(&counts->cpus, cpus);
}

void memfile_free_counts(struct memfile_counts *counts)
{
	if (counts->cpus)
		free_percpu(counts->cpus);
}

void memfile_add_count(struct memfile_counts *counts, size_t which, s64 n)
{
	s64 __percpu *cpus = READ_ONCE(counts->cpus);

	if (likely(cpus))
		this_cpu_add(cpus[which], n);
	else
		atomic64_add(n, early_count(counts, which));
}

s64 memfile_sum_count(struct memfile_counts *counts, size_t which)
{
	s64 __percpu *cpus = READ_ONCE(counts->cpus);
	s64 sum = atomic64_read(early_count(counts, which));
	int cpu;

	if (!cpus)
		return sum;
	for_each_possible_cpu(cpu)
		sum += READ_ONCE(*per_cpu_ptr(&cpus[which], cpu));
	return sum;
}

void memfile_trace_get_pfn(struct inode *inode, pgoff_t index,
			   const struct memfile_pfn *pfn)
{
	trace_memfile_get_pfn(inode, index, pfn->pfn, pfn->order);
}

void memfile_trace_put_pfn(const struct memfile_pfn *pfn)
{
	trace_memfile_put_pfn(pfn->pfn);
}

#define MEMFILE_TRACE_RANGE(event)					\
void memfile_trace_##event(struct inode *inode, pgoff_t start, pgoff_t end) \
{									\
	trace_memfile_##event(inode, start, end);			\
}

MEMFILE_TRACE_RANGE(bind)
MEMFILE_TRACE_RANGE(unbind)
MEMFILE_TRACE_RANGE(invalidate_start)
MEMFILE_TRACE_RANGE(invalidate_end)
MEMFILE_TRACE_RANGE(migrate)
MEMFILE_TRACE_RANGE(swap_out)
MEMFILE_TRACE_RANGE(poison)

/* For stores of other modules.  In Rust, see entry/exports.rs. */
EXPORT_SYMBOL_GPL(memfile_register_store);
EXPORT_SYMBOL_GPL(memfile_unregister_store);
EXPORT_SYMBOL_GPL(memfile_node_create);
EXPORT_SYMBOL_GPL(memfile_node_destroy);
EXPORT_SYMBOL_GPL(memfile_node_fallocate);
EXPORT_SYMBOL_GPL(memfile_node_show_fdinfo);
EXPORT_SYMBOL_GPL(memfile_node_referenced);
EXPORT_SYMBOL_GPL(memfile_node_writeout_start);
EXPORT_SYMBOL_GPL(memfile_node_writeout_undone);
EXPORT_SYMBOL_GPL(memfile_node_invalidate_start);
EXPORT_SYMBOL_GPL(memfile_node_invalidate_end);
EXPORT_SYMBOL_GPL(memfile_node_migrate_folio);
EXPORT_SYMBOL_GPL(memfile_node_error_folio);
