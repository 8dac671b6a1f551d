// SPDX-License-Identifier: GPL-2.0
//! Starts, watches and controls a real QEMU with a real Linux in it.
//!
//! QEMU is the one that `scripts/build-qemu` makes; it runs in the machine that `scripts/boot`
//! makes, and gets its guest's kernel, our process 1 for the guest, and memory of any kind. Every
//! wait has a limit, and a QEMU is killed with the process that started it.

mod guest;
mod hold;
mod host;
mod initramfs;
mod lines;
mod memory;
mod qmp;
mod records;
mod tracer;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::PAGE;
use crate::agent::{CONVERT, MODULES, ORDER, PORT};
use crate::ktap::skip;
use crate::pressure::Cgroup;
use crate::sys::{self, Errno, check};

pub use guest::Guest;
pub use hold::Hold;
pub use host::{Memfd, kvm_figure, memfds};
pub use initramfs::Archive;
pub use memory::{Kind, Layout, Memory};
pub use tracer::Stopped;

use lines::{Gone, TimeIsUp};
use qmp::Qmp;
use records::{CONSOLE, Records, TAIL};

/// How long QEMU may take for a command, and how long a guest for a request.
const COMMAND: Duration = Duration::from_secs(60);
const REQUEST: Duration = Duration::from_secs(120);
/// How long a guest may take from its first instruction to its process 1.
const BOOT: Duration = Duration::from_secs(150);

/// The paths of QEMU and of the parts of a guest.
#[derive(Clone, Debug)]
pub struct Lab {
    pub qemu: PathBuf,
    /// The folder of QEMU's firmware, if not beside QEMU.
    pub firmware: Option<PathBuf>,
    pub kernel: PathBuf,
    /// Modules of that kernel, and a file with their names in the order in which to load them.
    pub modules: Option<PathBuf>,
    /// Process 1.
    pub init: PathBuf,
    pub accelerator: String,
    /// Model and flags of the guest's CPU.
    pub cpu: String,
}

impl Lab {
    /// The paths where `scripts/boot --add` puts them; they need not exist.
    pub fn expected() -> Lab {
        Lab {
            qemu: "/add/qemu/qemu-system-x86_64".into(),
            firmware: None,
            kernel: "/add/bzImage".into(),
            modules: None,
            init: "/bin/memfile-guest".into(),
            accelerator: "kvm".into(),
            cpu: CPU.into(),
        }
    }

    /// The same. SKIP without QEMU.
    pub fn find() -> Result<Lab> {
        let lab = Lab::expected();
        if !lab.qemu.exists() {
            return skip(format!("there is no QEMU at {}", lab.qemu.display()));
        }
        Ok(lab)
    }

    /// The same with a distribution's kernel. SKIP without it.
    pub fn with_stock_kernel(mut self) -> Result<Lab> {
        self.kernel = "/add/guest/vmlinuz".into();
        self.modules = Some("/add/guest".into());
        if !self.kernel.exists() {
            return skip(format!("there is no kernel at {}", self.kernel.display()));
        }
        Ok(self)
    }
}

/// Emulated SVM has late TSC deadlines, and an xsave that a nested guest's kernel stumbles over.
pub const CPU: &str = "host,-tsc-deadline,-kvmclock,-xsave,-avx";

/// The configuration of a guest.
#[derive(Clone, Debug)]
pub struct Config {
    pub memory: Memory,
    /// More arguments of QEMU.
    pub arguments: Vec<String>,
    /// More arguments of the guest's kernel.
    pub append: String,
    /// The other end of the guest's console; none if it only goes to a file of ours.
    pub terminal: Option<Arc<OwnedFd>>,
    /// The guest has busybox, with its shell.
    pub busybox: bool,
    /// The cgroup that QEMU's memory is charged to.
    pub cgroup: Option<PathBuf>,
    /// CPUs of the guest.
    pub cpus: u32,
    /// QEMU waits before its first instruction for [`Machine::fail_fallocate`] or
    /// [`Machine::add_to_seals`].
    pub traced: bool,
}

impl Config {
    pub fn new(memory: Memory) -> Config {
        Config {
            memory,
            arguments: Vec::new(),
            append: String::new(),
            terminal: None,
            busybox: false,
            cgroup: None,
            cpus: 1,
            traced: false,
        }
    }

