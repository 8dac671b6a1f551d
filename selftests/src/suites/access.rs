// SPDX-License-Identifier: GPL-2.0
//! No system call gives access to the content of an inaccessible memfd, and no attempt allocates a
//! page (rule 3).
//!
//! Where a generic layer of the kernel refuses a request before the file is asked, the case expects
//! the errno of that layer and names it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::null_mut;

use anyhow::{Context, Result, bail, ensure};
use libc::{c_int, c_void, iovec, loff_t};

use crate::ktap::{CaseResult, skip};
use crate::support::backend::Backend;
use crate::support::uring;
use crate::sys::*;
use crate::{MIB, PAGE, conformance};

conformance!(
    "access",
    [
        read_is_refused,
        write_is_refused,
        pread_and_pwrite_are_refused,
        vectored_io_is_refused,
        append_is_refused,
        splice_is_refused_both_ways,
        sendfile_is_refused_both_ways,
        tee_and_vmsplice_do_not_apply,
        remap_of_another_mapping_cannot_reach_it,
        io_uring_is_refused,
        aio_is_refused,
        loop_device_gets_nothing,
        exec_is_refused,
        module_loading_is_refused,
        swapon_is_refused,
        reopening_gives_no_access,
        open_by_handle_gives_no_access,
        readahead_and_fadvise_change_nothing,
        fadvise_drops_no_content,
        mmap_is_refused,
        userfaultfd_has_nothing_to_register,
        seek_tells_only_what_is_allocated,
        sync_works_and_shows_nothing,
    ],
    huge: all,
    // Their other file is on another file system than a file of huge pages. `hugetlb` has its own.
    small: [copy_file_range_is_refused_both_ways, clone_is_refused],
);

const EPERM: &[Errno] = &[Errno::EPERM];

/// A file of 1 MiB: empty, or fully allocated.
fn files(on: &Backend) -> Result<[(OwnedFd, u64); 2]> {
    let full = on.file(MIB)?;
    allocate(&full, 0, file_size(&full)?)?;
    // More than a MiB where pages are huge.
    let held = allocated(&full)?;
    Ok([(on.file(MIB)?, 0), (full, held)])
}

/// Run `attempt` on an empty and on a full file; afterwards each holds what it held.
fn on_each(on: &Backend, mut attempt: impl FnMut(&OwnedFd) -> CaseResult) -> CaseResult {
    for (fd, held) in files(on)? {
        let before = file_size(&fd)?;
        attempt(&fd).with_context(|| format!("file that holds {held} bytes"))?;
        expect_allocated(&fd, held, "after the attempt")?;
        let size = file_size(&fd)?;
        ensure!(size == before, "the size became {size}");
    }
    Ok(())
}

/// Refused, with a buffer that stays as it was.
fn refused(
    on: &Backend,
    what: &str,
    wanted: &[Errno],
    call: impl Fn(c_int, *mut c_void, usize) -> isize,
) -> CaseResult {
    on_each(on, |fd| {
        for len in [1, 8, 4096, 8192] {
            let mut buffer = vec![0x5au8; len];
            let ret = call(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), len);
            on.errno(what, check(ret as i64), wanted).with_context(|| format!("{len} bytes"))?;
            ensure!(buffer.iter().all(|&b| b == 0x5a), "{what} changed the buffer");
        }
        Ok(())
    })
}

fn read_is_refused(on: &'static Backend) -> CaseResult {
    // SAFETY: The buffer has the given length.
    refused(on, "read", EPERM, |fd, p, n| unsafe { libc::read(fd, p, n) })
}

fn write_is_refused(on: &'static Backend) -> CaseResult {
    // SAFETY: The buffer has the given length.
    refused(on, "write", EPERM, |fd, p, n| unsafe { libc::write(fd, p, n) })
}

fn pread_and_pwrite_are_refused(on: &'static Backend) -> CaseResult {
    for offset in [0, 100, 4096, MIB as i64 - 1, MIB as i64, 1 << 40] {
        let at = || format!("at {offset:#x}");
        // SAFETY: The buffer has the given length.
        refused(on, "pread", EPERM, |fd, p, n| unsafe { libc::pread(fd, p, n, offset) })
            .with_context(at)?;
        // SAFETY: As above.
        refused(on, "pwrite", EPERM, |fd, p, n| unsafe { libc::pwrite(fd, p, n, offset) })
            .with_context(at)?;
    }
    Ok(())
}

