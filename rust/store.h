/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Backing stores beside shmem.  memfile.ko exports this for modules that have
 * files of their own, with pages that consumers (KVM) are to map.
 *
 * A store makes the files, says which they are and gives their pages;
 * memfile.ko knows who has bound which of them, as it does for memfds.
 */
#ifndef _MEMFILE_STORE_H
#define _MEMFILE_STORE_H

#include <linux/memfile.h>

/**
 * struct memfile_store - where files that are not shmem's have their pages
 * @lookup: the node of @file, or NULL if it is none of this store's files.
 *	Does not sleep.
 * @get_page: the page at @index, which is below the size of @inode; zeroed if
 *	it is new.  With a reference for the consumer, which memfile.ko gives
 *	back.  A page of a large folio has the same place in its folio as in its
 *	naturally aligned block of the file.  Otherwise an ERR_PTR.  May sleep,
 *	and may run at any time while the node is bound.
 *
 * Both are mandatory, and never called for a file that nobody holds: its
 * f_op->owner is what keeps the store's module.
 *
 * A page leaves its file between memfile_node_invalidate_start() and
 * memfile_node_invalidate_end(), and is not given any more when the latter is
 * called.  What was given until then stays memory of its own until its
 * reference is given back; consumers that get it too late do not map it.
 */
struct memfile_store {
	struct memfile_node *(*lookup)(struct file *file);
	struct page *(*get_page)(struct inode *inode, pgoff_t index);
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
 * @store: what was registered
 *
 * Those that there are stay as they are.  @lookup is not called any more when
 * this returns.
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
 *	flags of its mapping say what consumers want of them.
 * @store: whose it is, registered or not
 *
 * Context: May sleep.
 * Return: the node, or an ERR_PTR.
 */
struct memfile_node *memfile_node_create(struct inode *inode,
					 const struct memfile_store *store);

/**
 * memfile_node_destroy - undo memfile_node_create()
 * @node: the node; nobody holds a file of it any more, so nobody has it bound
 *
 * Context: May sleep; waits for running invalidations.
 */
void memfile_node_destroy(struct memfile_node *node);

/**
 * memfile_node_invalidate_start - pages are about to leave their file
 * @node: the file's node
 * @inv: of the caller, who keeps it until memfile_node_invalidate_end()
 * @start: the first page
 * @end: behind the last one
 *
 * No consumer has them mapped when this returns, or maps them before the end.
 *
 * Context: May sleep.  What the caller holds must not be wanted by who waits
 * for the end of an invalidation: (un)registration of notifiers, under KVM's
 * slots_lock.
 */
void memfile_node_invalidate_start(struct memfile_node *node,
				   struct memfile_invalidation *inv,
				   pgoff_t start, pgoff_t end);

/**
 * memfile_node_invalidate_end - they have left it
 * @inv: of memfile_node_invalidate_start()
 *
 * Context: As above.
 */
void memfile_node_invalidate_end(struct memfile_invalidation *inv);

#endif /* _MEMFILE_STORE_H */