    /// More arguments of QEMU.
    pub fn with<S: Into<String>>(mut self, arguments: impl IntoIterator<Item = S>) -> Config {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// A balloon, which may also report what the guest does not use. It names pages and does not
    /// reach them: it needs no other memory than the guest has, which QEMU assumes for all devices
    /// of a guest with private memory, and which Linux does not take from a balloon.
    pub fn with_balloon(self, reporting: bool) -> Config {
        let reporting = if reporting { "on" } else { "off" };
        let device = "virtio-balloon-pci,id=balloon,iommu_platform=off,free-page-reporting=";
        self.with(["-device".to_owned(), format!("{device}{reporting}")])
    }

    /// Two CPUs, of which the second does nothing but what it is explicitly given.
    pub fn with_a_second_cpu(mut self) -> Config {
        self.cpus = 2;
        self.append = "isolcpus=1 irqaffinity=0".into();
        self
    }

    /// Charge QEMU's memory to this cgroup.
    pub fn within(mut self, cgroup: &Cgroup) -> Config {
        self.cgroup = Some(cgroup.path().into());
        self
    }
}

/// The error of a guest that did not come up.
#[derive(Debug)]
pub struct NoBoot {
    why: String,
    console: String,
    said: String,
}

impl fmt::Display for NoBoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the guest did not come up: {}", self.why)?;
        if !self.said.is_empty() {
            write!(f, "\n--- QEMU says\n{}", self.said.trim_end())?;
        }
        let console = self.console.trim_end();
        if !console.is_empty() {
            write!(f, "\n--- the last lines of its console\n{console}")?;
        }
        f.write_str("\n---")
    }
}

impl std::error::Error for NoBoot {}

/// A running QEMU. Dropping this kills it.
pub struct Machine {
    child: Child,
    ended: Option<ExitStatus>,
    /// The connection to QEMU, before and after the greeting.
    socket: Option<UnixStream>,
    qmp: Option<Qmp>,
    guest: Guest,
    kernel: PathBuf,
    folder: Folder,
}

/// The name of the guest's first root in that folder.
const INITRAMFS: &str = "initramfs";

