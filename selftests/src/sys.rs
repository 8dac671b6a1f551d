// SPDX-License-Identifier: GPL-2.0
//! System calls, with the errno kept as a number that can be compared and named.

use std::ffi::CString;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libc::{c_int, c_long, c_void};

use crate::PAGE;
use crate::skip::{missing_memfile, skip};
use crate::uapi::{
    F_SEAL_AUTO_ALLOCATE, MFD_CLOEXEC, MFD_HUGE_SHIFT, MFD_HUGETLB, MFD_INACCESSIBLE, MFD_ONE_VM,
};

/// An errno.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub c_int);

/// Makes the constants and the names at once.
macro_rules! errnos {
    ($($name:ident)*) => {
        impl Errno {
            $(pub const $name: Errno = Errno(libc::$name);)*

            fn name(self) -> Option<&'static str> {
                match self {
                    $(Errno::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF EAGAIN ENOMEM EACCES EFAULT EBUSY EEXIST EXDEV
    ENODEV EINVAL ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS EOVERFLOW ENOSYS EOPNOTSUPP EHWPOISON
}

impl Errno {
    /// Set the calling thread's errno to 0, so that it tells whether a call fails from here on.
    pub fn clear() {
        // SAFETY: The errno is the thread's own.
        unsafe { *libc::__errno_location() = 0 };
    }

    /// The calling thread's errno.
    pub fn last() -> Errno {
        Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Errno {}

/// The result of a system call.
pub type SysResult<T = i64> = std::result::Result<T, Errno>;

/// Turn a raw return value into a [`SysResult`].
pub fn check(ret: impl Into<c_long>) -> SysResult {
    let ret = ret.into();
    if ret < 0 { Err(Errno::last()) } else { Ok(ret) }
}

/// Fail unless `result` is one of `wanted`.
pub fn expect_errno<T: fmt::Debug>(
    what: &str,
    result: SysResult<T>,
    wanted: &[Errno],
) -> Result<()> {
    match result {
        Err(errno) if wanted.contains(&errno) => Ok(()),
        Err(errno) => bail!("{what}: wanted {wanted:?}, got {errno}"),
        Ok(value) => bail!("{what}: wanted {wanted:?}, but it succeeded with {value:?}"),
    }
}

/// Take ownership of a descriptor that a system call has just made.
fn owned(fd: i64) -> OwnedFd {
    // SAFETY: The callers pass what a successful system call returned as a new descriptor.
    unsafe { OwnedFd::from_raw_fd(fd as c_int) }
}

/// Mount what is at `place` again, with these options and no others.
pub fn remount(place: &str, options: &str) -> SysResult<()> {
    let string = |text: &str| std::ffi::CString::new(text).map_err(|_| Errno::EINVAL);
    let (place, options) = (string(place)?, string(options)?);
    let (nothing, flags) = (std::ptr::null(), libc::MS_REMOUNT);
    // SAFETY: The strings outlive the call.
    let ret =
        unsafe { libc::mount(nothing, place.as_ptr(), nothing, flags, options.as_ptr().cast()) };
    check(ret).map(drop)
}

/// The policy by which this thread gets memory: `MPOL_…`, and the nodes as bits.
pub fn set_mempolicy(mode: i32, nodes: u64) -> SysResult<()> {
    // As many bits as the kernel looks at, and one more.
    // SAFETY: The mask outlives the call.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &raw const nodes, 64u64) })
        .map(drop)
}

/// `memfd_create(2)` with any flags.
pub fn memfd_create(flags: u32) -> SysResult<OwnedFd> {
    // SAFETY: The name is a C string.
    check(unsafe { libc::syscall(libc::SYS_memfd_create, c"memfile-test".as_ptr(), flags) })
        .map(owned)
}

/// `memfd_secret(2)`, `size` bytes; SKIP where the kernel has none. Its pages count as locked: this
/// process may lock as many as it likes from then on.
pub fn memfd_secret(size: u64) -> Result<OwnedFd> {
    let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: The pointer is to a limit of this function's.
    check(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) }).context("RLIMIT_MEMLOCK")?;
    // SAFETY: Takes no pointer.
    let fd = match check(unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) }) {
        Ok(fd) => owned(fd),
        Err(Errno::ENOSYS) => return skip("the kernel has no memfd_secret"),
        Err(errno) => bail!("memfd_secret: {errno}"),
    };
    ftruncate(&fd, size).context("ftruncate")?;
    Ok(fd)
}

/// An inaccessible memfd of `size` bytes; SKIP where the kernel has none.
pub fn memfile(size: u64) -> Result<OwnedFd> {
    let fd = memfile_unsized()?;
    ftruncate(&fd, size).context("set the size of a memfile")?;
    Ok(fd)
}

/// An inaccessible memfd without a size; SKIP where the kernel has none.
pub fn memfile_unsized() -> Result<OwnedFd> {
    match memfd_create(MFD_CLOEXEC | MFD_INACCESSIBLE) {
        Ok(fd) => Ok(fd),
        Err(Errno::EINVAL) => missing_memfile("the kernel does not know MFD_INACCESSIBLE"),
        Err(Errno::EOPNOTSUPP) => missing_memfile("memfile.ko is not loaded"),
        Err(errno) => bail!("memfd_create(MFD_INACCESSIBLE): {errno}"),
    }
}

/// An inaccessible memfd of `size` bytes that one VM may bind.
pub fn memfile_for_one_vm(size: u64) -> Result<OwnedFd> {
    drop(memfile_unsized()?);
    let fd = memfd_create(MFD_CLOEXEC | MFD_INACCESSIBLE | MFD_ONE_VM).context("MFD_ONE_VM")?;
    ftruncate(&fd, size).context("set the size of a memfile for one VM")?;
    Ok(fd)
}

/// Is this option on in the configuration of the kernel that runs?
pub fn built_with(option: &str) -> Result<bool> {
    let output = std::process::Command::new("zcat").arg("/proc/config.gz").output();
    let output = output.context("zcat /proc/config.gz")?;
    ensure!(output.status.success(), "zcat /proc/config.gz: {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().any(|line| line.strip_prefix(option) == Some("=y")))
}

/// An inaccessible memfd of `size` bytes with pages of `page` bytes from the pool of these.
pub fn memfile_huge(page: u64, size: u64) -> Result<OwnedFd> {
    drop(memfile_unsized()?);
    let fd = memfd_create(memfile_huge_flags(page)).context("a memfile on hugetlbfs")?;
    ftruncate(&fd, size).context("set the size of a memfile")?;
    Ok(fd)
}

/// The flags of `memfd_create(2)` for such a memfile.
pub fn memfile_huge_flags(page: u64) -> u32 {
    MFD_CLOEXEC | MFD_INACCESSIBLE | MFD_HUGETLB | page.ilog2() << MFD_HUGE_SHIFT
}

/// An ordinary memfd of `size` bytes.
pub fn memfd(size: u64) -> Result<OwnedFd> {
    let fd = memfd_create(MFD_CLOEXEC).context("memfd_create")?;
    ftruncate(&fd, size).context("ftruncate of a memfd")?;
    Ok(fd)
}

/// A file of `size` bytes on tmpfs, without a name.
pub fn tmpfs_file(size: u64) -> Result<OwnedFd> {
    let flags = libc::O_TMPFILE | libc::O_RDWR;
    let fd = open("/dev/shm", flags).or_else(|_| open("/tmp", flags)).context("a file on tmpfs")?;
    ftruncate(&fd, size).context("ftruncate of a file on tmpfs")?;
    Ok(fd)
}

/// `pread(2)`.
pub fn pread(fd: impl AsFd, bytes: &mut [u8], at: u64) -> SysResult {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: The buffer has this length.
    check(unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), bytes.len(), at as i64) } as i64)
}

