// SPDX-License-Identifier: GPL-2.0
//! Boots a real guest in a real QEMU, on memory of any kind, and runs a command or a shell in it.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use memfile_selftests::qemu::{CPU, Config, Kind, Lab, Layout, Machine, Memory, NoBoot};
use memfile_selftests::{GIB, MIB, mem, sys};

/// Exit status if the guest did not come up, and for other failures of this program.
const NO_BOOT: u8 = 125;
const FAILED: u8 = 1;
/// No practical limit: the user ends it.
const FOR_EVER: Duration = Duration::from_secs(86_400);

/// Boot a real guest in a real QEMU, and say what that cost the host.
///
/// Exit status: that of the command in the guest; 125 if QEMU did not start or the guest did not
/// come up; 1 another failure, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The kind of the guest's memory: anonymous, shared, pinned, movable, reclaimable, both,
    /// guest_memfd
    #[arg(long, value_name = "KIND", default_value = "both", value_parser = kind)]
    memory: Kind,

    /// How much of it, in MiB or with a letter (M, G)
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size)]
    size: u64,

    /// Memory of another kind for the firmware and the guest's kernel; the rest is a DIMM
    #[arg(long, value_name = "SIZE", value_parser = size)]
    low: Option<u64>,

    /// Allocate all of it before the guest runs
    #[arg(long)]
    prealloc: bool,

    /// A command for the guest's shell
    #[arg(long, value_name = "COMMAND")]
    cmd: Option<String>,

    /// A shell in the guest, on /dev/terminal of this machine
    #[arg(long, conflicts_with = "cmd")]
    shell: bool,

    /// For comparison, also measure the same memory allocated ahead
    #[arg(long, value_name = "SIZE", value_parser = size)]
    beside: Option<u64>,

    /// Boot this many guests, one after the other
    #[arg(long, value_name = "N", default_value_t = 1)]
    times: u32,

    /// The distribution's kernel instead of the lab's
    #[arg(long)]
    stock: bool,

    /// Another QEMU, for instance this machine's
    #[arg(long, value_name = "FILE")]
    qemu: Option<PathBuf>,

    /// Folder of that QEMU's firmware
    #[arg(long, value_name = "DIR")]
    firmware: Option<PathBuf>,

    /// Another kernel for the guest
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Another process 1 for the guest
    #[arg(long, value_name = "FILE")]
    init: Option<PathBuf>,

    /// kvm, or tcg where there is none
    #[arg(long, value_name = "NAME", default_value = "kvm")]
    accel: String,

    /// Model and flags of the guest's CPU
    #[arg(long, value_name = "MODEL", default_value = CPU)]
    cpu: String,

    /// Multiply every time limit, for slow machines
    #[arg(long, value_name = "N", default_value_t = 1)]
    time_factor: u32,

    /// More arguments for the guest's kernel
    #[arg(long, value_name = "ARGUMENTS", default_value = "", allow_hyphen_values = true)]
    append: String,

    /// More arguments for QEMU
    #[arg(last = true)]
    arguments: Vec<String>,
}

fn kind(name: &str) -> Result<Kind, String> {
    let found = Kind::NAMES.iter().find(|(known, _)| *known == name);
    found.map(|(_, kind)| *kind).ok_or_else(|| {
        let names = Kind::NAMES.map(|(name, _)| name);
        format!("one of {}", names.join(", "))
    })
}

/// Bytes; a plain number means MiB.
fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, GIB),
        None => (text.strip_suffix(['M', 'm']).unwrap_or(text), MIB),
    };
    let count: u64 = digits.parse().map_err(|_| "not a number of MiB".to_owned())?;
    match count.checked_mul(unit) {
        Some(bytes) if bytes > 0 => Ok(bytes),
        _ => Err("not a size".into()),
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("memfile-vm: {e:#}");
            ExitCode::from(if e.is::<NoBoot>() { NO_BOOT } else { FAILED })
        }
    }
}

fn lab(args: &Args) -> Result<Lab> {
    let mut lab = match &args.qemu {
        Some(qemu) => Lab { qemu: qemu.clone(), ..Lab::expected() },
        None => Lab::find()?,
    };
    if args.stock {
        lab = lab.with_stock_kernel()?;
    }
    lab.firmware.clone_from(&args.firmware);
    for (place, given) in [(&mut lab.kernel, &args.kernel), (&mut lab.init, &args.init)] {
        if let Some(path) = given {
            place.clone_from(path);
        }
    }
    lab.accelerator.clone_from(&args.accel);
    lab.cpu.clone_from(&args.cpu);
    Ok(lab)
}

/// The cost of a guest for the host, in MiB, at several moments.
struct Cost {
    name: String,
    size: u64,
    figures: Vec<u64>,
}

/// Columns of [`Cost::figures`].
const WHEN: [&str; 4] = ["before it runs", "when it is up", "after the command", "when it is gone"];

