// SPDX-License-Identifier: GPL-2.0
//! One transfer at a time through io_uring and through AIO, with plain system calls.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use libc::c_int;

use crate::sys::{Errno, Mapping, SysResult, check};

/// The part of `struct io_uring_params` that matters here, with the rest as padding.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    unused: [u32; 4],
    reserved: [u32; 3],
    /// Byte offsets in the ring: head, tail, mask, entries, flags, dropped, array, reserved.
    sq: [u32; 10],
    /// Byte offsets in the ring: head, tail, mask, entries, overflow, entries, flags, reserved.
    cq: [u32; 10],
}

const _: () = assert!(std::mem::size_of::<Params>() == 120);

/// `struct io_uring_sqe` for reads and writes.
#[repr(C)]
struct Submission {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    addr: u64,
    len: u32,
    rest: [u32; 9],
}

const _: () = assert!(std::mem::size_of::<Submission>() == 64);

const IORING_OFF_SQES: u64 = 0x1000_0000;
const IORING_OP_READ: u8 = 22;
const IORING_OP_WRITE: u8 = 23;
const IORING_ENTER_GETEVENTS: u32 = 1;

/// An io_uring with one transfer in flight at most.
pub struct Ring {
    fd: OwnedFd,
    params: Params,
    rings: Mapping,
    entries: Mapping,
}

impl Ring {
    pub fn new() -> SysResult<Ring> {
        let mut params = Params::default();
        // SAFETY: The parameters outlive the call.
        let fd = check(unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, &raw mut params) })?;
        // SAFETY: A new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as c_int) };
        // Both rings are in one mapping since 5.4.
        let rings = Mapping::anywhere(&fd, 0, 4096)?;
        let entries = Mapping::anywhere(&fd, IORING_OFF_SQES, 4096)?;
        Ok(Ring { fd, params, rings, entries })
    }

    /// The 32-bit word at byte `offset` of the rings.
    fn word(&self, offset: u32) -> &AtomicU32 {
        assert!(offset % 4 == 0 && u64::from(offset) + 4 <= self.rings.len());
        // SAFETY: Inside the mapping, aligned, and atomic on both sides.
        unsafe { &*((self.rings.addr() + u64::from(offset)) as *const AtomicU32) }
    }

    /// Read or write `buffer` at the start of a file: the result of the completion.
    pub fn transfer(&mut self, fd: c_int, buffer: &mut [u8], write: bool) -> Result<SysResult> {
        let [head, tail, mask, .., array, _, _, _] = self.params.sq;
        let index =
            self.word(tail).load(Ordering::Relaxed) & self.word(mask).load(Ordering::Relaxed);
        let _ = head;
        let entry = Submission {
            opcode: if write { IORING_OP_WRITE } else { IORING_OP_READ },
            flags: 0,
            priority: 0,
            fd,
            offset: 0,
            addr: buffer.as_mut_ptr() as u64,
            len: buffer.len() as u32,
            rest: [0; 9],
        };
        // SAFETY: A submission is 64 bytes of plain data.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const entry).cast::<u8>(), 64) };
        self.entries.copy_in(u64::from(index) * 64, bytes);
        self.word(array + index * 4).store(index, Ordering::Relaxed);
        self.word(tail).fetch_add(1, Ordering::Release);
        // SAFETY: The buffer outlives the transfer, because we wait for its completion.
        let ret = unsafe {
            let (number, fd) = (libc::SYS_io_uring_enter, self.fd.as_raw_fd());
            libc::syscall(number, fd, 1, 1, IORING_ENTER_GETEVENTS, 0, 0)
        };
        ensure!(check(ret).context("io_uring_enter")? == 1, "nothing was submitted");
        let [head, tail, mask, _, _, entries, ..] = self.params.cq;
        let at = self.word(head).load(Ordering::Relaxed);
        ensure!(at != self.word(tail).load(Ordering::Acquire), "nothing was completed");
        let index = at & self.word(mask).load(Ordering::Relaxed);
        // A completion: user data (8 bytes), result (4), flags (4).
        let result = self.word(entries + index * 16 + 8).load(Ordering::Relaxed) as i32;
        self.word(head).store(at.wrapping_add(1), Ordering::Release);
        Ok(if result < 0 { Err(Errno(-result)) } else { Ok(result.into()) })
    }
}

/// `struct iocb` for reads and writes.
#[repr(C)]
#[derive(Default)]
struct ControlBlock {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    rest: [u64; 2],
}

const _: () = assert!(std::mem::size_of::<ControlBlock>() == 64);

const IOCB_CMD_PREAD: u16 = 0;
const IOCB_CMD_PWRITE: u16 = 1;

/// An AIO context with one transfer in flight at most.
pub struct AioContext(libc::c_ulong);

impl AioContext {
    pub fn new() -> SysResult<AioContext> {
        let mut context = 0;
        // SAFETY: The context outlives the call.
        check(unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) })?;
        Ok(AioContext(context))
    }

    /// Read or write `buffer` at the start of a file: the result of the event, or the refusal.
    pub fn transfer(&mut self, fd: c_int, buffer: &mut [u8], write: bool) -> Result<SysResult> {
        let block = ControlBlock {
            opcode: if write { IOCB_CMD_PWRITE } else { IOCB_CMD_PREAD },
            fd: fd as u32,
            buffer: buffer.as_mut_ptr() as u64,
            len: buffer.len() as u64,
            ..ControlBlock::default()
        };
        let blocks = [&raw const block];
        // SAFETY: Block and buffer outlive the transfer, because we wait for its event.
        let ret = unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, blocks.as_ptr()) };
        if let Err(errno) = check(ret) {
            return Ok(Err(errno));
        }
        // An event: data, block, result, second result.
        let mut event = [0i64; 4];
        // SAFETY: The event outlives the call.
        let ret = unsafe {
            let (number, event) = (libc::SYS_io_getevents, event.as_mut_ptr());
            libc::syscall(number, self.0, 1, 1, event, std::ptr::null::<libc::timespec>())
        };
        ensure!(check(ret).context("io_getevents")? == 1, "no event");
        let result = event[2];
        Ok(if result < 0 { Err(Errno(-result as c_int)) } else { Ok(result) })
    }
}

impl Drop for AioContext {
    fn drop(&mut self) {
        // SAFETY: The context is ours and nothing is in flight.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memfd;

    #[test]
    fn transfers_really_transfer() {
        let fd = memfd(4096).unwrap();
        // A sandbox may forbid io_uring; anything else is an error of ours.
        let ring = Ring::new();
        assert!(!matches!(ring, Err(errno) if errno != Errno::ENOSYS && errno != Errno::EPERM));
        if let Ok(mut ring) = ring {
            for n in 1..9u8 {
                let (mut out, mut back) = ([n; 100], [0; 100]);
                assert_eq!(ring.transfer(fd.as_raw_fd(), &mut out, true).unwrap(), Ok(100));
                assert_eq!(ring.transfer(fd.as_raw_fd(), &mut back, false).unwrap(), Ok(100));
                assert_eq!(out, back);
            }
        }
        if let Ok(mut aio) = AioContext::new() {
            let (mut out, mut back) = ([77; 100], [0; 100]);
            assert_eq!(aio.transfer(fd.as_raw_fd(), &mut out, true).unwrap(), Ok(100));
            assert_eq!(aio.transfer(fd.as_raw_fd(), &mut back, false).unwrap(), Ok(100));
            assert_eq!(out, back);
        }
    }
}