/// `pwrite(2)`.
pub fn pwrite(fd: impl AsFd, bytes: &[u8], at: u64) -> SysResult {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: The buffer has this length.
    check(unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), at as i64) } as i64)
}

/// `lseek(2)`.
pub fn lseek(fd: impl AsFd, offset: u64, whence: c_int) -> SysResult<u64> {
    // SAFETY: Takes no pointer.
    check(unsafe { libc::lseek(fd.as_fd().as_raw_fd(), offset as i64, whence) }).map(|at| at as u64)
}

/// `ftruncate(2)`.
pub fn ftruncate(fd: impl AsFd, size: u64) -> SysResult<()> {
    // SAFETY: Takes no pointer.
    check(unsafe { libc::syscall(libc::SYS_ftruncate, fd.as_fd().as_raw_fd(), size) }).map(drop)
}

/// `fallocate(2)` with any mode; offset and length in bytes.
pub fn fallocate(fd: impl AsFd, mode: c_int, offset: u64, len: u64) -> SysResult<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: Takes no pointer.
    check(unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, len) }).map(drop)
}

/// Allocate the pages of a range; never changes the size of the file.
pub fn allocate(fd: impl AsFd, offset: u64, len: u64) -> SysResult<()> {
    fallocate(fd, libc::FALLOC_FL_KEEP_SIZE, offset, len)
}

