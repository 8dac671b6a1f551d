// SPDX-License-Identifier: GPL-2.0

#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/pagemap.h>

#include "shim.h"

/* Of a new anonymous inode, which is to be a regular file for fallocate(2). */
void memfile_store_set_size(struct inode *inode, loff_t size)
{
	inode->i_mode |= S_IFREG;
	i_size_write(inode, size);
}

void memfile_store_get_page(struct page *page)
{
	get_page(page);
}

/* Lock the folio of a page of ours, and note its place in the file. */
struct folio *memfile_store_lock(struct page *page, pgoff_t index)
{
	struct folio *folio = page_folio(page);

	folio_lock(folio);
	folio->index = index;
	return folio;
}

/* And give up the caller's reference. */
void memfile_store_unlock(struct folio *folio)
{
	folio_unlock(folio);
	folio_put(folio);
}

pgoff_t memfile_store_index(struct folio *folio)
{
	return folio->index;
}

/* Both are of one page. */
void memfile_store_copy(struct folio *dst, struct folio *src)
{
	copy_highpage(folio_page(dst, 0), folio_page(src, 0));
}
