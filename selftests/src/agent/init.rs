// SPDX-License-Identifier: GPL-2.0
//! Process 1 of a real guest: sets the guest up, and then serves the host's requests.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};

use super::area::Area;
use super::conversion::Converter;
use super::worker::Worker;
use super::{MODULES, ORDER, PORT, READY, line, words};
use crate::pattern::Pattern;
use crate::sys::{self, check};
use crate::uapi::KVM_MAP_GPA_RANGE_ENCRYPTED;
use crate::{mem, module};

/// File systems: type and place. Those that a kernel lacks are left out.
const MOUNTS: [(&str, &str); 4] =
    [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")];

/// Be process 1, until the machine is off.
pub fn run() -> Result<()> {
    for (kind, place) in MOUNTS {
        fs::create_dir_all(place)?;
        if let Err(e) = mount(kind, place) {
            println!("guest: mount {place}: {e:#}");
        }
    }
    load_modules();
    let port = argument(PORT)?.with_context(|| format!("the command line has no {PORT}"))?;
    let mut agent = Agent::open(&port)?;
    agent.serve()
}

fn mount(kind: &str, place: &str) -> Result<()> {
    let (kind, place) = (CString::new(kind)?, CString::new(place)?);
    // SAFETY: The names are C strings, and none of these takes options.
    let ret =
        unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    check(ret).map(drop).context("mount")
}

/// Loads the modules that the guest's kernel needs. A missing module shows when it is used.
fn load_modules() {
    let folder = Path::new(MODULES);
    let order = fs::read_to_string(folder.join(ORDER)).unwrap_or_default();
    for name in order.lines() {
        if let Err(e) = module::load_file(&folder.join(name), "") {
            println!("guest: module {name}: {e:#}");
        }
    }
}

/// The value of an argument on the kernel's command line.
fn argument(name: &str) -> Result<Option<String>> {
    let line = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    let mut values = line.split_whitespace().filter_map(|word| word.split_once('='));
    Ok(values.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned()))
}

/// Make a terminal pass bytes unchanged.
fn make_raw(port: &File) -> Result<()> {
    // SAFETY: All zero is a valid termios, and the calls fill in or read the whole of it.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        check(libc::tcgetattr(port.as_raw_fd(), &mut settings)).context("tcgetattr")?;
        libc::cfmakeraw(&mut settings);
        check(libc::tcsetattr(port.as_raw_fd(), libc::TCSANOW, &settings)).context("tcsetattr")?;
    }
    Ok(())
}

/// The requests that the host can make.
struct Agent {
    input: BufReader<File>,
    output: File,
    areas: HashMap<String, Area>,
    workers: Vec<Worker>,
    /// The thread that a conversion was made against.
    other: Option<JoinHandle<Result<()>>>,
}

impl Agent {
    fn open(port: &str) -> Result<Agent> {
        let output = File::options().read(true).write(true).open(port);
        let output = output.with_context(|| format!("open {port}"))?;
        make_raw(&output)?;
        let input = BufReader::new(output.try_clone()?);
        Ok(Agent { input, output, areas: HashMap::new(), workers: Vec::new(), other: None })
    }

    fn say<S: AsRef<str>>(&mut self, words: impl IntoIterator<Item = S>) -> Result<()> {
        self.output.write_all(line(words).as_bytes()).context("write to the host")
    }

    fn serve(&mut self) -> Result<()> {
        let memory = mem::meminfo("MemTotal")? >> 10;
        let (release, memory) = (sys::kernel_release()?, memory.to_string());
        self.say([READY, &release, &memory])?;
        let mut text = String::new();
        loop {
            text.clear();
            if self.input.read_line(&mut text).context("read from the host")? == 0 {
                bail!("the port is closed");
            }
            let words = words(&text)?;
            let [number, verb, arguments @ ..] = words.as_slice() else { continue };
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            match self.obey(number, verb, &arguments) {
                Ok(words) => self.say([number, "ok"].into_iter().chain(strs(&words)))?,
                Err(e) => self.say([number, "no", &format!("{e:#}")])?,
            }
        }
    }