/// Punch a hole.
pub fn punch(fd: impl AsFd, offset: u64, len: u64) -> SysResult<()> {
    fallocate(fd, libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE, offset, len)
}

/// `posix_fadvise(2)`.
pub fn fadvise(fd: impl AsFd, offset: u64, len: u64, advice: c_int) -> SysResult<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: Takes no pointer.
    check(unsafe { libc::syscall(libc::SYS_fadvise64, fd, offset, len, advice) }).map(drop)
}

/// `cachestat(2)`: pages in the cache, dirty, under writeback, evicted, recently evicted.
pub fn cachestat(fd: impl AsFd, offset: u64, len: u64) -> SysResult<[u64; 5]> {
    const SYS_CACHESTAT: c_long = 451;
    let (range, mut answer) = ([offset, len], [0; 5]);
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: Both structures are of this call and outlive it.
    check(unsafe { libc::syscall(SYS_CACHESTAT, fd, range.as_ptr(), answer.as_mut_ptr(), 0) })?;
    Ok(answer)
}

/// `sendfile(2)`, from byte `at` on.
pub fn sendfile(to: impl AsFd, from: impl AsFd, at: u64, len: u64) -> SysResult {
    let (from, to, mut at) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd(), at as i64);
    // SAFETY: The offset outlives the call.
    check(unsafe { libc::sendfile(to, from, &mut at, len as usize) } as i64)
}

/// `copy_file_range(2)`, from byte `at` to byte `to_at` on.
pub fn copy_file_range(from: impl AsFd, at: u64, to: impl AsFd, to_at: u64, len: u64) -> SysResult {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    let (mut at, mut to_at) = (at as i64, to_at as i64);
    // SAFETY: Both offsets outlive the call.
    check(unsafe { libc::copy_file_range(from, &mut at, to, &mut to_at, len as usize, 0) } as i64)
}

/// `FICLONE`: `to` shares all content of `from`.
pub fn clone_file(from: impl AsFd, to: impl AsFd) -> SysResult {
    const FICLONE: u64 = 0x4004_9409;
    ioctl_val(to, FICLONE, from.as_fd().as_raw_fd() as u64)
}

/// `FICLONERANGE`: `to` shares a part from byte `to_at` on with that of `from` from byte `at` on.
pub fn clone_range(from: impl AsFd, at: u64, to: impl AsFd, to_at: u64, len: u64) -> SysResult {
    const FICLONERANGE: u64 = 0x4020_940d;
    // struct file_clone_range.
    let mut range = [from.as_fd().as_raw_fd() as u64, at, len, to_at];
    // SAFETY: The structure is that of this ioctl.
    unsafe { ioctl_mut(to.as_fd(), FICLONERANGE, &mut range) }
}

