//! Real guests: boots a small Linux with a Python function server in QEMU (TCG, so no KVM is needed),
//! snapshots it, and restores it from a memory file or through a userfaultfd handler.
//!
//! ```no_run
//! use reap_tests::lab::{Backend, Lab};
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::open()?;
//! let directory = tempfile::tempdir()?;
//! let mut guest = lab.boot("pyaes", 256, directory.path())?;
//! let before = guest.request("one")?;
//! let snapshot = guest.snapshot(&directory.path().join("snapshot"))?;
//!
//! let backend = Backend::File(snapshot.memory.clone());
//! let mut guest = lab.restore_paused(&snapshot, &backend)?;
//! guest.compare_memory(&snapshot.memory)?.expect_equal()?;
//! guest.resume()?;
//! let after = guest.request("one")?;
//! assert_eq!(before.line, after.line);
//! println!("answered {:?} after the resume", after.since_resume);
//! # Ok(())
//! # }
//! ```
//!
//! Everything that a guest needs while it runs lies in a temporary directory that goes with it. A
//! dropped [`Guest`] ends its QEMU, and every wait has a deadline; an error carries the end of QEMU's
//! and of the guest kernel's messages.

mod guest;
mod line;
mod memory;
mod qemu;
mod qmp;

pub use guest::{Answer, Guest, Times};
pub use memory::{Comparison, count_data_pages, drop_caches, evict, evict_tree};

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The function that reads its disk at each request: for tests of disks, no benchmark.
pub const READS_ITS_DISK: &str = "library_read";

/// The other functions that a guest can serve, each a file of `tests/lab/functions`.
pub const FUNCTIONS: [&str; 6] =
    ["helloworld", "chameleon", "pyaes", "json_serdes", "image_rotate", "lr_serving"];

/// Guest memory that a restore may have, in MiB: above, the PC machine splits memory in two at the
/// MMIO hole, and guest-physical addresses would no longer be offsets into the memory file.
const MEMORY_MIB: std::ops::RangeInclusive<u32> = 128..=2048;

/// The guest image and the preloaded library, built when first asked for.
#[derive(Debug)]
pub struct Lab {
    /// Holds `kernel`, `initramfs` and `disk`.
    image: PathBuf,
    output: PathBuf,
    uffd_library: OnceLock<PathBuf>,
}

/// The files of one paused guest. A test may point any of them elsewhere, at a mount for example.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Guest memory: raw, sparse, `memory_mib` long.
    pub memory: PathBuf,
    /// QEMU's device state, without guest memory.
    pub state: PathBuf,
    /// The guest's disk, read-only: the image's own, so it can be a hard link.
    pub disk: PathBuf,
    /// Size of guest memory in MiB.
    pub memory_mib: u32,
    /// The function that the guest serves.
    pub function: String,
}

impl Snapshot {
    /// The files that `Guest::snapshot` left in `directory`.
    #[must_use]
    pub fn at(directory: &Path, function: &str, memory_mib: u32) -> Snapshot {
        Snapshot {
            memory: directory.join("memory"),
            state: directory.join("state"),
            disk: directory.join("disk"),
            memory_mib,
            function: function.to_owned(),
        }
    }
}

/// Where a restored guest's memory comes from.
#[derive(Debug, Clone)]
pub enum Backend {
    /// QEMU maps this file, privately; it opens it for reading and writing all the same.
    File(PathBuf),
    /// A userfaultfd handler that listens on this socket.
    Uffd {
        /// The handler's Unix socket.
        socket: PathBuf,
    },
}

