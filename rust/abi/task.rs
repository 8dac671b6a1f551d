// SPDX-License-Identifier: GPL-2.0

//! The task that runs.
//!
//! C header: [`include/linux/sched/signal.h`](srctree/include/linux/sched/signal.h)

use crate::bindings;

/// Is a fatal signal pending, so that nobody sees what the task returns? Any task; false where none
/// runs.
pub(crate) fn killed() -> bool {
    // SAFETY: May be called anywhere.
    unsafe { bindings::memfile_task_killed() }
}