fn run(args: &Args) -> Result<u8> {
    sys::set_time_factor(args.time_factor);
    let lab = lab(args)?;
    let layout = args.low.map_or(Layout::All, |low| Layout::Dimm { low });
    let memory = Memory { kind: args.memory, layout, size: args.size, prealloc: args.prealloc };
    let mut config = Config::new(memory).with(args.arguments.clone());
    config.append.clone_from(&args.append);
    config.busybox = args.cmd.is_some() || args.shell;
    if args.shell {
        return shell(&lab, config);
    }
    let mut costs = Vec::new();
    if let Some(size) = args.beside {
        costs.push(beside(&lab, &config, size)?);
    }
    let (mut code, mut failed) = (0, 0);
    for n in 1..=args.times {
        match boot(&lab, &config, args) {
            Ok((of_command, cost)) => {
                code = of_command;
                costs.push(cost);
            }
            Err(e) if args.times > 1 => {
                failed += 1;
                eprintln!("guest {n}: {e:#}");
            }
            Err(e) => return Err(e),
        }
    }
    print_costs(&costs)?;
    if failed > 0 {
        bail!("{failed} of {} guests failed", args.times);
    }
    Ok(code)
}

/// Growth of the machine's content, in MiB.
struct Meter(u64);

impl Meter {
    fn new() -> Result<Meter> {
        Ok(Meter(mem::content()?))
    }

    fn read(&self) -> Result<u64> {
        Ok(mem::content()?.saturating_sub(self.0) / MIB)
    }
}

/// The same guest with memory that is allocated ahead; it need not run for that.
fn beside(lab: &Lab, config: &Config, size: u64) -> Result<Cost> {
    eprintln!("{} MiB that are allocated ahead", size / MIB);
    let mut config = config.clone();
    config.memory = Memory { size, prealloc: true, ..config.memory };
    let meter = Meter::new()?;
    let machine = Machine::start(lab, &config)?;
    let figures = vec![meter.read()?];
    machine.kill()?;
    Ok(Cost { name: format!("{}, allocated ahead", config.memory.kind.what()), size, figures })
}

fn boot(lab: &Lab, config: &Config, args: &Args) -> Result<(u8, Cost)> {
    let Memory { kind, size, .. } = config.memory;
    eprintln!("{} MiB of {}", size / MIB, kind.what());
    let meter = Meter::new()?;
    let mut machine = Machine::start(lab, config)?;
    let mut figures = vec![meter.read()?];
    let took = machine.boot_with(&mut |line| eprintln!("  {line}"))?;
    figures.push(meter.read()?);
    let release = machine.guest().release().to_owned();
    eprintln!("Linux {release} is up after {:.1} s", took.as_secs_f64());
    let mut code = 0;
    if let Some(command) = &args.cmd {
        machine.guest().set_limit(FOR_EVER);
        code = machine.guest().run(command, &mut |text| {
            // Each character stands for a byte of the command's output.
            let bytes: Vec<u8> = text.chars().map(|c| c as u32 as u8).collect();
            let _ = std::io::stdout().write_all(&bytes).and_then(|()| std::io::stdout().flush());
        })?;
        figures.push(meter.read()?);
    }
    machine.shut_down()?;
    if figures.len() + 1 == WHEN.len() {
        figures.push(meter.read()?);
    }
    let code = u8::try_from(code).with_context(|| format!("the command ended with {code}"))?;
    Ok((code, Cost { name: format!("{}, on demand", kind.what()), size, figures }))
}

/// A guest whose console is this machine's terminal.
fn shell(lab: &Lab, mut config: Config) -> Result<u8> {
    let terminal = File::options().read(true).write(true).open("/dev/terminal");
    let terminal = Arc::new(terminal.context("/dev/terminal")?);
    let (ours, console) = UnixStream::pair().context("a pair of sockets")?;
    config.terminal = Some(Arc::new(console.into()));
    config.append += " quiet";
    let (keys, screen) = (ours.try_clone()?, terminal.clone());
    thread::spawn(move || std::io::copy(&mut &*terminal, &mut { keys }));
    thread::spawn(move || std::io::copy(&mut { ours }, &mut &*screen));
    let mut machine = Machine::start(lab, &config)?;
    machine.boot()?;
    machine.guest().set_limit(FOR_EVER);
    let code = machine.guest().shell()?;
    machine.shut_down()?;
    u8::try_from(code).with_context(|| format!("the shell ended with {code}"))
}

fn print_costs(costs: &[Cost]) -> Result<()> {
    let widest = costs.iter().map(|cost| cost.name.len()).max().unwrap_or(0);
    let machine = mem::meminfo("MemTotal")? / MIB;
    println!("\nHost memory in MiB, in a machine of {machine}.\n");
    print!("{:widest$}  {:>6}", "guest memory", "size");
    WHEN.iter().for_each(|when| print!("  {when}"));
    println!();
    for cost in costs {
        print!("{:widest$}  {:>6}", cost.name, cost.size / MIB);
        for (when, figure) in WHEN.iter().zip(&cost.figures) {
            print!("  {figure:>width$}", width = when.len());
        }
        println!();
    }
    Ok(())
}