/// `fstat(2)`.
pub fn fstat(fd: impl AsFd) -> SysResult<libc::stat> {
    // SAFETY: All zero is a valid stat.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: The structure outlives the call.
    check(unsafe { libc::fstat(fd.as_fd().as_raw_fd(), &mut st) })?;
    Ok(st)
}

/// Bytes that the file holds, from `st_blocks`.
pub fn allocated(fd: impl AsFd) -> Result<u64> {
    Ok(fstat(fd).context("fstat")?.st_blocks as u64 * 512)
}

/// Fail unless the file holds exactly `bytes`.
pub fn expect_allocated(fd: impl AsFd, bytes: u64, when: &str) -> Result<()> {
    let got = allocated(fd)?;
    ensure!(got == bytes, "{when}: st_blocks says {} KiB, wanted {} KiB", got >> 10, bytes >> 10);
    Ok(())
}

/// Size of the file in bytes.
pub fn file_size(fd: impl AsFd) -> Result<u64> {
    Ok(fstat(fd).context("fstat")?.st_size as u64)
}

/// The seals of a file.
pub fn get_seals(fd: impl AsFd) -> SysResult<u32> {
    // SAFETY: Takes no pointer.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GET_SEALS) }).map(|s| s as u32)
}

/// Add seals to a file.
pub fn add_seals(fd: impl AsFd, seals: u32) -> SysResult<()> {
    // SAFETY: Takes no pointer.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}

/// Add `F_SEAL_AUTO_ALLOCATE`; SKIP if the kernel does not know it.
pub fn seal(fd: &OwnedFd) -> Result<()> {
    match add_seals(fd, F_SEAL_AUTO_ALLOCATE) {
        Ok(()) => Ok(()),
        Err(Errno::EINVAL) => missing_memfile("the kernel does not know F_SEAL_AUTO_ALLOCATE"),
        Err(errno) => bail!("F_ADD_SEALS: {errno}"),
    }
}

/// `open(2)`; a file that is created gets mode 0600.
pub fn open(path: &str, flags: c_int) -> SysResult<OwnedFd> {
    let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
    // SAFETY: The path is a C string.
    check(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC, 0o600) }).map(owned)
}

/// Open the file of `fd` again.
pub fn reopen(fd: impl AsFd, flags: c_int) -> SysResult<OwnedFd> {
    open(&format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()), flags)
}

/// A pipe: read end, write end.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: The array has room for two descriptors.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }).context("pipe2")?;
    Ok((owned(fds[0].into()), owned(fds[1].into())))
}

/// A descriptor to wait for the end of a process.
pub fn pidfd_open(pid: libc::pid_t) -> SysResult<OwnedFd> {
    // SAFETY: Takes no pointer.
    check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) }).map(owned)
}

/// A descriptor of another process, for this one as well.
pub fn pidfd_getfd(pid: libc::pid_t, fd: u32) -> SysResult<OwnedFd> {
    let process = pidfd_open(pid)?;
    // SAFETY: Takes no pointer.
    check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) }).map(owned)
}

/// An ioctl whose argument is a number.
pub fn ioctl_val(fd: impl AsFd, request: u64, value: u64) -> SysResult {
    // SAFETY: The request takes a number, so the kernel dereferences nothing of ours.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, value) })
}

/// An ioctl that takes a number and makes a descriptor.
pub fn ioctl_fd(fd: impl AsFd, request: u64, value: u64) -> SysResult<OwnedFd> {
    ioctl_val(fd, request, value).map(owned)
}

/// An ioctl whose argument is a structure.
///
/// # Safety
///
/// `T` is the structure that `request` reads and writes.
pub unsafe fn ioctl_mut<T>(fd: BorrowedFd, request: u64, arg: &mut T) -> SysResult {
    // SAFETY: By this function's requirement.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(arg)) })
}

/// A memory mapping that is unmapped when dropped.
///
/// A guest or another process may change its content at any time, so access to it is by atomic
/// words only.
#[derive(Debug)]
pub struct Mapping {
    addr: *mut c_void,
    len: usize,
}

