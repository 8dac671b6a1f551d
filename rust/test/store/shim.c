// SPDX-License-Identifier: GPL-2.0

#include <linux/anon_inodes.h>
#include <linux/err.h>
#include <linux/fcntl.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/memfd.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/set_memory.h>
#include <linux/uaccess.h>

#include "shim.h"

/* Make a new anonymous inode a regular file, which fallocate(2) wants. */
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

/* Unlock it, and give up the caller's reference. */
void memfile_store_unlock(struct folio *folio)
{
	folio_unlock(folio);
	folio_put(folio);
}

pgoff_t memfile_store_index(struct folio *folio)
{
	return folio->index;
}

int memfile_store_references(struct folio *folio)
{
	return folio_ref_count(folio);
}

/* Both folios have one page. */
void memfile_store_copy(struct folio *dst, struct folio *src)
{
	copy_highpage(folio_page(dst, 0), folio_page(src, 0));
}

/*
 * Handle an error in a page frame as x86's machine check handlers do if hardware
 * reports it.  After this unpoison_memory() does not work any more.
 */
int memfile_store_hard_error(unsigned long pfn)
{
	int err = memory_failure(pfn, 0);

	return err ?: set_mce_nospec(pfn);
}

/*
 * Pin the first page of a memfd for a device, as udmabuf does, and let go of it.
 * EUCLEAN: the device would have seen what was there before.
 */
int memfile_store_pin(unsigned int fd)
{
	struct folio *folio;
	pgoff_t offset;
	long n;

	CLASS(fd, f)(fd);

	if (fd_empty(f))
		return -EBADF;
	n = memfd_pin_folios(fd_file(f), 0, PAGE_SIZE - 1, &folio, 1, &offset);
	if (n == 1) {
		if (!folio_test_uptodate(folio))
			n = -EUCLEAN;
		unpin_folio(folio);
	}
	return n < 0 ? n : 0;
}

/* Copy a page frame to @to by its address in the direct map, if it is there. */
int memfile_store_read_frame(unsigned long pfn, void *to)
{
	if (!pfn_valid(pfn))
		return -EINVAL;
	return copy_from_kernel_nofault(to, pfn_to_kaddr(pfn), PAGE_SIZE);
}

static int memfile_store_alias_release(struct inode *inode, struct file *file)
{
	fput(file->private_data);
	return 0;
}

static const struct file_operations memfile_store_alias_fops = {
	.owner = THIS_MODULE,
	.release = memfile_store_alias_release,
};

/* A file with an inode of its own and the page cache of another file, as coda has them. */
struct file *memfile_store_alias(unsigned int fd)
{
	struct file *target = fget(fd);
	struct file *file;

	if (!target)
		return ERR_PTR(-EBADF);
	file = anon_inode_create_getfile("[memfile-alias]",
					 &memfile_store_alias_fops, target,
					 O_RDWR, NULL);
	if (IS_ERR(file)) {
		fput(target);
		return file;
	}
	file->f_mapping = target->f_mapping;
	return file;
}
