// SPDX-License-Identifier: GPL-2.0

#include <linux/fs.h>
#include <linux/mm.h>

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
