// SPDX-License-Identifier: GPL-2.0
//! vCPUs: entering with a time limit, exits, and the guest program's commands.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_pre_fault_memory, kvm_regs};
use kvm_ioctls::VcpuFd;

use super::{Stats, Vm};
use crate::PAGE;
use crate::guest::{self, Command};
use crate::pattern::Pattern;
use crate::sys::{self, Alarm, Errno, Mapping, SysResult, check};
use crate::uapi::*;

/// How long one command may take before the vCPU counts as stuck.
const RUN_LIMIT: Duration = Duration::from_secs(40);

/// How long an endless command may take.
const ENDLESS_LIMIT: Duration = Duration::from_secs(600);

/// How often the same exit may follow itself before the vCPU counts as stuck.
const STUCK: u32 = 100_000;

/// Why KVM_RUN returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The command is done.
    Done,
    /// `KVM_EXIT_HYPERCALL`.
    Hypercall { nr: u64, args: [u64; 3] },
    /// KVM_RUN failed with this errno and filled in `KVM_EXIT_MEMORY_FAULT`.
    MemoryFault { errno: Errno, gpa: u64, size: u64, flags: u64 },
    /// The access hit no memory; see [`Vcpu::mmio_data`].
    Mmio { gpa: u64, write: bool },
    /// The guest uses a port other than that for "done"; see [`Vcpu::port_data`].
    Port { port: u16, write: bool },
    /// KVM_RUN failed with this errno and no address.
    Error(Errno),
    /// Triple fault.
    Shutdown,
    /// Any other `KVM_EXIT_*`.
    Other(u32),
}

impl Exit {
    /// The kind of the exit, without addresses.
    pub fn told(&self) -> String {
        match self {
            Exit::Done => "works".into(),
            Exit::MemoryFault { errno, flags, .. } => {
                let private = flags & KVM_MEMORY_EXIT_FLAG_PRIVATE != 0;
                let side = if private { "private" } else { "shared" };
                format!("memory fault exit, {side}, {errno}")
            }
            Exit::Mmio { .. } => "emulated I/O".into(),
            Exit::Error(errno) => errno.to_string(),
            other => format!("{other:?}"),
        }
    }
}

/// The result of an endless command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunCounters {
    /// Rounds of [`Vcpu::watch`], words checked by [`Vcpu::stress`].
    pub rounds: u64,
    /// Words that were not checked because the page was changing.
    pub discarded: u64,
    /// Exits because of missing memory that were answered by entering again.
    pub faults: u64,
}

/// A vCPU that runs the guest program.
pub struct Vcpu {
    fd: VcpuFd,
    system: Arc<Mapping>,
    mailbox: u64,
    amd: bool,
    id: u64,
    /// Guest physical address of the program.
    program: u64,
    /// In the middle of a command; an exit other than [`Exit::Done`] leaves it there.
    busy: bool,
}

/// Ends, from any thread, an endless command of a vCPU, and reads its progress.
#[derive(Clone)]
pub struct Stopper {
    system: Arc<Mapping>,
    mailbox: u64,
}

impl Stopper {
    pub fn stop(&self) {
        self.system.store(self.mailbox + guest::BOX_STOP, 1);
    }

    /// Rounds that the endless command has done.
    pub fn rounds(&self) -> u64 {
        self.system.load(self.mailbox + guest::BOX_ROUNDS)
    }

    /// The words that [`Command::Watch`] loaded in its last complete round, ORed.
    pub fn watched(&self) -> u64 {
        self.system.load(self.mailbox + guest::BOX_RESULTS)
    }
}

impl Vm {
    /// vCPU number `id`, below [`guest::MAX_VCPUS`].
    pub fn vcpu(&self, id: u64) -> Result<Vcpu> {
        let mut vcpu = self.vcpu_that_has_not_run(id)?;
        vcpu.restart()?;
        Ok(vcpu)
    }

    /// The same before its first KVM_RUN. [`Vcpu::restart`] has it take commands.
    pub fn vcpu_that_has_not_run(&self, id: u64) -> Result<Vcpu> {
        Vcpu::new(self, id)
    }
}

