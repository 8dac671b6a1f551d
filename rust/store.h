/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Stores of other modules.  memfile.ko exports this for modules that have files
 * of their own, with pages that consumers (KVM) are to map.
 *
 * A store makes the files, identifies its own files and provides their pages;
 * memfile.ko keeps their bindings, as it does for memfds.  A store of another
 * module can announce the same events to memfile.ko as shmem, and gets the same
 * requests.
 */
#ifndef _MEMFILE_STORE_H
#define _MEMFILE_STORE_H

#include <linux/memfile.h>

/**
 * struct memfile_store - the store of another module
 * @lookup: the node of @file, or NULL if it is none of this store's files.
 *	Does not sleep.
 * @get_page: the page at @index, which is below the size of @inode; zeroed if
 *	it is new.  With a reference for the consumer, which memfile.ko
 *	releases.  A page of a large folio has the same place in its folio as in its
 *	naturally aligned block of the file, and none is hugetlbfs'.  Otherwise
 *	an ERR_PTR: -EHWPOISON for a page with a memory error, -ENOMEM, -ENOSPC;
 *	consumers get -EIO for any other.  It waits for its pages itself: there
 *	is no -EAGAIN.  May sleep, and may run at any time while the node is bound.
 * @fallocate: allocate or punch; called by memfile_node_fallocate(), which has
 *	checked the arguments.  May sleep.
 * @set_flags: consumers want MEMFILE_F_* @flags of the pages from now on.  Runs
 *	in memfile_node_create() first.  Under a spinlock, does not sleep.
 * @allocate_movable: may new pages come from areas for movable memory?
 *	Likewise.
 * @leave_movable_areas: migrate the pages out of areas for movable memory; new
 *	ones do not come from there any more.  0 or -ENOMEM or -EBUSY, which the
 *	registration of the consumer returns.  May sleep.
 * @migrate_folio: move @src to @dst, both locked; called by
 *	memfile_node_migrate_folio(), while no consumer has a page of @src
 *	mapped.  -EAGAIN if anybody else has a reference to @src; @get_page makes
 *	none while this is decided.  May sleep, does not allocate.
 *
 * @lookup and @get_page are mandatory, and are called only while a reference to
 * the file is held: the file's f_op->owner keeps the store's module.
 * The others may be NULL.  Then there is no fallocate(); the flags and the GFP
 * mask of the inode's mapping, which memfile.ko sets in any case, show the
 * requests of consumers for pages in the page cache; and migrate_folio() moves
 * them.
 *
 * A page leaves its file between memfile_node_invalidate_start() and
 * memfile_node_invalidate_end(), and @get_page does not return it any more when
 * the latter is called.  A page that it returned before stays allocated until
 * its reference is released; a consumer that gets it too late does not map
 * it.  As long as a consumer has the reference it may read and write the page, as
 * KVM does for itself: so nothing but a hole or an error takes the page out of its
 * file meanwhile, neither a migration nor a way to swap.
 *
 * Three things are fixed for stores of other modules.  Consumers map pages by at
 * most 2 MiB, also those of a larger folio.  No MEMFILE_F_* is inherent in the
 * pages: a file has MEMFILE_F_USER_INACCESSIBLE and what consumers want, and
 * nothing more if its pages could not move or be reclaimed anyway.  And pages
 * cannot leave the kernel's direct map: a consumer that wants
 * MEMFILE_F_KERNEL_INACCESSIBLE is refused with -EINVAL.
 */
struct memfile_store {
	struct memfile_node *(*lookup)(struct file *file);
	struct page *(*get_page)(struct inode *inode, pgoff_t index);
	long (*fallocate)(struct file *file, int mode, loff_t offset,
			  loff_t len);
	void (*set_flags)(struct inode *inode, unsigned long flags);
	void (*allocate_movable)(struct inode *inode, bool movable);
	int (*leave_movable_areas)(struct inode *inode);
	int (*migrate_folio)(struct address_space *mapping, struct folio *dst,
			     struct folio *src, enum migrate_mode mode);
};

/**
 * memfile_register_store - the files of a store may be bound from now on
 * @store: the store; stays as long as it is registered or has files
 *
 * Context: May sleep.
 * Return: 0, -EBUSY if it is registered already, -EINVAL if a callback is
 * missing, -ENOMEM.
 */
int memfile_register_store(const struct memfile_store *store);

/**
 * memfile_unregister_store - no new bindings
 * @store: the registered store
 *
 * Existing bindings stay as they are.  @lookup is not called any more when this
 * returns.
 *
 * Context: May sleep.
 * Return: 0, or -EINVAL if it is not registered.
 */
int memfile_unregister_store(const struct memfile_store *store);

/**
 * memfile_node_create - memfile's side of a file
 * @inode: a new inode, which outlives the node.  Its size is a whole number of
 *	pages, and does not change while it is bound.  inode_add_bytes() counts
 *	its pages, wherever they are.  If it has pages in its page cache, the
 *	flags of its mapping tell what consumers want of them.
 * @store: its store, registered or not
 *
 * Context: May sleep.
 * Return: the node, or an ERR_PTR.
 */
