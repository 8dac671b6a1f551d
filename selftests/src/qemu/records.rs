// SPDX-License-Identifier: GPL-2.0
//! The records that a QEMU leaves in its folder, and how it ended.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a console that are shown if a guest does not come up.
pub(super) const TAIL: usize = 40;
/// The file of the guest's console.
pub(super) const CONSOLE: &str = "console";

/// The process and the folder of a QEMU: they tell why it ended.
pub(super) struct Records {
    pub(super) pid: i32,
    pub(super) folder: PathBuf,
}

impl Records {
    /// Why QEMU is gone: its exit status, its standard error, and the last lines of the guest's
    /// console. Leaves it to be waited for.
    pub(super) fn end(&self) -> String {
        // SAFETY: All zero is a valid siginfo_t, which outlives the call; WNOWAIT leaves the child.
        let (ended, code, status) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let flags = libc::WEXITED | libc::WNOWAIT;
            let ret = libc::waitid(libc::P_PID, self.pid as libc::id_t, &mut info, flags);
            (ret == 0, info.si_code, info.si_status())
        };
        let how = match (ended, code) {
            (true, libc::CLD_EXITED) => format!("exit code {status}"),
            (true, _) => format!("signal {status}"),
            (false, _) => "unknown end".to_owned(),
        };
        let (said, console) = (said(&self.folder), console_tail(&self.folder, TAIL));
        format!("{how}\n--- QEMU says\n{said}\n--- the last lines of its console\n{console}\n---")
    }
}

/// The standard error of a QEMU.
pub(super) fn said(folder: &Path) -> String {
    let text = fs::read_to_string(folder.join("said")).unwrap_or_default();
    text.trim().to_owned()
}

/// The last lines of a guest's console.
pub(super) fn console_tail(folder: &Path, lines: usize) -> String {
    let text = fs::read(folder.join(CONSOLE)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    let text: Vec<_> = text.lines().collect();
    text[text.len().saturating_sub(lines)..].join("\n")
}