impl Lab {
    /// Builds the guest image where it is missing or older than its sources.
    ///
    /// It lies in `target/lab` of the project, or in `REAP_LAB_DIR`. Building needs Debian 12, its
    /// package archive and, for what is not installed, root.
    pub fn open() -> Result<Lab> {
        let output = match std::env::var_os("REAP_LAB_DIR") {
            Some(directory) => PathBuf::from(directory),
            None => project().join("target/lab"),
        };
        let script = project().join("tests/lab/build-guest.sh");
        let built = Command::new(&script)
            .arg(&output)
            .output()
            .with_context(|| format!("cannot run {}", script.display()))?;
        ensure!(
            built.status.success(),
            "the guest image cannot be built: {}",
            String::from_utf8_lossy(&built.stderr).trim_end()
        );
        let link = output.join("guest");
        let image =
            fs::canonicalize(&link).with_context(|| format!("no image at {}", link.display()))?;
        let output = fs::canonicalize(&output)?;
        Ok(Lab { image, output, uffd_library: OnceLock::new() })
    }

    /// Boots a guest and waits until its function is imported and warm. Its memory file lies in
    /// `directory`, which is made if need be; `snapshot` moves it from there.
    pub fn boot(&self, function: &str, memory_mib: u32, directory: &Path) -> Result<Guest> {
        let there = function == READS_ITS_DISK || FUNCTIONS.contains(&function);
        ensure!(there, "no function {function:?}: one of {FUNCTIONS:?} or {READS_ITS_DISK:?}");
        check_memory_size(memory_mib)?;
        fs::create_dir_all(directory)?;
        let memory = fs::canonicalize(directory)?.join("memory");
        ensure!(!memory.exists(), "{} is there already", memory.display());
        let machine = qemu::Machine {
            image: &self.image,
            memory: &memory,
            disk: &self.image.join("disk"),
            memory_mib,
            function,
            mode: qemu::Mode::Boot,
        };
        Guest::boot(&machine)
    }

    /// Loads a snapshot and stops short of resuming it, so that the caller can look at its memory.
    pub fn restore_paused(&self, snapshot: &Snapshot, backend: &Backend) -> Result<Guest> {
        check_memory_size(snapshot.memory_mib)?;
        let (memory, mode) = match backend {
            Backend::File(memory) => (memory.clone(), qemu::Mode::RestoreFromFile),
            Backend::Uffd { socket } => {
                let library = self.uffd_library()?;
                let socket = fs::canonicalize(socket)
                    .with_context(|| format!("no handler's socket at {}", socket.display()))?;
                (PathBuf::new(), qemu::Mode::RestoreFromUffd { library, socket })
            }
        };
        let machine = qemu::Machine {
            image: &self.image,
            memory: &memory,
            disk: &snapshot.disk,
            memory_mib: snapshot.memory_mib,
            function: &snapshot.function,
            mode,
        };
        Guest::restore_paused(&machine, &snapshot.state)
    }

    /// Loads a snapshot and resumes it.
    pub fn restore(&self, snapshot: &Snapshot, backend: &Backend) -> Result<Guest> {
        let mut guest = self.restore_paused(snapshot, backend)?;
        guest.resume()?;
        Ok(guest)
    }

    /// The library to preload into QEMU for a restore by userfaultfd, built by cargo when first asked
    /// for: a package's tests do not build another package's library.
    pub fn uffd_library(&self) -> Result<PathBuf> {
        if let Some(library) = self.uffd_library.get() {
            return Ok(library.clone());
        }
        let target = self.output.join("qemu-uffd");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .current_dir(project())
            .args(["build", "--quiet", "--release", "--package", "reap-qemu-uffd"])
            .arg("--target-dir")
            .arg(&target)
            .output()
            .context("cannot run cargo")?;
        if !built.status.success() {
            let reason = String::from_utf8_lossy(&built.stderr);
            bail!("reap-qemu-uffd does not build: {}", reason.trim_end());
        }
        let library = target.join("release/libreap_qemu_uffd.so");
        ensure!(library.exists(), "cargo built no {}", library.display());
        Ok(self.uffd_library.get_or_init(|| library).clone())
    }
}

/// The project's top folder, as it was when this was compiled.
fn project() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

fn check_memory_size(memory_mib: u32) -> Result<()> {
    ensure!(
        MEMORY_MIB.contains(&memory_mib),
        "{memory_mib} MiB of guest memory: the laboratory takes {MEMORY_MIB:?}"
    );
    Ok(())
}