    fn obey(&mut self, number: &str, verb: &str, arguments: &[&str]) -> Result<Vec<String>> {
        let none = Vec::new();
        match (verb, arguments) {
            ("area", [kind, name, size]) => {
                let area = Area::new(kind, name, size.parse()?)?;
                self.areas.insert((*name).into(), area);
                Ok(none)
            }
            ("fill", [name, seed]) => self.area(name)?.fill(pattern(seed)?).map(|()| none),
            ("verify", [name, seed]) => {
                self.area(name)?.verify(pattern(seed)?, 0, None).map(|()| none)
            }
            ("verify", [name, seed, first, pages]) => {
                let (first, pages) = (first.parse()?, pages.parse()?);
                self.area(name)?.verify(pattern(seed)?, first, Some(pages)).map(|()| none)
            }
            ("frames", [name]) => {
                Ok(self.area(name)?.frames()?.iter().map(u64::to_string).collect())
            }
            ("release", [name]) => {
                self.areas.remove(*name).map(|_| none).with_context(|| format!("no area {name}"))
            }
            ("fork", [kind, count, bytes, seed]) => {
                let (count, seed): (u64, u64) = (count.parse()?, seed.parse()?);
                for n in 0..count {
                    self.workers.push(Worker::start(kind, bytes.parse()?, seed + n)?);
                }
                Ok(none)
            }
            ("begin", [kind, bytes, seed, cpu]) => {
                self.workers.push(Worker::begin(kind, bytes.parse()?, seed.parse()?, Some(cpu))?);
                Ok(none)
            }
            ("process", ["ready"]) => {
                self.workers.last_mut().context("there is no process")?.expect_answer()?;
                Ok(none)
            }
            ("process", ["frames"]) => {
                self.workers.last_mut().context("there is no process")?.frames()
            }
            ("process", ["place", frame]) => {
                let worker = self.workers.last_mut().context("there is no process")?;
                let place = worker.frames()?.iter().position(|other| other == frame);
                Ok(vec![place.context("the process does not have that frame")?.to_string()])
            }
            ("process", ["dies"]) => {
                let signal = self.workers.pop().context("there is no process")?.die()?;
                Ok(vec![signal.to_string()])
            }
            ("check", []) => self.workers.iter_mut().try_for_each(Worker::verify).map(|()| none),
            ("join", []) => self.workers.drain(..).try_for_each(Worker::end).map(|()| none),
            ("read", [path]) => {
                let text = fs::read_to_string(path).with_context(|| (*path).to_owned())?;
                Ok(vec![text])
            }
            ("write", [path, text]) => {
                fs::write(path, text).with_context(|| (*path).to_owned()).map(|()| none)
            }
            ("convert", [frame, pages, attributes]) => {
                let converter = Converter::open()?;
                converter.convert(frame.parse()?, pages.parse()?, attributes.parse()?)?;
                Ok(none)
            }
            ("conversions", ["two", name, rounds]) => {
                let area = self.area(name)?;
                Converter::open()?.convert_from_two_cpus(area, rounds.parse()?).map(|()| none)
            }
            ("conversions", ["against", name, seed]) => {
                let (area, converter) = (self.area(name)?, Converter::open()?);
                self.other = Some(converter.convert_against(area, pattern(seed)?)?);
                Ok(none)
            }
            ("conversions", ["joined"]) => {
                let other = self.other.take().context("there is no other thread")?;
                other.join().map_err(|_| anyhow!("it panicked"))?.map(|()| none)
            }
            ("storm", [name]) => loop {
                let (area, converter) = (self.area(name)?, Converter::open()?);
                for attributes in [0, KVM_MAP_GPA_RANGE_ENCRYPTED] {
                    for frame in area.frames()? {
                        converter.convert(frame, 1, attributes)?;
                    }
                    area.fill(Pattern::Generation(attributes))?;
                }
            },
            ("run", [command]) => self.run(number, command),
            ("shell", []) => shell().map(|code| vec![code.to_string()]),
            ("off", []) => {
                self.say([number, "ok"])?;
                // SAFETY: Takes no pointer.
                check(unsafe { libc::reboot(libc::RB_POWER_OFF) }).context("power off")?;
                Ok(none)
            }
            _ => bail!("there is no {verb} of {} words", arguments.len()),
        }
    }

    fn area(&self, name: &str) -> Result<&Area> {
        self.areas.get(name).with_context(|| format!("there is no area {name}"))
    }

    /// Runs a shell command: passes on its output, and returns its exit code.
    fn run(&mut self, number: &str, command: &str) -> Result<Vec<String>> {
        let (output, input) = sys::pipe()?;
        let mut output = File::from(output);
        let mut shell = busybox();
        shell.args(["-c", command]).stdin(Stdio::null());
        shell.stdout(input.try_clone()?).stderr(input);
        let mut child = shell.spawn().context("start the shell")?;
        // It holds the other ends of the pipe.
        drop(shell);
        let mut bytes = [0; 512];
        loop {
            let count = output.read(&mut bytes).context("read what the command says")?;
            if count == 0 {
                break;
            }
            // This may cut characters of several bytes: the host joins them again.
            let text: String = bytes[..count].iter().map(|&byte| char::from(byte)).collect();
            self.say([number, "out", &text])?;
        }
        Ok(vec![code_of(child.wait()?).to_string()])
    }
}

fn strs(words: &[String]) -> impl Iterator<Item = &str> {
    words.iter().map(String::as_str)
}

fn pattern(seed: &str) -> Result<Pattern> {
    Ok(match seed {
        "zero" => Pattern::ZERO,
        seed => Pattern::Generation(seed.parse().context("the seed is no number")?),
    })
}

fn busybox() -> Command {
    let mut shell = Command::new("/bin/busybox");
    shell.arg("sh").env_clear().current_dir("/");
    shell.env("PATH", "/bin:/sbin").env("HOME", "/").env("TERM", "linux");
    shell
}

/// As the shell has it.
fn code_of(status: std::process::ExitStatus) -> i32 {
    status.code().unwrap_or(128 + status.signal().unwrap_or(0))
}

/// A shell on the console, until it ends.
fn shell() -> Result<i32> {
    let console = File::options().read(true).write(true).open("/dev/ttyS0").context("console")?;
    let mut shell = busybox();
    shell.arg("-i");
    for stream in [Command::stdin, Command::stdout, Command::stderr] {
        stream(&mut shell, Stdio::from(console.as_fd().try_clone_to_owned()?));
    }
    // SAFETY: Two system calls: a session of its own, whose terminal is its standard input.
    unsafe {
        shell.pre_exec(|| {
            check(libc::setsid()).map_err(|e| std::io::Error::from_raw_os_error(e.0))?;
            check(libc::ioctl(0, libc::TIOCSCTTY, 0))
                .map_err(|e| std::io::Error::from_raw_os_error(e.0))?;
            Ok(())
        });
    }
    Ok(code_of(shell.status().context("start the shell")?))
}
