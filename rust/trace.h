/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Tracepoints memfile:*, for pages and bindings.  Ranges are [start, end) in
 * pages of the file; a file is known by its inode number.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM memfile

#if !defined(_MEMFILE_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _MEMFILE_TRACE_H

#include <linux/fs.h>
#include <linux/tracepoint.h>

TRACE_EVENT(memfile_get_pfn,
	TP_PROTO(struct inode *inode, pgoff_t index, unsigned long pfn,
		 unsigned int order),
	TP_ARGS(inode, index, pfn, order),
	TP_STRUCT__entry(
		__field(u64, ino)
		__field(pgoff_t, index)
		__field(unsigned long, pfn)
		__field(unsigned int, order)
	),
	TP_fast_assign(
		__entry->ino = inode->i_ino;
		__entry->index = index;
		__entry->pfn = pfn;
		__entry->order = order;
	),
	TP_printk("ino=%llu index=%lu pfn=%lx order=%u",
		  __entry->ino, __entry->index, __entry->pfn, __entry->order)
);

TRACE_EVENT(memfile_put_pfn,
	TP_PROTO(unsigned long pfn),
	TP_ARGS(pfn),
	TP_STRUCT__entry(
		__field(unsigned long, pfn)
	),
	TP_fast_assign(
		__entry->pfn = pfn;
	),
	TP_printk("pfn=%lx", __entry->pfn)
);

DECLARE_EVENT_CLASS(memfile_range,
	TP_PROTO(struct inode *inode, pgoff_t start, pgoff_t end),
	TP_ARGS(inode, start, end),
	TP_STRUCT__entry(
		__field(u64, ino)
		__field(pgoff_t, start)
		__field(pgoff_t, end)
	),
	TP_fast_assign(
		__entry->ino = inode->i_ino;
		__entry->start = start;
		__entry->end = end;
	),
	TP_printk("ino=%llu start=%lu end=%lu",
		  __entry->ino, __entry->start, __entry->end)
);

#define MEMFILE_RANGE_EVENT(name)					\
	DEFINE_EVENT(memfile_range, name,				\
		TP_PROTO(struct inode *inode, pgoff_t start, pgoff_t end), \
		TP_ARGS(inode, start, end))

MEMFILE_RANGE_EVENT(memfile_bind);
MEMFILE_RANGE_EVENT(memfile_unbind);
MEMFILE_RANGE_EVENT(memfile_invalidate_start);
MEMFILE_RANGE_EVENT(memfile_invalidate_end);
MEMFILE_RANGE_EVENT(memfile_migrate);
MEMFILE_RANGE_EVENT(memfile_swap_out);
MEMFILE_RANGE_EVENT(memfile_poison);

#endif /* _MEMFILE_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
