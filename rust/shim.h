/* SPDX-License-Identifier: GPL-2.0 */
/*
 * C for Rust: functions for the kernel's macros and inline functions.  Read by
 * shim.c and by bindgen.  No decisions here.
 */
#ifndef _MEMFILE_SHIM_H
#define _MEMFILE_SHIM_H

#include <linux/memfile.h>
#include <linux/seq_file.h>
#include <linux/shmem_fs.h>

/* Inode: valid while the node is. */
loff_t memfile_i_size(struct inode *inode);
unsigned long memfile_nrpages(struct inode *inode);
bool memfile_has_pages(struct inode *inode);
void memfile_set_gfp_movable(struct inode *inode, bool movable);
void memfile_set_migratable(struct inode *inode, bool migratable);
void memfile_set_evictable(struct inode *inode, bool evictable);
void memfile_set_hiding(struct inode *inode, bool hiding);

/*
 * Allocation: between the first two a page is allocated for a file and put into
 * its page cache.  The third waits until all that have begun are at their end.
 */
int memfile_begin_allocation(void);
void memfile_end_allocation(int index);
void memfile_wait_for_allocations(void);
bool memfile_task_killed(void);

/* File: the caller holds a reference. */
bool memfile_writable(struct file *file);
void memfile_get_file(struct file *file);

/* Folio: the caller holds a reference. */
pgoff_t memfile_folio_index(struct folio *folio);
unsigned int memfile_folio_order(struct folio *folio);
struct page *memfile_folio_page(struct folio *folio, pgoff_t index);
void memfile_hand_on(struct folio *folio);
void memfile_put_folio(struct folio *folio);
void memfile_put_page(struct page *page);

/*
 * All that is asked for at each fault, by one call: a page with the order of its
 * folio, and whether that has a memory error.
 */
enum memfile_poison {
	MEMFILE_POISON_NONE,
	MEMFILE_POISON_NEIGHBOUR,
	MEMFILE_POISON_PAGE,
};

enum memfile_poison memfile_look_at_page(struct page *page,
					 struct memfile_pfn *pfn);
enum memfile_poison memfile_look_at_folio(struct folio *folio, pgoff_t index,
					  struct memfile_pfn *pfn);

/* hugetlbfs: @inode and @file are its own. */
unsigned int memfile_hugetlb_order(struct inode *inode);
struct folio *memfile_hugetlb_folio(struct file *file, pgoff_t index);
long memfile_hugetlb_fallocate(struct file *file, int mode, loff_t offset,
			       loff_t len);
int memfile_hugetlb_migrate_folio(struct address_space *mapping,
				  struct folio *dst, struct folio *src,
				  enum migrate_mode mode);

/*
 * debugfs.  A file keeps this module while it is open; its content is written
 * anew for each reader.
 */
typedef int (*memfile_show_t)(struct seq_file *m, void *unused);
struct dentry *memfile_debugfs_dir(const char *name);
void memfile_debugfs_file(struct dentry *dir, const char *name,
			  memfile_show_t show);
void memfile_debugfs_remove(struct dentry *dir);

/*
 * Counts, see percpu.rs, which puts an array of atomic64_t behind this (bindgen's
 * arrays without a length are not for the kernel).  @tried: there was an attempt
 * to make those of the CPUs.
 */
struct memfile_counts {
	s64 __percpu *cpus;
	u64 tried;
};

void memfile_spread_counts(struct memfile_counts *counts, size_t n);
void memfile_free_counts(struct memfile_counts *counts);
void memfile_add_count(struct memfile_counts *counts, size_t which, s64 n);
s64 memfile_sum_count(struct memfile_counts *counts, size_t which);

/* Tracepoints, see trace.h. */
void memfile_trace_get_pfn(struct inode *inode, pgoff_t index,
			   const struct memfile_pfn *pfn);
void memfile_trace_put_pfn(const struct memfile_pfn *pfn);
void memfile_trace_bind(struct inode *inode, pgoff_t start, pgoff_t end);
void memfile_trace_unbind(struct inode *inode, pgoff_t start, pgoff_t end);
void memfile_trace_invalidate_start(struct inode *inode, pgoff_t start,
				    pgoff_t end);
void memfile_trace_invalidate_end(struct inode *inode, pgoff_t start,
				  pgoff_t end);
void memfile_trace_migrate(struct inode *inode, pgoff_t start, pgoff_t end);
void memfile_trace_swap_out(struct inode *inode, pgoff_t start, pgoff_t end);
void memfile_trace_poison(struct inode *inode, pgoff_t start, pgoff_t end);

#endif /* _MEMFILE_SHIM_H */