struct memfile_node *memfile_node_create(struct inode *inode,
					 const struct memfile_store *store);

/**
 * memfile_node_destroy - undo memfile_node_create()
 * @node: the node; there is no file of it any more, so there is no binding
 *
 * Context: May sleep; waits for running invalidations.
 */
void memfile_node_destroy(struct memfile_node *node);

/**
 * memfile_node_fallocate - fallocate(2) on a file of the store
 * @node: the file's node
 * @file: the file
 * @mode: as in fallocate(2), likewise @offset and @len
 *
 * For &file_operations.fallocate.  Calls &memfile_store.fallocate if the
 * request is legal for a memfd made with MFD_INACCESSIBLE.
 *
 * Context: May sleep.
 * Return: 0; -EINVAL (not whole pages, past the end), -EOPNOTSUPP (another
 * mode, or the store has no fallocate), or what the store returns.
 */
long memfile_node_fallocate(struct memfile_node *node, struct file *file,
			    int mode, loff_t offset, loff_t len);

/**
 * memfile_node_show_fdinfo - lines for /proc/PID/fdinfo/FD
 * @node: the file's node
 * @m: receives the lines
 *
 * For &file_operations.show_fdinfo.
 *
 * Context: May sleep.
 */
void memfile_node_show_fdinfo(struct memfile_node *node, struct seq_file *m);

/**
 * memfile_node_referenced - has a consumer used a folio?
 * @node: the file's node
 * @folio: locked; its index is its place in the file.  The same holds for the
 *	next four functions.
 *
 * For a store that takes away pages that are not in use.
 *
 * Context: May sleep, as memfile_node_invalidate_start().
 * Return: true if it was used since the last call.
 */
bool memfile_node_referenced(struct memfile_node *node, struct folio *folio);

/**
 * memfile_node_writeout_start - a folio is about to go to swap
 * @node: the file's node
 * @inv: the record, which the caller keeps until memfile_node_invalidate_end()
 * @folio: the folio
 *
 * As memfile_node_invalidate_start(), and counted as a swap-out.  Not for files
 * to which &memfile_store.set_flags has given MEMFILE_F_UNRECLAIMABLE.
 *
 * Context: As memfile_node_invalidate_start().
 */
void memfile_node_writeout_start(struct memfile_node *node,
				 struct memfile_invalidation *inv,
				 struct folio *folio);

/**
 * memfile_node_writeout_undone - swap did not take a folio, it is back
 * @node: the file's node
 * @folio: the folio
 *
 * Context: Does not sleep.
 */
void memfile_node_writeout_undone(struct memfile_node *node,
				  struct folio *folio);

/**
 * memfile_node_migrate_folio - move a folio
 * @node: the file's node
 * @mapping: the mapping of its inode
 * @dst: the destination; locked
 * @src: the folio that moves; locked
 * @mode: how long it may take
 *
 * For &address_space_operations.migrate_folio, or for a store that moves its
 * pages itself.  Calls &memfile_store.migrate_folio between the start and the
 * end of an invalidation.
 *
 * Context: May sleep, as memfile_node_invalidate_start().
 * Return: 0, -EOPNOTSUPP if a consumer wants MEMFILE_F_UNMOVABLE, or what the
 * store returns.
 */
int memfile_node_migrate_folio(struct memfile_node *node,
			       struct address_space *mapping,
			       struct folio *dst, struct folio *src,
			       enum migrate_mode mode);

/**
 * memfile_node_error_folio - a folio has a memory error
 * @node: the file's node
 * @folio: the folio
 *
 * For &address_space_operations.error_remove_folio.  No consumer has a page of
 * it mapped when this returns; &memfile_store.get_page must refuse it from
 * before the call on.
 *
 * Context: May sleep, as memfile_node_invalidate_start().
 */
void memfile_node_error_folio(struct memfile_node *node, struct folio *folio);

/**
 * memfile_node_invalidate_start - pages are about to leave their file
 * @node: the file's node
 * @inv: the record, which the caller keeps until memfile_node_invalidate_end()
 * @start: the first page
 * @end: the page behind the last one
 *
 * No consumer has the pages mapped when this returns, or maps them before the
 * end.
 *
 * Context: May sleep.  The caller holds no lock that (un)registration of a
 * notifier may need: it waits for invalidations, under KVM's slots_lock.
 */
void memfile_node_invalidate_start(struct memfile_node *node,
				   struct memfile_invalidation *inv,
				   pgoff_t start, pgoff_t end);

/**
 * memfile_node_invalidate_end - the pages have left their file
 * @inv: the record from memfile_node_invalidate_start()
 *
 * Context: As above.
 */
void memfile_node_invalidate_end(struct memfile_invalidation *inv);

#endif /* _MEMFILE_STORE_H */
