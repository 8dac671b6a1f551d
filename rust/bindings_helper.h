/* SPDX-License-Identifier: GPL-2.0 */
/* Input of bindgen; Kbuild lists the names that it takes. */
#include <linux/anon_inodes.h>
#include <linux/fs.h>
#include <linux/file.h>
#include <linux/delay.h>
#include <linux/falloc.h>
#include <linux/interval_tree.h>
#include <linux/migrate.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <uapi/linux/memfd.h>
#include "shim.h"
#include "store.h"
#include "test/store/shim.h"