impl Vcpu {
    fn new(vm: &Vm, id: u64) -> Result<Vcpu> {
        ensure!(id < guest::MAX_VCPUS, "no mailbox for vCPU {id}");
        let fd = vm.fd.create_vcpu(id).context("KVM_CREATE_VCPU")?;
        fd.set_cpuid2(&vm.cpuid).context("KVM_SET_CPUID2")?;
        set_long_mode(&fd)?;
        let vendor = vm.cpuid.as_slice().iter().find(|e| e.function == 0).map(|e| e.ebx);
        let amd = vendor == Some(u32::from_le_bytes(*b"Auth"));
        let system = vm.system.clone();
        let mailbox = guest::mailbox(id);
        Ok(Vcpu { fd, system, mailbox, amd, id, program: guest::CODE, busy: false })
    }

    /// The guest touches a private page with a memory error: the exit has its address and
    /// `EHWPOISON`.
    pub fn expect_lost(&mut self, gpa: u64) -> Result<()> {
        self.expect_no_page(gpa, Errno::EHWPOISON)
    }

    /// The guest touches a private page that its file cannot give: the exit has its address and
    /// the error.
    pub fn expect_no_page(&mut self, gpa: u64, errno: Errno) -> Result<()> {
        let exit = self.touch_no_page(gpa)?;
        let flags = KVM_MEMORY_EXIT_FLAG_PRIVATE;
        let wanted = Exit::MemoryFault { errno, gpa, size: PAGE, flags };
        ensure!(exit == wanted, "the access ended with {exit:x?}");
        Ok(())
    }

    /// The guest touches a page that its file cannot give, of any kind of memory: the exit, which has
    /// its address.
    pub fn touch_no_page(&mut self, gpa: u64) -> Result<Exit> {
        let exit = self.start(Command::Load, &[gpa + 8])?;
        match exit {
            Exit::MemoryFault { gpa: at, size: PAGE, .. } if at == gpa => {}
            _ => bail!("the access ended with {exit:x?}"),
        }
        // The next KVM_RUN gives the same result.
        ensure!(self.run()? == exit, "the second try ends otherwise");
        self.restart()?;
        Ok(exit)
    }

    /// Drop the command that a memory fault interrupted, so that another can follow.
    pub fn restart(&mut self) -> Result<()> {
        let regs = kvm_regs {
            rip: self.program,
            rsp: guest::stack_top(self.id),
            r15: self.mailbox,
            rflags: 2,
            ..self.fd.get_regs().context("KVM_GET_REGS")?
        };
        self.fd.set_regs(&regs).context("KVM_SET_REGS")?;
        // The program exits once before its first command.
        match self.run()? {
            Exit::Done => Ok(()),
            other => bail!("vCPU {} did not start: {other:x?}", self.id),
        }
    }

    /// Whether a command is not finished.
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Drop the command after any exit, so that another can follow.
    pub fn abandon(&mut self) -> Result<()> {
        // KVM completes the last exit at the next entry, which changes the registers: before
        // they are set.
        self.fd.get_kvm_run().immediate_exit = 1;
        let _ = self.enter();
        self.fd.get_kvm_run().immediate_exit = 0;
        self.restart()
    }

    fn borrowed(&self) -> BorrowedFd<'_> {
        // SAFETY: The descriptor stays open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }

    /// The vCPU's statistics.
    pub fn stats(&self) -> Result<Stats> {
        Stats::open(self.borrowed())
    }

    /// Enter the guest until it exits; a signal alone is no exit. An error after the time limit.
    pub fn run(&mut self) -> Result<Exit> {
        self.run_for(RUN_LIMIT)
    }

    /// [`Vcpu::run`] with another limit.
    pub fn run_for(&mut self, limit: Duration) -> Result<Exit> {
        let alarm = Alarm::set(limit)?;
        loop {
            match self.enter() {
                Ok(exit) => return Ok(exit),
                Err(_) if alarm.due() => {
                    let regs = self.fd.get_regs().context("KVM_GET_REGS")?;
                    bail!("vCPU {} still runs after {limit:?}, at {:#x}", self.id, regs.rip);
                }
                Err(_) => {}
            }
        }
    }