// SAFETY: The mapping belongs to the process, not to a thread, and is accessed atomically.
unsafe impl Send for Mapping {}
// SAFETY: As above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map `len` bytes with any protection and flags, at an address aligned to 2 MiB.
    pub fn map(
        len: u64,
        prot: c_int,
        flags: c_int,
        file: Option<(BorrowedFd, u64)>,
    ) -> SysResult<Mapping> {
        Mapping::map_aligned(crate::HUGE, len, prot, flags, file)
    }

    /// The same, at an address aligned to `align` bytes.
    fn map_aligned(
        align: u64,
        len: u64,
        prot: c_int,
        flags: c_int,
        file: Option<(BorrowedFd, u64)>,
    ) -> SysResult<Mapping> {
        let (page, align) = (PAGE as usize, align as usize);
        let len = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
        let whole = len.checked_next_multiple_of(page).ok_or(Errno::EINVAL)?;
        let reserved = whole.checked_add(align).ok_or(Errno::EINVAL)?;
        let (fd, offset) = file.map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
        // Reserve more than `len`, then map at the first aligned address in it.
        let none = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: A new reservation at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), reserved, libc::PROT_NONE, none, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let head = (start as usize).next_multiple_of(align) - start as usize;
        // SAFETY: Stays inside the reservation.
        let target = unsafe { start.byte_add(head) };
        // SAFETY: Replaces a part of the reservation, which nobody uses.
        let addr =
            unsafe { libc::mmap(target, len, prot, flags | libc::MAP_FIXED, fd, offset as i64) };
        if addr == libc::MAP_FAILED {
            let errno = Errno::last();
            // SAFETY: The reservation is ours and unused.
            unsafe { libc::munmap(start, reserved) };
            return Err(errno);
        }
        let tail = align - head;
        // SAFETY: Both are unused parts of the reservation, before and after what was mapped.
        unsafe {
            if head > 0 {
                libc::munmap(start, head);
            }
            if tail > 0 {
                libc::munmap(target.byte_add(whole), tail);
            }
        }
        Ok(Mapping { addr, len })
    }

    /// A shared, writable view of a file that chooses the address itself.
    pub fn anywhere(fd: impl AsFd, offset: u64, len: u64) -> SysResult<Mapping> {
        let len = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: A new mapping at an address of the kernel's choice.
        let addr = unsafe {
            libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, fd, offset as i64)
        };
        if addr == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Mapping { addr, len })
    }

    /// Anonymous memory; nothing is allocated before it is touched.
    pub fn anonymous(len: u64) -> Result<Mapping> {
        Mapping::anonymous_aligned(len, crate::HUGE)
    }

    /// The same, at an address aligned to `align` bytes.
    pub fn anonymous_aligned(len: u64, align: u64) -> Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        Mapping::map_aligned(align, len, libc::PROT_READ | libc::PROT_WRITE, flags, None)
            .with_context(|| format!("map {} KiB of anonymous memory", len >> 10))
    }

    /// A shared, writable view of a file from byte `offset` on.
    pub fn shared(fd: impl AsFd, offset: u64, len: u64) -> Result<Mapping> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        Mapping::map(len, prot, flags, Some((fd.as_fd(), offset))).context("map a file")
    }

    pub fn addr(&self) -> u64 {
        self.addr as u64
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The 64-bit word at byte `offset`.
    ///
    /// # Panics
    ///
    /// If the word is not inside the mapping or not aligned.
    pub fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset % 8 == 0 && offset < self.len() && self.len() - offset >= 8);
        // SAFETY: Inside the mapping, which lives as long as `self`, and aligned; every access to
        // it is atomic on this side.
        unsafe { &*self.addr.byte_add(offset as usize).cast() }
    }

    /// The word at byte `offset`.
    pub fn load(&self, offset: u64) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Set the word at byte `offset`.
    pub fn store(&self, offset: u64, value: u64) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// Copy bytes in at `offset`.
    ///
    /// # Panics
    ///
    /// If they do not fit.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.len());
        // SAFETY: Inside the mapping, and no guest uses this part before it is told to.
        unsafe {
            let to = self.addr.byte_add(offset as usize).cast::<u8>();
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// `madvise(2)` on a part.
    ///
    /// # Panics
    ///
    /// If the part is not inside the mapping.
    pub fn madvise(&self, offset: u64, len: u64, advice: c_int) -> SysResult<()> {
        assert!(offset + len <= self.len());
        // SAFETY: Inside the mapping; its content may change at any time anyway.
        check(unsafe { libc::madvise(self.addr.byte_add(offset as usize), len as usize, advice) })
            .map(drop)
    }

    /// `mprotect(2)` on a part.
    ///
    /// # Panics
    ///
    /// If the part is not inside the mapping.
    pub fn protect(&self, offset: u64, len: u64, prot: c_int) -> SysResult<()> {
        assert!(offset + len <= self.len());
        // SAFETY: Inside the mapping. Touching what is out of reach is a signal, nothing worse.
        check(unsafe { libc::mprotect(self.addr.byte_add(offset as usize), len as usize, prot) })
            .map(drop)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: The mapping is ours and `self` was the last way to reach it.
        unsafe { libc::munmap(self.addr, self.len) };
    }
}

