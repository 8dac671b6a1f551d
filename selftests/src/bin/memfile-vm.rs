// SPDX-License-Identifier: GPL-2.0
//! Boots a real guest in a real QEMU, on memory of any kind, and does something in it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;
use memfile_selftests::qemu::{CPU, Config, Kind, Lab, Layout, Machine, Memory, NoBoot};
use memfile_selftests::{GIB, MIB, mem, sys};

/// Exit status of a guest that did not come up, and of other failures of this program's.
const NO_BOOT: u8 = 125;
const FAILED: u8 = 1;

/// Boot a real guest in a real QEMU, and say what that cost the host.
///
/// Exit status: that of the command in the guest; 125 if the guest did not come up; 1 if something
/// else failed, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// What backs the guest's memory: anonymous, shared, pinned, movable, reclaimable, both,
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

    /// Boot so many guests, one after the other
    #[arg(long, value_name = "N", default_value_t = 1)]
    times: u32,

    /// The distribution's kernel instead of the lab's
    #[arg(long)]
    stock: bool,

    /// Another QEMU, for instance this machine's
    #[arg(long, value_name = "FILE")]
    qemu: Option<PathBuf>,

    /// Where that finds its firmware
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

fn run(args: &Args) -> Result<u8> {
    sys::set_time_factor(args.time_factor);
    let lab = lab(args)?;
    let layout = args.low.map_or(Layout::All, |low| Layout::Dimm { low });
    let memory = Memory { kind: args.memory, layout, size: args.size, prealloc: args.prealloc };
    let mut config = Config::new(memory).with(args.arguments.clone());
    config.append.clone_from(&args.append);
    config.busybox = args.cmd.is_some();
    let (mut code, mut failed) = (0, 0);
    for n in 1..=args.times {
        match boot(&lab, &config, args) {
            Ok(of_command) => code = of_command,
            Err(e) if args.times > 1 => {
                failed += 1;
                eprintln!("guest {n}: {e:#}");
            }
            Err(e) => return Err(e),
        }
    }
    if failed > 0 {
        bail!("{failed} of {} guests failed", args.times);
    }
    Ok(code)
}

fn boot(lab: &Lab, config: &Config, args: &Args) -> Result<u8> {
    let before = mem::content()?;
    let grown = || -> Result<u64> { Ok(mem::content()?.saturating_sub(before) / MIB) };
    let mut machine = Machine::start(lab, config)?;
    eprintln!("QEMU is up, {} MiB of the host's memory", grown()?);
    let took = machine.boot_with(&mut |line| eprintln!("{line}"))?;
    let release = machine.guest().release().to_owned();
    eprintln!("Linux {release} is up after {:.1} s, {} MiB", took.as_secs_f64(), grown()?);
    let mut code = 0;
    if let Some(command) = &args.cmd {
        machine.guest().set_limit(Duration::from_secs(3600));
        let mut out = Vec::new();
        code = machine.guest().run(command, &mut |text| {
            out.extend(text.chars().map(|c| c as u32 as u8));
        })?;
        use std::io::Write;
        std::io::stdout().write_all(&out)?;
        eprintln!("the command ended with {code}, {} MiB", grown()?);
    }
    machine.shut_down()?;
    if !(0..=255).contains(&code) {
        bail!("the command ended with {code}");
    }
    Ok(code as u8)
}