    /// One KVM_RUN, without a time limit; an error only if it is to be tried again.
    pub fn enter(&mut self) -> SysResult<Exit> {
        self.fd.get_kvm_run().exit_reason = kvm_bindings::KVM_EXIT_UNKNOWN;
        // SAFETY: Takes no pointer; what the guest writes is its own and our mappings' memory.
        match check(unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN(), 0) }) {
            Ok(_) => Ok(self.exit()),
            Err(errno @ (Errno::EINTR | Errno::EAGAIN)) => Err(errno),
            Err(errno) => Ok(self.failure(errno)),
        }
    }

    /// The exit after KVM_RUN returned 0.
    fn exit(&mut self) -> Exit {
        let run = self.fd.get_kvm_run();
        match run.exit_reason {
            kvm_bindings::KVM_EXIT_IO => {
                // SAFETY: The exit reason says that `io` is the valid member.
                let io = unsafe { run.__bindgen_anon_1.io };
                match io.port {
                    guest::PORT_DONE => {
                        self.busy = false;
                        Exit::Done
                    }
                    port => Exit::Port {
                        port,
                        write: u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_OUT,
                    },
                }
            }
            kvm_bindings::KVM_EXIT_HYPERCALL => {
                // SAFETY: The exit reason says that `hypercall` is the valid member.
                let call = unsafe { run.__bindgen_anon_1.hypercall };
                Exit::Hypercall { nr: call.nr, args: [call.args[0], call.args[1], call.args[2]] }
            }
            kvm_bindings::KVM_EXIT_MMIO => {
                // SAFETY: The exit reason says that `mmio` is the valid member.
                let mmio = unsafe { run.__bindgen_anon_1.mmio };
                Exit::Mmio { gpa: mmio.phys_addr, write: mmio.is_write != 0 }
            }
            kvm_bindings::KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            other => Exit::Other(other),
        }
    }

    /// The exit after KVM_RUN failed.
    fn failure(&mut self, errno: Errno) -> Exit {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != kvm_bindings::KVM_EXIT_MEMORY_FAULT {
            return Exit::Error(errno);
        }
        // SAFETY: The exit reason says that `memory_fault` is the valid member.
        let fault = unsafe { run.__bindgen_anon_1.memory_fault };
        Exit::MemoryFault { errno, gpa: fault.gpa, size: fault.size, flags: fault.flags }
    }

    /// The data of the guest's port access, for reading or, for input, for writing. For use after
    /// [`Exit::Port`].
    pub fn port_data(&mut self) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        assert_eq!(run.exit_reason, kvm_bindings::KVM_EXIT_IO);
        // SAFETY: The exit reason says that `io` is the valid member.
        let io = unsafe { run.__bindgen_anon_1.io };
        let len = usize::from(io.size) * io.count as usize;
        let start = (&raw mut *run).cast::<u8>();
        // SAFETY: KVM says where in the mapping that begins with `run` the data is. Nobody else has
        // a reference to it, and while this one lives, `self` is borrowed and cannot enter.
        unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), len) }
    }

    /// The data of the guest's MMIO access, for reading or, for a load, for writing. For use after
    /// [`Exit::Mmio`].
    pub fn mmio_data(&mut self) -> &mut [u8] {
        let run = self.fd.get_kvm_run();
        assert_eq!(run.exit_reason, kvm_bindings::KVM_EXIT_MMIO);
        // SAFETY: The exit reason says that `mmio` is the valid member.
        let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
        &mut mmio.data[..mmio.len as usize]
    }

    /// Go on with a copy of the program, at this guest physical address.
    pub fn move_program(&mut self, gpa: u64) -> Result<()> {
        self.program = gpa;
        self.restart()
    }

    /// Whether the processor is AMD's.
    pub fn is_amd(&self) -> bool {
        self.amd
    }

    /// Let the guest be a hypervisor, on AMD.
    pub fn enable_svm(&mut self) -> Result<()> {
        const EFER_SVME: u64 = 1 << 12;
        let mut sregs = self.fd.get_sregs().context("KVM_GET_SREGS")?;
        sregs.efer |= EFER_SVME;
        self.fd.set_sregs(&sregs).context("KVM_SET_SREGS")
    }

    /// Let the guest use other page tables.
    pub fn set_page_tables(&mut self, pml4: u64) -> Result<()> {
        let mut sregs = self.fd.get_sregs().context("KVM_GET_SREGS")?;
        sregs.cr3 = pml4;
        self.fd.set_sregs(&sregs).context("KVM_SET_SREGS")
    }

    /// The guest physical address that the guest's page tables have for `address`, if any.
    pub fn translate(&self, address: u64) -> Result<Option<u64>> {
        let found = self.fd.translate_gva(address).context("KVM_TRANSLATE")?;
        Ok((found.valid != 0).then_some(found.physical_address))
    }

    /// Set a model-specific register.
    pub fn set_msr(&mut self, index: u32, data: u64) -> Result<()> {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).context("KVM_SET_MSRS")?;
        let set = self.fd.set_msrs(&msrs).context("KVM_SET_MSRS")?;
        ensure!(set == 1, "MSR {index:#x} cannot be {data:#x}");
        Ok(())
    }

    /// Give a command without entering. An error while another one is unfinished.
    pub fn post(&mut self, command: Command, args: &[u64]) -> Result<()> {
        ensure!(!self.busy, "vCPU {} has not finished its last command", self.id);
        self.busy = true;
        for (n, arg) in (0..).zip(args) {
            self.system.store(self.mailbox + guest::BOX_ARGS + n * 8, *arg);
        }
        for word in [guest::BOX_STOP, guest::BOX_ROUNDS, guest::BOX_DISCARDED] {
            self.system.store(self.mailbox + word, 0);
        }
        self.system.store(self.mailbox + guest::BOX_COMMAND, command as u64);
        Ok(())
    }

    /// Result word `n` of the last command.
    pub fn result(&self, n: u64) -> u64 {
        self.system.load(self.mailbox + guest::BOX_RESULTS + n * 8)
    }

    /// Give a command and enter until the next exit.
    pub fn start(&mut self, command: Command, args: &[u64]) -> Result<Exit> {
        self.post(command, args)?;
        self.run()
    }

    /// Give a command and enter until it is done; any other exit is an error.
    pub fn call(&mut self, command: Command, args: &[u64]) -> Result<()> {
        let exit = self.start(command, args)?;
        self.expect_done(exit, command)
    }

    fn expect_done(&self, exit: Exit, command: Command) -> Result<()> {
        match exit {
            Exit::Done => Ok(()),
            other => bail!("vCPU {}: {command:?} ended with {other:x?}", self.id),
        }
    }

    /// Write the pattern all over `[start, start + len)`.
    pub fn fill(&mut self, start: u64, len: u64, pattern: Pattern) -> Result<()> {
        self.call(Command::Fill, &sequence(start, len, 8, pattern))
    }

    /// Write one word of the pattern at the start of each page.
    pub fn fill_pages(&mut self, start: u64, len: u64, pattern: Pattern) -> Result<()> {
        self.call(Command::Fill, &sequence(start, len, PAGE, pattern))
    }

    /// Fail unless the pattern is all over `[start, start + len)`.
    pub fn verify(&mut self, start: u64, len: u64, pattern: Pattern) -> Result<()> {
        self.verify_stride(start, len, 8, pattern)
    }

    /// Fail unless a word of the pattern is at the start of each page.
    pub fn verify_pages(&mut self, start: u64, len: u64, pattern: Pattern) -> Result<()> {
        self.verify_stride(start, len, PAGE, pattern)
    }

    fn verify_stride(&mut self, start: u64, len: u64, stride: u64, pattern: Pattern) -> Result<()> {
        self.call(Command::Verify, &sequence(start, len, stride, pattern))?;
        self.judge(start, len, stride, pattern)
    }

    /// Fail unless the [`Command::Verify`] that was done last found the pattern.
    pub fn judge(&self, start: u64, len: u64, stride: u64, pattern: Pattern) -> Result<()> {
        let wrong = self.result(3);
        ensure!(
            wrong == 0,
            "vCPU {} read {wrong} of {} words of [{start:#x}, +{len:#x}) not as {pattern:x?}: \
             first at {:#x}, got {:#x}, wanted {:#x}",
            self.id,
            len / stride,
            self.result(0),
            self.result(1),
            self.result(2),
        );
        Ok(())
    }

    /// The word at `addr`, as the guest reads it.
    pub fn load(&mut self, addr: u64) -> Result<u64> {
        self.call(Command::Load, &[addr])?;
        Ok(self.result(0))
    }

    /// Store a word at `addr`, as the guest.
    pub fn store(&mut self, addr: u64, value: u64) -> Result<()> {
        self.call(Command::Store, &[addr, value])
    }

    /// Let the guest copy a function to `addr`, call it there, and check what it returns.
    pub fn execute_at(&mut self, addr: u64, argument: u64) -> Result<()> {
        let len = guest::payload().len() as u64;
        self.call(Command::Execute, &[addr, guest::PAYLOAD, len, argument])?;
        let (got, at) = (self.result(0), self.result(1));
        ensure!(got == guest::payload_result(argument), "the function returned {got:#x}");
        ensure!(at == addr, "the function ran at {at:#x}, not at {addr:#x}");
        Ok(())
    }

    /// Let the guest ask for a conversion; the exit that follows is the caller's.
    pub fn start_map_gpa(&mut self, gpa: u64, size: u64, private: bool) -> Result<Exit> {
        let attributes = if private { KVM_MAP_GPA_RANGE_ENCRYPTED } else { 0 };
        let args = [KVM_HC_MAP_GPA_RANGE, gpa, size / PAGE, attributes, self.amd.into()];
        self.start(Command::Hypercall, &args)
    }

    /// Read a word per `stride` bytes of a range, again and again until stopped.
    pub fn watch(&mut self, start: u64, len: u64, stride: u64, write: bool) -> Result<RunCounters> {
        self.post(Command::Watch, &[start, start + len, stride, write.into()])?;
        self.run_endless(Command::Watch)
    }

    /// Check random words against a table until stopped; see program.s.
    pub fn stress(&mut self, args: &[u64; 6]) -> Result<RunCounters> {
        self.post(Command::Stress, args)?;
        self.finish_stress()
    }

    /// The rest of [`Vcpu::stress`], once its command is posted.
    pub fn finish_stress(&mut self) -> Result<RunCounters> {
        let counters = self.run_endless(Command::Stress)?;
        let what = match self.result(0) {
            0 => return Ok(counters),
            1 => "wrong word",
            _ => "own word lost",
        };
        bail!(
            "vCPU {}: {what} at {:#x}: got {:#x}, wanted {:#x}, epoch {}, after {counters:?}",
            self.id,
            self.result(1),
            self.result(2),
            self.result(3),
            self.result(4)
        )
    }

    /// Enter until the posted command is done, through all exits that a conversion or the
    /// replacement of a slot causes. Its loads meanwhile may give any value.
    pub fn run_endless(&mut self, command: Command) -> Result<RunCounters> {
        let (mut faults, mut last, mut repeated) = (0, Exit::Done, 0);
        loop {
            let exit = self.run_for(ENDLESS_LIMIT)?;
            repeated = if exit == last { repeated + 1 } else { 0 };
            last = exit;
            match exit {
                Exit::Done => break,
                Exit::MemoryFault { errno: Errno::EFAULT, .. } | Exit::Mmio { .. } => faults += 1,
                other => self.expect_done(other, command)?,
            }
            ensure!(repeated < STUCK, "vCPU {}: no way out of {exit:x?}", self.id);
        }
        let word = |offset| self.system.load(self.mailbox + offset);
        Ok(RunCounters {
            rounds: word(guest::BOX_ROUNDS),
            discarded: word(guest::BOX_DISCARDED),
            faults,
        })
    }

    /// A handle that ends an endless command. Post the command before using it.
    pub fn stopper(&self) -> Stopper {
        Stopper { system: self.system.clone(), mailbox: self.mailbox }
    }

    /// `KVM_PRE_FAULT_MEMORY` until all is mapped or it fails: the errno, and the bytes left.
    pub fn raw_pre_fault(&self, gpa: u64, size: u64) -> (SysResult<()>, u64) {
        let mut left = size;
        loop {
            match self.raw_pre_fault_once(gpa + (size - left), left) {
                (Ok(()), 0) => return (Ok(()), 0),
                (Ok(()) | Err(Errno::EINTR), now) => left = now,
                (Err(errno), now) => return (Err(errno), now),
            }
        }
    }

    /// `KVM_PRE_FAULT_MEMORY` once: its result, and the bytes left.
    pub fn raw_pre_fault_once(&self, gpa: u64, size: u64) -> (SysResult<()>, u64) {
        let mut arg = kvm_pre_fault_memory { gpa, size, ..Default::default() };
        // SAFETY: The structure is the one of this ioctl.
        let ret = unsafe { sys::ioctl_mut(self.borrowed(), KVM_PRE_FAULT_MEMORY(), &mut arg) };
        (ret.map(drop), arg.size)
    }
}

/// Arguments of [`Command::Fill`] and [`Command::Verify`].
pub fn sequence(start: u64, len: u64, stride: u64, pattern: Pattern) -> [u64; 5] {
    [start, start + len, stride, pattern.word(start), pattern.step(stride)]
}

/// Long mode with the guest's page tables; interrupts off, no descriptor table needed.
fn set_long_mode(fd: &VcpuFd) -> Result<()> {
    const CR0_PE_ET_NE_WP_PG: u64 = 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    let mut sregs = fd.get_sregs().context("KVM_GET_SREGS")?;
    sregs.cr0 = CR0_PE_ET_NE_WP_PG;
    sregs.cr3 = guest::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME_LMA;
    let data = kvm_bindings::kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_bindings::kvm_segment { selector: 8, type_: 11, db: 0, l: 1, ..data };
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    fd.set_sregs(&sregs).context("KVM_SET_SREGS")
}