/// The factor on the limit of every [`Alarm`], for slow kernels.
static TIME_FACTOR: AtomicU32 = AtomicU32::new(1);

/// Multiply all limits from now on.
pub fn set_time_factor(factor: u32) {
    TIME_FACTOR.store(factor.max(1), Ordering::Relaxed);
}

/// The factor on limits.
pub fn time_factor() -> u32 {
    TIME_FACTOR.load(Ordering::Relaxed)
}

/// A signal whose only effect is that a waiting system call returns.
fn quiet_signal() -> c_int {
    static HANDLER: Once = Once::new();
    let signal = libc::SIGRTMIN() + 1;
    HANDLER.call_once(|| {
        extern "C" fn nothing(_: libc::c_int) {}
        // SAFETY: A handler that does nothing, without SA_RESTART.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    });
    signal
}

/// Ends, from any thread, a system call of the thread that made this value.
#[derive(Clone, Copy)]
pub struct Interrupter {
    thread: libc::pid_t,
    signal: c_int,
}

impl Interrupter {
    /// Interrupts the calling thread.
    pub fn of_this_thread() -> Interrupter {
        Interrupter { thread: thread_id(), signal: quiet_signal() }
    }

    /// Send one signal. It does not end a call that is not waiting yet.
    pub fn interrupt(&self) -> SysResult<()> {
        // SAFETY: Takes no pointer.
        check(unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, self.signal) })
            .map(drop)
    }
}

/// A timer that makes the calling thread's system calls return EINTR once time is up. It repeats,
/// so that a signal between two system calls is not lost.
pub struct Alarm {
    timer: libc::timer_t,
    deadline: Instant,
}

impl Alarm {
    /// `limit` from now, times the factor of [`set_time_factor`].
    pub fn set(limit: Duration) -> Result<Alarm> {
        let limit = limit * time_factor();
        let signal = quiet_signal();
        // SAFETY: All zero is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_notify_thread_id = thread_id();
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: Both structures outlive the call.
        check(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) })
            .context("timer_create")?;
        let alarm = Alarm { timer, deadline: Instant::now() + limit };
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 100_000_000 },
            it_value: libc::timespec {
                tv_sec: limit.as_secs() as i64,
                tv_nsec: i64::from(limit.subsec_nanos()),
            },
        };
        // SAFETY: The timer was made above; the specification outlives the call.
        check(unsafe { libc::timer_settime(timer, 0, &spec, std::ptr::null_mut()) })
            .context("timer_settime")?;
        Ok(alarm)
    }

    /// Whether time is up.
    pub fn due(&self) -> bool {
        Instant::now() >= self.deadline
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: The timer was made by `set` and is deleted once.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// How many interrupts all CPUs have had.
pub fn interrupts() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let line = text.lines().find_map(|line| line.strip_prefix("intr "));
    let total = line.and_then(|line| line.split(' ').next()).context("/proc/stat has no intr")?;
    total.parse().context("/proc/stat: intr")
}

