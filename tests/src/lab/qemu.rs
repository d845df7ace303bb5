//! A QEMU process: its command line, its directory of sockets and logs, and its end.

use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What a QEMU is started for.
#[derive(Debug)]
pub(super) enum Mode {
    /// Guest memory is a new file, shared with it.
    Boot,
    /// Guest memory is a private mapping of a memory file.
    RestoreFromFile,
    /// Guest memory is anonymous and filled by a userfaultfd handler.
    RestoreFromUffd { library: PathBuf, socket: PathBuf },
}

/// What the command line is made of. A restore needs the command line of the boot: the machine that
/// loads a state has to be the one that saved it.
#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) image: &'a Path,
    /// The memory file; not used for a restore by userfaultfd.
    pub(super) memory: &'a Path,
    pub(super) disk: &'a Path,
    pub(super) memory_mib: u32,
    pub(super) function: &'a str,
    pub(super) mode: Mode,
}

/// A running QEMU and its directory; both end when this is dropped.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    directory: TempDir,
    pub(super) started: Instant,
}

impl Machine<'_> {
    /// Starts QEMU.
    pub(super) fn start(&self) -> Result<Process> {
        // Socket paths are limited to 107 bytes, so not below a directory of the caller's.
        let directory = tempfile::Builder::new().prefix("reap-lab-").tempdir()?;
        let mut command = self.command(directory.path())?;
        let errors = File::create(directory.path().join("qemu.log"))?;
        command.stdin(Stdio::null()).stdout(errors.try_clone()?).stderr(errors);
        let started = Instant::now();
        let child = command.spawn().context("cannot start qemu-system-x86_64")?;
        Ok(Process { child, directory, started })
    }

    fn command(&self, directory: &Path) -> Result<Command> {
        let mut command = Command::new("qemu-system-x86_64");
        let mut memory = self.memory.to_owned();
        let share = match &self.mode {
            Mode::Boot => "on",
            Mode::RestoreFromFile => "off",
            Mode::RestoreFromUffd { library, socket } => {
                // QEMU opens and measures it; the library keeps it from being mapped.
                memory = directory.join("placeholder");
                File::create(&memory)?.set_len(u64::from(self.memory_mib) << 20)?;
                command.env("LD_PRELOAD", library);
                command.env("REAP_UFFD_SOCKET", socket).env("REAP_UFFD_MEMORY", &memory);
                "off"
            }
        };
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-machine", "pc,accel=tcg,memory-backend=mem", "-cpu", "max", "-smp", "1"]);
        command.args(["-m", &self.memory_mib.to_string(), "-object"]);
        command.arg(format!(
            "memory-backend-file,id=mem,size={}M,share={share},mem-path={}",
            self.memory_mib,
            option(&memory)?
        ));
        command.arg("-kernel").arg(self.image.join("kernel"));
        command.arg("-initrd").arg(self.image.join("initramfs"));
        // The kernel's messages have a line of their own; the first one belongs to the requests.
        command.arg("-append");
        command.arg(format!("console=ttyS1 panic=-1 reap.function={}", self.function));
        let disk = option(self.disk)?;
        command.arg("-drive").arg(format!("if=none,id=disk,format=raw,readonly=on,file={disk}"));
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
        let path = |name: &str| directory.join(name);
        let listen = "server=on,wait=off,path=";
        command.arg("-chardev");
        command.arg(format!("socket,id=requests,{listen}{}", option(&path("requests"))?));
        command.args(["-serial", "chardev:requests", "-serial"]);
        command.arg(format!("file:{}", path("console.log").display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", option(&path("qmp"))?));
        if !matches!(self.mode, Mode::Boot) {
            command.args(["-incoming", "defer", "-S"]);
        }
        Ok(command)
    }
}

/// A path within one of QEMU's comma-separated options, where a comma is written twice.
fn option(path: &Path) -> Result<String> {
    match path.to_str() {
        Some(text) => Ok(text.replace(',', ",,")),
        None => bail!("QEMU's options take no path that is not UTF-8: {}", path.display()),
    }
}

impl Process {
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sockets, logs and whatever else goes with this process.
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// An error when QEMU has ended by itself.
    pub(super) fn check_alive(&mut self, doing: &str) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => {
                bail!(self.failure(doing, &format!("cannot go on, QEMU ended ({status})")))
            }
        }
    }

    /// Waits for QEMU to end by itself.
    pub(super) fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!(self.failure("QEMU", &format!("did not end in {timeout:?}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A message that says what went wrong, with the ends of both logs.
    pub(super) fn failure(&self, what: &str, how: &str) -> String {
        let mut message = format!("{what} {how}");
        for name in ["qemu.log", "console.log"] {
            let end = end_of(&self.directory.path().join(name));
            if !end.is_empty() {
                message.push_str(&format!("\n--- end of {name}:\n{end}"));
            }
        }
        message
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only when it has ended already; it is waited for either way.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last lines of a log, or nothing.
fn end_of(log: &Path) -> String {
    const BYTES: u64 = 2000;
    let mut bytes = Vec::new();
    if let Ok(mut file) = File::open(log) {
        let length = fs::metadata(log).map_or(0, |metadata| metadata.len());
        let _ = file.seek(SeekFrom::Start(length.saturating_sub(BYTES)));
        let _ = file.take(BYTES).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).trim().to_owned()
}