fn vectored_io_is_refused(on: &'static Backend) -> CaseResult {
    let iov = |p, n| iovec { iov_base: p, iov_len: n };
    // SAFETY: The vector and its buffer outlive each call.
    unsafe {
        refused(on, "readv", EPERM, |fd, p, n| libc::readv(fd, &iov(p, n), 1))?;
        refused(on, "writev", EPERM, |fd, p, n| libc::writev(fd, &iov(p, n), 1))?;
        refused(on, "preadv", EPERM, |fd, p, n| libc::preadv(fd, &iov(p, n), 1, 0))?;
        refused(on, "pwritev", EPERM, |fd, p, n| libc::pwritev(fd, &iov(p, n), 1, 0))?;
        for flags in [0, libc::RWF_HIPRI] {
            refused(on, "preadv2", EPERM, |fd, p, n| libc::preadv2(fd, &iov(p, n), 1, 0, flags))?;
            refused(on, "pwritev2", EPERM, |fd, p, n| libc::pwritev2(fd, &iov(p, n), 1, 0, flags))?;
        }
    }
    Ok(())
}

fn append_is_refused(on: &'static Backend) -> CaseResult {
    on_each(on, |fd| {
        let flags = libc::O_WRONLY | libc::O_APPEND;
        let Some(append) = on.works("reopen", reopen(fd, flags))? else {
            return Ok(());
        };
        // SAFETY: The buffer has this length.
        let ret = unsafe { libc::write(append.as_raw_fd(), b"data".as_ptr().cast(), 4) };
        on.errno("write at the end", check(ret as i64), EPERM)
    })
}

fn splice(from: &OwnedFd, at: *mut loff_t, to: &OwnedFd, to_at: *mut loff_t) -> SysResult {
    // SAFETY: Each offset is null or outlives the call.
    let ret = unsafe { libc::splice(from.as_raw_fd(), at, to.as_raw_fd(), to_at, 4096, 0) };
    check(ret as i64)
}

fn splice_is_refused_both_ways(on: &'static Backend) -> CaseResult {
    on_each(on, |fd| {
        let (reader, writer) = pipe()?;
        on.errno("splice out", splice(fd, null_mut(), &writer, null_mut()), EPERM)?;
        let mut offset = 4096;
        on.errno("splice out", splice(fd, &mut offset, &writer, null_mut()), EPERM)?;
        ensure!(offset == 4096, "the offset moved to {offset}");
        // SAFETY: The buffer has this length.
        check(unsafe { libc::write(writer.as_raw_fd(), [7u8; 4096].as_ptr().cast(), 4096) } as i64)?;
        on.errno("splice in", splice(&reader, null_mut(), fd, null_mut()), EPERM)?;
        on.errno("splice in", splice(&reader, null_mut(), fd, &mut offset), EPERM)
    })
}

fn sendfile_is_refused_both_ways(on: &'static Backend) -> CaseResult {
    let other = memfd(MIB)?;
    let send = |to: &OwnedFd, from: &OwnedFd| {
        // SAFETY: Takes no pointer but null.
        check(unsafe { libc::sendfile(to.as_raw_fd(), from.as_raw_fd(), null_mut(), 4096) } as i64)
    };
    on_each(on, |fd| {
        on.errno("from it to a file", send(&other, fd), EPERM)?;
        on.errno("to it from a file", send(fd, &other), EPERM)?;
        let (_reader, writer) = pipe()?;
        on.errno("from it to a pipe", send(&writer, fd), EPERM)
    })?;
    expect_allocated(&other, 0, "the other file")
}

fn copy_file_range_is_refused_both_ways(on: &'static Backend) -> CaseResult {
    let other = memfd(MIB)?;
    let copy = |from: &OwnedFd, to: &OwnedFd| copy_file_range(from, 0, to, MIB / 2, 4096);
    let second = on.file(MIB)?;
    on_each(on, |fd| {
        on.errno("out of it", copy(fd, &other), EPERM)?;
        on.errno("into it", copy(&other, fd), EPERM)?;
        on.errno("within it", copy(fd, fd), EPERM)?;
        on.errno("to another of its kind", copy(fd, &second), EPERM)
    })?;
    expect_allocated(&other, 0, "the other file")
}