/// The kernel's release, as `uname -r` has it.
pub fn kernel_release() -> Result<String> {
    // SAFETY: All zero is a valid utsname.
    let mut name: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: The structure outlives the call.
    check(unsafe { libc::uname(&mut name) }).context("uname")?;
    // SAFETY: The kernel ends the string inside of its array.
    let release = unsafe { std::ffi::CStr::from_ptr(name.release.as_ptr()) };
    Ok(release.to_string_lossy().into_owned())
}

/// Keep this process's own memory from swap, so that only the memory under test is swapped.
pub fn lock_own_memory() -> Result<()> {
    let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
    // SAFETY: Takes no pointer.
    check(unsafe { libc::mlockall(flags) }).context("mlockall").map(drop)
}

/// Give this process memory of its own for all that it has mapped. A page that it still shares with
/// its parent is copied at the first write, which needs memory when there may be none.
pub fn populate_own_memory() -> Result<()> {
    // SAFETY: Takes no pointer.
    check(unsafe { libc::mlockall(libc::MCL_CURRENT) }).context("mlockall").map(drop)
}

/// Keep this thread, and those that it makes from now on, on the CPU that it runs on.
pub fn stay_on_this_cpu() -> Result<()> {
    // SAFETY: Takes no pointer.
    let cpu = check(unsafe { libc::sched_getcpu() }).context("getcpu")?;
    run_on_cpu(cpu as usize)
}

/// Let this thread, and those that it makes from now on, run on this CPU only.
pub fn run_on_cpu(cpu: usize) -> Result<()> {
    run_thread_on_cpu(0, cpu)
}

/// The same for a thread of any process.
pub fn run_thread_on_cpu(thread: i32, cpu: usize) -> Result<()> {
    // SAFETY: All zeros are a set of no CPUs.
    let mut cpus: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: The number of a CPU that is not in the set changes nothing.
    unsafe { libc::CPU_SET(cpu, &mut cpus) };
    // SAFETY: The set is valid for its size.
    check(unsafe { libc::sched_setaffinity(thread, size_of_val(&cpus), &cpus) })
        .with_context(|| format!("run on CPU {cpu}"))
        .map(drop)
}

/// This thread's number.
pub fn thread_id() -> i32 {
    // SAFETY: Takes no pointer.
    unsafe { libc::gettid() }
}

/// A thread of any process, or this one if it is 0, comes before all whose order is lower, and before
/// all without one, for as long as it has work. 0 is without one.
pub fn set_order(thread: i32, order: i32) -> Result<()> {
    let policy = if order > 0 { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    let order = libc::sched_param { sched_priority: order };
    // SAFETY: The structure outlives the call.
    check(unsafe { libc::sched_setscheduler(thread, policy, &order) })
        .context("sched_setscheduler")
        .map(drop)
}

/// This thread gets little of a CPU that another one wants as well.
pub fn run_after_others() -> Result<()> {
    // SAFETY: Takes no pointer. Linux sets it for the thread only.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) }).context("setpriority").map(drop)
}

/// SKIP unless run as root.
pub fn require_root() -> Result<()> {
    // SAFETY: Takes nothing.
    if unsafe { libc::geteuid() } != 0 {
        return skip("needs root");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapping_is_aligned_and_trimmed() {
        for len in [PAGE, 3 * PAGE + 8, crate::HUGE, crate::HUGE + PAGE] {
            let m = Mapping::anonymous(len).unwrap();
            assert_eq!(m.addr() % crate::HUGE, 0);
            m.store(len / 8 * 8 - 8, 7);
            assert_eq!(m.load(len / 8 * 8 - 8), 7);
        }
    }

    #[test]
    fn errno_has_a_name() {
        assert_eq!(Errno::EPERM.to_string(), "EPERM");
        assert_eq!(Errno(9999).to_string(), "errno 9999");
    }
}