/// A folder that is removed when this is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder> {
        let base = std::env::temp_dir();
        let pid = std::process::id();
        let path = (0..)
            .map(|n| base.join(format!("memfile-qemu-{pid}-{n}")))
            .find(|path| !path.exists())
            .context("no free name for a folder")?;
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Machine {
    /// Start QEMU; the guest waits for [`Machine::boot`]. Memory that is preallocated is allocated
    /// when this returns.
    pub fn start(lab: &Lab, config: &Config) -> Result<Machine> {
        let mut machine = Machine::launch(lab, config)?;
        machine.connect()?;
        Ok(machine)
    }

    /// Start QEMU; [`Machine::connect`] waits until it answers.
    pub fn launch(lab: &Lab, config: &Config) -> Result<Machine> {
        let folder = Folder::new()?;
        let (socket, socket_end) = UnixStream::pair().context("a pair of sockets")?;
        let (port, port_end) = UnixStream::pair().context("a pair of sockets")?;
        let ends: [OwnedFd; 2] = [socket_end.into(), port_end.into()];
        let fds = ends.each_ref().map(AsRawFd::as_raw_fd);
        let initrd = folder.0.join(INITRAMFS);
        fs::write(&initrd, initramfs(lab, config)?).context("write the guest's initramfs")?;
        let console = folder.0.join(CONSOLE);
        let terminal = config.terminal.as_ref().map(|fd| fd.as_raw_fd());
        let mut command = Command::new(&lab.qemu);
        command.args(arguments(lab, config, &initrd, &console, fds));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(folder.0.join("said"))?);
        let procs = config.cgroup.as_ref().map(|cgroup| cgroup.join("cgroup.procs"));
        let procs = procs.map(|path| fs::File::options().write(true).open(path)).transpose()?;
        let traced = config.traced;
        // SAFETY: System calls on descriptors that are open; nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                let errno = |e: Errno| io::Error::from_raw_os_error(e.0);
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)).map_err(errno)?;
                for fd in fds.into_iter().chain(terminal) {
                    check(libc::fcntl(fd, libc::F_SETFD, 0)).map_err(errno)?;
                }
                if let Some(procs) = &procs {
                    let fd = procs.as_raw_fd();
                    check(libc::write(fd, c"0".as_ptr().cast(), 1) as i64).map_err(errno)?;
                }
                if traced {
                    tracer::wait_for_tracer().map_err(errno)?;
                }
                Ok(())
            });
        }
        let child = command.spawn().with_context(|| format!("start {}", lab.qemu.display()))?;
        drop(ends);
        let records = Records { pid: child.id() as i32, folder: folder.0.clone() };
        let guest = Guest::new(port, limit(REQUEST), records);
        let (socket, kernel) = (Some(socket), lab.kernel.clone());
        Ok(Machine { child, ended: None, socket, qmp: None, guest, kernel, folder })
    }

    /// Wait until QEMU is ready to run its guest. The error is [`NoBoot`].
    pub fn connect(&mut self) -> Result<()> {
        if let Some(socket) = self.socket.take() {
            let qmp = Qmp::new(socket, Instant::now() + limit(COMMAND));
            self.qmp = Some(qmp.map_err(|e| self.no_boot(&e))?);
        }
        Ok(())
    }

    /// QEMU's output and exit status, for an error.
    fn last_words(&mut self) -> String {
        let mut words = self.said();
        // It may be about to exit.
        if let Ok(Some(status)) = self.child.try_wait() {
            self.ended = Some(status);
            words += &format!(" ({status})");
        }
        if words.is_empty() { words } else { format!(": {words}") }
    }

    /// QEMU's standard error so far.
    pub fn said(&self) -> String {
        records::said(&self.folder.0)
    }

    /// Let the guest run. QEMU may find only now that it cannot.
    fn run(&mut self) -> Result<()> {
        let qmp = self.qmp.as_mut().context("QEMU is not ready")?;
        let answer = qmp.execute("cont", json!({}), Instant::now() + limit(COMMAND));
        answer.map(drop).map_err(|e| self.no_boot(&e))
    }

    /// Run the guest until its process 1 answers; returns the seconds. The error is [`NoBoot`].
    pub fn boot(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.run()?;
        self.guest.wait(start + limit(BOOT)).map_err(|e| self.no_boot(&e))?;
        Ok(start.elapsed())
    }

    /// The same, and pass on the last line of its console every few seconds.
    pub fn boot_with(&mut self, progress: &mut dyn FnMut(&str)) -> Result<Duration> {
        let start = Instant::now();
        let end = start + limit(BOOT);
        self.run()?;
        loop {
            let next = end.min(Instant::now() + Duration::from_secs(5));
            match self.guest.wait(next) {
                Ok(()) => return Ok(start.elapsed()),
                Err(e) if e.is::<TimeIsUp>() && next < end => {
                    let console = self.console_tail(1);
                    progress(&format!("{} s: {console}", start.elapsed().as_secs()));
                }
                Err(e) => return Err(self.no_boot(&e)),
            }
        }
    }

    fn no_boot(&mut self, error: &anyhow::Error) -> anyhow::Error {
        let mut why = format!("{error:#}");
        // It has said everything when it has ended.
        if error.is::<Gone>()
            && let Ok(status) = self.wait()
        {
            why += &format!(", {status}");
        }
        NoBoot { why, console: self.console_tail(TAIL), said: self.said() }.into()
    }

    /// The last lines of the guest's console.
    pub fn console_tail(&self, lines: usize) -> String {
        records::console_tail(&self.folder.0, lines)
    }

    /// The guest, once it is up.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Execute a QMP command, and return its result.
    pub fn execute(&mut self, name: &str, arguments: Value) -> Result<Value> {
        let qmp = self.qmp.as_mut().context("QEMU is not ready")?;
        match qmp.execute(name, arguments, Instant::now() + limit(COMMAND)) {
            Ok(value) => Ok(value),
            Err(e) => bail!("{e:#}{}", self.last_words()),
        }
    }

    /// QEMU's threads that are the guest's CPUs, in order.
    pub fn vcpu_threads(&mut self) -> Result<Vec<i32>> {
        let cpus = self.execute("query-cpus-fast", json!({}))?;
        let cpus = cpus.as_array().context("query-cpus-fast")?;
        let threads = cpus.iter().map(|cpu| Some(cpu["thread-id"].as_i64()? as i32));
        threads.collect::<Option<_>>().context("a CPU of the guest has no thread")
    }

    /// Let all threads of QEMU's run on this CPU of the host only; returns them.
    pub fn run_on_cpu(&self, cpu: usize) -> Result<Vec<i32>> {
        let mut threads = Vec::new();
        for entry in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let thread = entry?.file_name().to_string_lossy().parse()?;
            sys::run_thread_on_cpu(thread, cpu)?;
            threads.push(thread);
        }
        Ok(threads)
    }

    /// Does this thread of QEMU's wait for another one: in futex()?
    pub fn waits(&self, thread: i32) -> Result<bool> {
        let path = format!("/proc/{}/task/{thread}/syscall", self.pid());
        let call = fs::read_to_string(&path).with_context(|| path.clone())?;
        Ok(call.split(' ').next() == Some(&libc::SYS_futex.to_string()))
    }

    /// Trace this thread of QEMU's, do `work`, and stop the thread when it calls fallocate().
    pub fn stop_at_fallocate(
        &mut self,
        thread: i32,
        work: impl FnOnce(&mut Machine) -> Result<()>,
    ) -> Result<Stopped> {
        let traced = tracer::Traced::begin(thread)?;
        work(self)?;
        traced.stop_at(libc::SYS_fallocate).with_context(|| self.said())
    }

    /// What QEMU itself reads of the guest's memory, in words: the shared side.
    pub fn shared_words(&mut self, address: u64, bytes: u64) -> Result<Vec<u64>> {
        let path = self.folder.0.join("memory");
        let file = path.display().to_string();
        self.execute("pmemsave", json!({ "val": address, "size": bytes, "filename": file }))?;
        let bytes = fs::read(&path).context("what QEMU has saved")?;
        let words = bytes.chunks_exact(8);
        words.map(|word| Ok(u64::from_ne_bytes(word.try_into()?))).collect()
    }

    /// Wait for a QMP event, and return its data.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        let qmp = self.qmp.as_mut().context("QEMU is not ready")?;
        qmp.event(name, Instant::now() + limit(REQUEST))
    }

    /// How many bytes the guest has of its memory, without those in the balloon.
    pub fn actual_memory(&mut self) -> Result<u64> {
        let answer = self.execute("query-balloon", json!({}))?;
        answer["actual"].as_u64().context("query-balloon")
    }

    /// Set by the balloon how many bytes the guest keeps of its memory, and wait for that.
    pub fn balloon(&mut self, bytes: u64) -> Result<()> {
        self.execute("balloon", json!({ "value": bytes }))?;
        loop {
            let change = self.event("BALLOON_CHANGE").context("the balloon")?;
            if change["actual"].as_u64() == Some(bytes) {
                return Ok(());
            }
        }
    }

    /// The memfiles that QEMU has open: allocated bytes, pages in memory.
    pub fn private(&self) -> Result<(u64, u64)> {
        let memfds = memfds(self.pid())?;
        let memfiles = memfds.iter().filter_map(|m| Some((m.allocated, m.memfile?.0)));
        let sum = memfiles.reduce(|a, b| (a.0 + b.0, a.1 + b.1));
        sum.context("QEMU has no memfile")
    }

    /// Pages of the guest's private memory, in memory or in swap.
    pub fn private_pages(&self) -> Result<u64> {
        Ok(self.private()?.0 / PAGE)
    }

    /// Allocated bytes of its other memfds.
    pub fn shared(&self) -> Result<u64> {
        Ok(memfds(self.pid())?.iter().filter(|m| m.memfile.is_none()).map(|m| m.allocated).sum())
    }

    /// Bytes of the guest's kernel and initramfs.
    pub fn loaded(&self) -> Result<u64> {
        let sizes = [&self.kernel, &self.folder.0.join(INITRAMFS)].map(fs::metadata);
        sizes.into_iter().map(|data| Ok(data?.len())).sum::<io::Result<_>>().context("its size")
    }

    /// Send QEMU a signal.
    pub fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: Takes no pointer; the child is ours and was not waited for.
        check(unsafe { libc::kill(self.pid() as i32, signal) }).map(drop).context("kill QEMU")
    }

    /// Wait until a SIGSTOP has stopped QEMU.
    pub fn wait_stopped(&mut self) -> Result<()> {
        let mut status = 0;
        loop {
            // SAFETY: The child is ours and was not waited for; the status outlives the call.
            match check(unsafe { libc::waitpid(self.pid() as i32, &mut status, libc::WUNTRACED) }) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("waitpid"),
                Ok(_) if libc::WIFSTOPPED(status) => return Ok(()),
                Ok(_) => {
                    self.ended = Some(ExitStatus::from_raw(status));
                    bail!("QEMU has ended: {}", self.said());
                }
            }
        }
    }

    /// Let a QEMU go on that was launched to be traced, and add these to the first seals that it
    /// puts on a file.
    pub fn add_to_seals(&self, seals: u32) -> Result<()> {
        tracer::add_to_seals(self.pid() as i32, seals).with_context(|| self.said())
    }

    /// Let a QEMU go on that was launched to be traced, and let each fallocate() of its main thread
    /// fail `times` times with `errno` before it is carried out. Ends when QEMU has ended, or when
    /// it is `enough` after such a call. Returns how many failed.
    pub fn fail_fallocate(
        &mut self,
        errno: Errno,
        times: u32,
        enough: impl Fn(&Machine) -> Result<bool>,
    ) -> Result<u32> {
        let (failed, ended) =
            tracer::fail_fallocate(self.pid() as i32, errno, times, || enough(self))?;
        self.ended = ended;
        Ok(failed)
    }

    /// Wait until QEMU has ended by itself.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let pidfd = sys::pidfd_open(self.pid() as i32).context("pidfd_open")?;
        let mut fds = [libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        let end = Instant::now() + limit(COMMAND);
        loop {
            let left = end.saturating_duration_since(Instant::now()).as_millis() as i32;
            // SAFETY: The array outlives the call.
            match check(unsafe { libc::poll(fds.as_mut_ptr(), 1, left) }) {
                Ok(0) => bail!("QEMU does not end{}", self.last_words()),
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("poll"),
            }
        }
        let status = self.child.wait().context("wait for QEMU")?;
        self.ended = Some(status);
        Ok(status)
    }

    /// Switch the guest off, and check that QEMU ends with success.
    pub fn shut_down(mut self) -> Result<()> {
        self.guest.off()?;
        let status = self.wait()?;
        if !status.success() {
            bail!("QEMU ends with {status}{}", self.last_words());
        }
        Ok(())
    }

    /// Kill QEMU, and wait until it is gone.
    pub fn kill(mut self) -> Result<()> {
        self.signal(libc::SIGKILL)?;
        self.wait().map(drop)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// QEMU's command line.
fn arguments(
    lab: &Lab,
    config: &Config,
    initrd: &Path,
    console: &Path,
    [socket, port]: [i32; 2],
) -> Vec<String> {
    let memory = &config.memory;
    let mut machine = "q35".to_owned();
    if lab.accelerator == "kvm" {
        machine += ",kernel_irqchip=split";
    }
    machine += &memory.machine();
    let append = format!(
        "console=ttyS0 panic=-1 no_timer_check {PORT}=/dev/ttyS1{}{}{}",
        memory.kernel_arguments(),
        if config.append.is_empty() { "" } else { " " },
        config.append
    );
    let mut line = Vec::new();
    let mut add = |words: &[&str]| line.extend(words.iter().map(|word| (*word).to_owned()));
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S"]);
    if let Some(firmware) = &lab.firmware {
        add(&["-L", &firmware.display().to_string()]);
    }
    let cpus = config.cpus.to_string();
    add(&["-accel", &lab.accelerator, "-machine", &machine, "-cpu", &lab.cpu, "-smp", &cpus]);
    add(&["-chardev", &format!("socket,id=qmp,fd={socket}"), "-mon", "chardev=qmp,mode=control"]);
    let console = match &config.terminal {
        Some(fd) => format!("socket,id=console,fd={}", fd.as_raw_fd()),
        None => format!("file,id=console,path={}", console.display()),
    };
    add(&["-chardev", &console]);
    add(&["-serial", "chardev:console"]);
    add(&["-chardev", &format!("socket,id=port,fd={port}"), "-serial", "chardev:port"]);
    add(&["-kernel", &lab.kernel.display().to_string()]);
    add(&["-initrd", &initrd.display().to_string(), "-append", &append]);
    line.extend(memory.arguments());
    line.extend(config.arguments.iter().cloned());
    line
}

/// The guest's first root.
fn initramfs(lab: &Lab, config: &Config) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.copy("init", &lab.init)?;
    archive.device("dev/console", 5, 1)?;
    if config.busybox {
        let busybox = Path::new("/bin/busybox");
        archive.copy("bin/busybox", busybox)?;
        for name in APPLETS {
            archive.link(&format!("bin/{name}"), "busybox")?;
        }
    }
    if let Some(folder) = &lab.modules {
        let order = fs::read_to_string(folder.join(ORDER)).context("the guest's modules")?;
        let place = MODULES.trim_start_matches('/');
        for name in order.lines() {
            archive.copy(&format!("{place}/{name}"), &folder.join(name))?;
        }
        archive.file(&format!("{place}/{ORDER}"), order.as_bytes())?;
    } else if Path::new(CONVERT).exists() {
        archive.copy(CONVERT.trim_start_matches('/'), Path::new(CONVERT))?;
    }
    archive.finish()
}

/// The applets of the guest's busybox.
const APPLETS: [&str; 26] = [
    "sh", "cat", "cp", "cut", "date", "dd", "df", "dmesg", "echo", "find", "free", "grep", "head",
    "ls", "mkdir", "mount", "ps", "rm", "sed", "sleep", "sort", "stty", "tail", "top", "uname",
    "wc",
];

/// A limit as slow kernels need it.
fn limit(limit: Duration) -> Duration {
    limit * sys::time_factor()
}
