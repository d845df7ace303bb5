//! 2 MiB pages of the kernel for a test, given back at its end, whatever end that is.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

const PATH: &str = "/proc/sys/vm/nr_hugepages";

/// A pool that is larger by some pages. Held by one process at a time.
///
/// A child process waits for the end of a pipe, which comes even when this process is killed, and then writes the
/// former size; the lock on the file is the child's too.
pub struct HugePool(Child);

impl HugePool {
    /// Raises the pool by `pages`; an error if the kernel has not so many in one piece.
    pub fn of(pages: u64) -> Result<Self> {
        let mut file = File::options().read(true).write(true).open(PATH).context(PATH)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
        let before = size(&mut file)?;
        let child = Command::new("sh")
            .args(["-c", &format!("read _; echo {before}")])
            .stdin(Stdio::piped())
            .stdout(file)
            .spawn()?;
        // From here on the child gives them back.
        let pool = Self(child);
        std::fs::write(PATH, (before + pages).to_string())?;
        let now = size(&mut File::open(PATH)?)?;
        ensure!(now >= before + pages, "{now} 2 MiB pages, not {}", before + pages);
        Ok(pool)
    }
}

fn size(file: &mut File) -> Result<u64> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text.trim().parse()?)
}

impl Drop for HugePool {
    fn drop(&mut self) {
        // Failing is as good: the pipe is closed a line later.
        let _ = self.0.stdin.take().map(|mut pipe| pipe.write_all(b"\n"));
        let _ended = self.0.wait();
    }
}
