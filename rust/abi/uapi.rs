// SPDX-License-Identifier: GPL-2.0

//! The policy layer does not use the kernel's headers, so it has numbers of its own. They are
//! compared here with those of C's headers: the module does not compile unless they are the same.
//!
//! C headers: [`include/uapi/linux/memfile.h`](srctree/include/uapi/linux/memfile.h),
//! [`include/uapi/linux/falloc.h`](srctree/include/uapi/linux/falloc.h)

use crate::bindings;
use crate::policy::file;
use crate::policy::flags::Flags;
use crate::policy::range;
use kernel::static_assert;

static_assert!(range::PAGE_SIZE == kernel::page::PAGE_SIZE as u64);
static_assert!(1 << range::PAGE_SHIFT == range::PAGE_SIZE);

static_assert!(Flags::USER_INACCESSIBLE as u64 == bindings::MEMFILE_F_USER_INACCESSIBLE as u64);
static_assert!(Flags::UNMOVABLE as u64 == bindings::MEMFILE_F_UNMOVABLE as u64);
static_assert!(Flags::UNRECLAIMABLE as u64 == bindings::MEMFILE_F_UNRECLAIMABLE as u64);
static_assert!(Flags::KERNEL_INACCESSIBLE as u64 == bindings::MEMFILE_F_KERNEL_INACCESSIBLE as u64);
static_assert!(Flags::PINNED as u64 == bindings::MEMFILE_F_DEFAULT as u64);
// No flag of the header is missing here.
static_assert!(Flags::ALL as u64 == bindings::MEMFILE_F_ALLOWED_MASK as u64);

static_assert!(file::KEEP_SIZE == bindings::FALLOC_FL_KEEP_SIZE);
static_assert!(file::PUNCH_HOLE == bindings::FALLOC_FL_PUNCH_HOLE);