/// Both work on pipes only: the kernel refuses before it looks at the file.
fn tee_and_vmsplice_do_not_apply(on: &'static Backend) -> CaseResult {
    on_each(on, |fd| {
        let (_reader, writer) = pipe()?;
        // SAFETY: Takes no pointer.
        let ret = unsafe { libc::tee(fd.as_raw_fd(), writer.as_raw_fd(), 4096, 0) };
        on.errno("tee", check(ret as i64), &[Errno::EINVAL])?;
        let mut word = 0u64;
        let iov = iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
        // SAFETY: The vector and its buffer outlive the call.
        let ret = unsafe { libc::vmsplice(fd.as_raw_fd(), &iov, 1, 0) };
        on.errno("vmsplice", check(ret as i64), &[Errno::EBADF])
    })
}

/// No remap_file_range: the VFS refuses.
fn clone_is_refused(on: &'static Backend) -> CaseResult {
    let other = memfd(MIB)?;
    on_each(on, |fd| {
        for (to, from) in [(fd, &other), (&other, fd)] {
            on.errno("FICLONE", clone_file(from, to), &[Errno::EOPNOTSUPP])?;
        }
        Ok(())
    })
}

fn mmap_is_refused(on: &'static Backend) -> CaseResult {
    let prots = [
        ("PROT_NONE", libc::PROT_NONE),
        ("PROT_READ", libc::PROT_READ),
        ("PROT_WRITE", libc::PROT_WRITE),
        ("PROT_READ|WRITE", libc::PROT_READ | libc::PROT_WRITE),
        ("PROT_READ|EXEC", libc::PROT_READ | libc::PROT_EXEC),
    ];
    let kinds = [
        ("MAP_SHARED", libc::MAP_SHARED),
        ("MAP_SHARED_VALIDATE", libc::MAP_SHARED_VALIDATE),
        ("MAP_PRIVATE", libc::MAP_PRIVATE),
        ("MAP_PRIVATE|POPULATE", libc::MAP_PRIVATE | libc::MAP_POPULATE),
        ("MAP_SHARED|LOCKED", libc::MAP_SHARED | libc::MAP_LOCKED),
    ];
    let size = MIB.max(on.page);
    on_each(on, |fd| {
        for (prot_name, prot) in prots {
            for (kind_name, kind) in kinds {
                for offset in [0, size - on.page, size] {
                    let what = format!("mmap {prot_name} {kind_name} at {offset:#x}");
                    let result = Mapping::map(on.page, prot, kind, Some((fd.as_fd(), offset)));
                    on.errno(&format!("mmap {kind_name}"), result, EPERM).context(what)?;
                }
            }
        }
        Ok(())
    })
}

/// remap_file_pages works on a mapping, and there is none of the file: the kernel refuses the
/// address.
fn remap_of_another_mapping_cannot_reach_it(on: &'static Backend) -> CaseResult {
    drop(on.file(PAGE)?);
    let view = Mapping::anonymous(PAGE)?;
    // SAFETY: Names a mapping of ours, which the call may at most leave alone.
    let ret = unsafe { libc::syscall(libc::SYS_remap_file_pages, view.addr(), PAGE, 0, 0, 0) };
    on.errno("remap_file_pages", check(ret), &[Errno::EINVAL])
}

fn io_uring_is_refused(on: &'static Backend) -> CaseResult {
    let mut ring = match uring::Ring::new() {
        Ok(ring) => ring,
        Err(Errno::ENOSYS | Errno::EPERM) => return skip("the kernel has no io_uring"),
        Err(errno) => bail!("io_uring_setup: {errno}"),
    };
    on_each(on, |fd| {
        for write in [false, true] {
            let mut buffer = [0x5au8; 4096];
            let result = ring.transfer(fd.as_raw_fd(), &mut buffer, write)?;
            on.errno(if write { "write" } else { "read" }, result, EPERM)?;
            ensure!(buffer.iter().all(|&b| b == 0x5a), "the buffer changed");
        }
        Ok(())
    })
}

fn aio_is_refused(on: &'static Backend) -> CaseResult {
    let Ok(mut context) = uring::AioContext::new() else {
        return skip("the kernel has no aio");
    };
    on_each(on, |fd| {
        for write in [false, true] {
            let mut buffer = [0x5au8; 4096];
            let result = context.transfer(fd.as_raw_fd(), &mut buffer, write)?;
            on.errno(if write { "write" } else { "read" }, result, EPERM)?;
            ensure!(buffer.iter().all(|&b| b == 0x5a), "the buffer changed");
        }
        Ok(())
    })
}

