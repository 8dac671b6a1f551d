// SPDX-License-Identifier: GPL-2.0
/* As rust/shim.c, for the test's store. */

#include <linux/mm.h>

#include "../../shim.h"

unsigned long memfile_page_pfn(struct page *page)
{
	return page_to_pfn(page);
}
