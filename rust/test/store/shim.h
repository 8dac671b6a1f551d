/* SPDX-License-Identifier: GPL-2.0 */
/* As rust/shim.h, for the test's store. */
#ifndef _MEMFILE_STORE_SHIM_H
#define _MEMFILE_STORE_SHIM_H

#include <linux/fs.h>
#include <linux/mm_types.h>

void memfile_store_set_size(struct inode *inode, loff_t size);
void memfile_store_get_page(struct page *page);

#endif /* _MEMFILE_STORE_SHIM_H */