/// Refused at the set-up, not only at reads and writes.
fn loop_device_gets_nothing(on: &'static Backend) -> CaseResult {
    const LOOP_SET_FD: u64 = 0x4c00;
    const LOOP_CONFIGURE: u64 = 0x4c0a;
    const LOOP_CTL_GET_FREE: u64 = 0x4c82;
    let Ok(control) = open("/dev/loop-control", libc::O_RDWR) else {
        return skip("the kernel has no loop devices");
    };
    on_each(on, |fd| {
        let number = ioctl_val(&control, LOOP_CTL_GET_FREE, 0).context("LOOP_CTL_GET_FREE")?;
        let path = format!("/dev/loop{number}");
        let device = open(&path, libc::O_RDWR).with_context(|| path)?;
        let set = ioctl_val(&device, LOOP_SET_FD, fd.as_raw_fd() as u64);
        on.errno("LOOP_SET_FD", set, EPERM)?;
        // struct loop_config: the descriptor, the block size, and fields that may be 0.
        let mut config = [0u32; 76];
        config[0] = fd.as_raw_fd() as u32;
        // SAFETY: The structure is as large as that of this ioctl.
        let configured = unsafe { ioctl_mut(device.as_fd(), LOOP_CONFIGURE, &mut config) };
        on.errno("LOOP_CONFIGURE", configured, EPERM)
    })
}

fn exec_is_refused(on: &'static Backend) -> CaseResult {
    on_each(on, |fd| {
        let argv: [*const libc::c_char; 2] = [c"x".as_ptr(), std::ptr::null()];
        // SAFETY: The vectors are terminated. On success the test would be gone, which is noticed.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_execveat,
                fd.as_raw_fd(),
                c"".as_ptr(),
                argv.as_ptr(),
                argv[1..].as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        };
        on.errno("execveat", check(ret), EPERM)
    })
}

/// The module loader wants a file without a writer, so it gets a descriptor of its own.
fn module_loading_is_refused(on: &'static Backend) -> CaseResult {
    require_root()?;
    let fd = on.file(MIB)?;
    let Some(reader) = on.works("reopen", reopen(&fd, libc::O_RDONLY))? else {
        return Ok(());
    };
    // SAFETY: The parameters are a C string.
    let load = |fd: &OwnedFd| unsafe {
        check(libc::syscall(libc::SYS_finit_module, fd.as_raw_fd(), c"".as_ptr(), 0))
    };
    on.errno("while there are writers", load(&reader), &[Errno::EPERM, Errno::ETXTBSY])?;
    drop(fd);
    on.errno("finit_module", load(&reader), EPERM)?;
    expect_allocated(&reader, 0, "after finit_module")
}

/// Swap files need bmap or swap_activate, or at least read_folio: swapon refuses.
fn swapon_is_refused(on: &'static Backend) -> CaseResult {
    require_root()?;
    on_each(on, |fd| {
        let path = format!("/proc/self/fd/{}\0", fd.as_raw_fd());
        // SAFETY: The path is a C string.
        let ret = unsafe { libc::swapon(path.as_ptr().cast(), 0) };
        on.errno("swapon", check(ret), &[Errno::EINVAL, Errno::EPERM])
    })
}

fn reopening_gives_no_access(on: &'static Backend) -> CaseResult {
    on_each(on, |fd| {
        for mode in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
            for extra in [0, libc::O_NONBLOCK, libc::O_SYNC, libc::O_NOATIME, libc::O_APPEND] {
                let Some(again) = on.works("reopen", reopen(fd, mode | extra))? else {
                    continue;
                };
                let mut word = 0u64;
                let buffer: *mut c_void = (&raw mut word).cast();
                if mode != libc::O_WRONLY {
                    // SAFETY: The buffer has this length.
                    let ret = unsafe { libc::read(again.as_raw_fd(), buffer, 8) };
                    on.errno("read", check(ret as i64), EPERM)?;
                }
                if mode != libc::O_RDONLY {
                    // SAFETY: The buffer has this length.
                    let ret = unsafe { libc::write(again.as_raw_fd(), buffer, 8) };
                    on.errno("write", check(ret as i64), EPERM)?;
                }
            }
        }
        // A memfd has no direct I/O, or refuses it like the rest.
        if let Ok(direct) = reopen(fd, libc::O_RDWR | libc::O_DIRECT) {
            let mut buffer = [0u8; 4096];
            // SAFETY: The buffer has this length.
            let ret = unsafe { libc::read(direct.as_raw_fd(), buffer.as_mut_ptr().cast(), 4096) };
            on.errno("direct read", check(ret as i64), EPERM)?;
        }
        Ok(())
    })
}

