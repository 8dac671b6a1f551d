/* SPDX-License-Identifier: GPL-2.0 */
/* As rust/shim.h, for the test's store. */
#ifndef _MEMFILE_STORE_SHIM_H
#define _MEMFILE_STORE_SHIM_H

#include <linux/fs.h>
#include <linux/mm_types.h>

void memfile_store_set_size(struct inode *inode, loff_t size);
void memfile_store_get_page(struct page *page);
struct folio *memfile_store_lock(struct page *page, pgoff_t index);
void memfile_store_unlock(struct folio *folio);
pgoff_t memfile_store_index(struct folio *folio);
int memfile_store_references(struct folio *folio);
void memfile_store_copy(struct folio *dst, struct folio *src);
int memfile_store_hard_error(unsigned long pfn);
int memfile_store_pin(unsigned int fd);
int memfile_store_read_frame(unsigned long pfn, void *to);
struct file *memfile_store_alias(unsigned int fd);

#endif /* _MEMFILE_STORE_SHIM_H */
