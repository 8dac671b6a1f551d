// SPDX-License-Identifier: GPL-2.0
//! Crashes this kernel while guests have private memory, for the suite `crash_dump`.

use std::convert::Infallible;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use memfile_selftests::pressure::load_crash_kernel;
use memfile_selftests::qemu::Archive;
use memfile_selftests::support::crash::{HIDDEN, PINNED, SIZE};
use memfile_selftests::support::setup::{self, Setup};

/// Make guests with private memory, in the kernel's direct map and out of it, and crash the kernel.
/// The next kernel has the same initramfs and runs the same command, which finds /proc/vmcore.
///
/// Does not return. Exit status: 1 the kernel did not crash, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The next kernel
    #[arg(long, value_name = "BZIMAGE", default_value = "/add/bzImage")]
    kernel: String,
}

fn main() -> ExitCode {
    let Err(e) = run(&Args::parse());
    eprintln!("memfile-crash: {e:#}");
    ExitCode::FAILURE
}

fn run(args: &Args) -> Result<Infallible> {
    let initramfs = Path::new("/tmp/initramfs");
    fs::write(initramfs, archive()?).context("write the initramfs")?;
    load_crash_kernel(Path::new(&args.kernel), initramfs, &command_line()?)?;
    let mut guests = Vec::new();
    for (flags, pattern) in [(setup::HIDDEN, HIDDEN), (setup::PINNED, PINNED)] {
        let mut s = Setup::with_flags(flags, SIZE)?;
        s.vcpu.fill(s.slot.gpa, SIZE, pattern)?;
        guests.push(s);
    }
    fs::write("/proc/sysrq-trigger", "c").context("crash")?;
    bail!("the kernel did not crash")
}

/// The files of this kernel's root that the next kernel needs.
fn archive() -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.device("dev/console", 5, 1)?;
    let mut files: Vec<_> =
        ["/init", "/cmd", "/bin/busybox", "/bin/memfile-tests"].map(Into::into).into();
    for entry in fs::read_dir("/lib/modules").context("/lib/modules")? {
        files.push(entry?.path());
    }
    for path in files {
        archive.copy(&path.display().to_string()[1..], &path)?;
    }
    archive.finish()
}

/// The command line of this kernel without the memory that it keeps, and with one CPU.
fn command_line() -> Result<String> {
    let line = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    let words = line.split_whitespace().filter(|word| !word.starts_with("crashkernel="));
    Ok(words.chain(["nr_cpus=1", "reset_devices"]).collect::<Vec<_>>().join(" "))
}