/// A file handle bypasses the descriptor: the file that it opens has no more access.
fn open_by_handle_gives_no_access(on: &'static Backend) -> CaseResult {
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: c_int,
        data: [u8; 128],
    }
    let anchor = memfd(PAGE)?;
    on_each(on, |fd| {
        let mut handle = Handle { bytes: 128, kind: 0, data: [0; 128] };
        let mut mount = 0;
        // SAFETY: The handle has the room it says, and everything outlives the call.
        let ret = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                fd.as_raw_fd(),
                c"".as_ptr(),
                &raw mut handle,
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        if let Err(errno) = check(ret) {
            println!("the file has no handle: {errno}");
            return Ok(());
        }
        for mode in [libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC] {
            let number = libc::SYS_open_by_handle_at;
            // SAFETY: The handle is one the kernel made.
            let ret = unsafe { libc::syscall(number, anchor.as_raw_fd(), &raw mut handle, mode) };
            let Ok(opened) = check(ret) else { continue };
            let mut word = 0u64;
            // SAFETY: The buffer has this length, the descriptor was just made.
            let ret = unsafe { libc::read(opened as c_int, (&raw mut word).cast(), 8) };
            let result = check(ret as i64);
            // SAFETY: The descriptor is ours.
            unsafe { libc::close(opened as c_int) };
            on.errno("read by handle", result, EPERM)?;
        }
        Ok(())
    })
}

/// They are hints, and may succeed or fail; only their effect counts.
fn readahead_and_fadvise_change_nothing(on: &'static Backend) -> CaseResult {
    on_each(on, |fd| {
        let fd = fd.as_raw_fd();
        // SAFETY: None of these takes a pointer.
        unsafe {
            libc::readahead(fd, 0, MIB as usize);
            libc::posix_fadvise(fd, 0, MIB as i64, libc::POSIX_FADV_WILLNEED);
            libc::posix_fadvise(fd, 0, MIB as i64, libc::POSIX_FADV_NOREUSE);
        }
        Ok(())
    })
}

/// Clean pages may be dropped; a page that a guest wrote must not be clean.
fn fadvise_drops_no_content(on: &'static Backend) -> CaseResult {
    use crate::support::setup::{GUEST, Setup};
    let mut s = Setup::new(on, MIB)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    let held = allocated(&s.fd)?;
    // SAFETY: Takes no pointer.
    unsafe { libc::posix_fadvise(s.fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    // Best effort: needs root.
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
    expect_allocated(&s.fd, held, "after DONTNEED and drop_caches")?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

/// userfaultfd works on mappings, and there are none: its ioctls see a mapping of another file, or
/// none.
fn userfaultfd_has_nothing_to_register(on: &'static Backend) -> CaseResult {
    on_each(on, |fd| {
        let file = Some((fd.as_fd(), 0));
        let result = Mapping::map(on.page, libc::PROT_READ, libc::MAP_SHARED, file);
        on.errno("the mapping it would need", result, EPERM)
    })
}

fn seek_tells_only_what_is_allocated(on: &'static Backend) -> CaseResult {
    let fd = on.file(8 * on.page)?;
    allocate(&fd, 4 * on.page, 2 * on.page)?;
    let held = allocated(&fd)?;
    let seek = |from, whence| lseek(&fd, from, whence);
    let end = file_size(&fd)?;
    if let Some(at) = on.works("SEEK_END", seek(0, libc::SEEK_END))? {
        ensure!(at == end, "SEEK_END gives {at}");
    }
    if let Some(at) = on.works("SEEK_HOLE", seek(0, libc::SEEK_HOLE))? {
        ensure!(at == 0, "SEEK_HOLE gives {at}");
    }
    on.errno("SEEK_DATA beyond the end", seek(end, libc::SEEK_DATA), &[Errno::ENXIO])?;
    expect_allocated(&fd, held, "after seeking")
}

fn sync_works_and_shows_nothing(on: &'static Backend) -> CaseResult {
    on_each(on, |fd| {
        // SAFETY: Takes no pointer.
        on.works("fsync", check(unsafe { libc::fsync(fd.as_raw_fd()) }))?;
        // SAFETY: Takes no pointer.
        on.works("fdatasync", check(unsafe { libc::fdatasync(fd.as_raw_fd()) })).map(drop)
    })
}
