//! A VMM in a process of its own, on commands from standard input.
//!
//! `pretend-vmm SOCKET MEMORY-FILE` maps as much memory as the file is long, shakes hands and says `ANSWER ready`. Then
//! each line is a command, and each gets a line that begins with `ANSWER`:
//!
//! - `check FROM TO STRIDE PAUSE-US`: touches every STRIDEth page in between, compares it with the file (with zeros, where
//!   it was given back), and answers `right` with how long each touch took (us), or what is wrong.
//! - `remove FROM COUNT`: gives pages back.
//! - `flood FROM COUNT THREADS`: from now on threads give these pages back and touch them again, without end.
//! - `spin THREADS`: threads that only take time, to compare with.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use reap_vmm::{PAGE_BYTES, PretendVm};

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [socket, memory_file] = arguments.as_slice() else {
        bail!("pretend-vmm SOCKET MEMORY-FILE");
    };
    let file = File::open(memory_file).context("the memory file")?;
    let mut vm = PretendVm::whole(file.metadata()?.len() / PAGE_BYTES as u64)?;
    vm.connect(Path::new(socket))?;
    let mut guest = Guest { vm: Arc::new(vm), file, removed: HashSet::new() };
    answer("ready")?;
    for line in std::io::stdin().lines() {
        let text = guest.obey(&line?)?;
        answer(&text)?;
    }
    // Threads that flood end with the process.
    std::process::exit(0);
}

fn answer(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "ANSWER {text}")?;
    Ok(out.flush()?)
}

struct Guest {
    vm: Arc<PretendVm>,
    file: File,
    removed: HashSet<u64>,
}

impl Guest {
    fn obey(&mut self, line: &str) -> Result<String> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let numbers: Vec<u64> =
            rest.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        match (word, numbers.as_slice()) {
            ("check", [from, to, stride, pause_us]) => {
                let pause = Duration::from_micros(*pause_us);
                self.check((*from..*to).step_by(*stride as usize), pause)
            }
            ("remove", [from, count]) => {
                self.vm.remove(self.address(*from), *count);
                self.removed.extend(*from..from + count);
                Ok("done".into())
            }
            ("flood", [from, count, threads]) => {
                self.removed.extend(*from..from + count);
                for part in 0..*threads {
                    let share = count / threads;
                    let (vm, first) = (self.vm.clone(), self.address(from + part * share));
                    std::thread::spawn(move || flood(&vm, first, share));
                }
                Ok("done".into())
            }
            ("spin", [threads]) => {
                for _ in 0..*threads {
                    std::thread::spawn(|| {
                        loop {
                            std::hint::spin_loop();
                        }
                    });
                }
                Ok("done".into())
            }
            _ => bail!("no such command: {line}"),
        }
    }

    fn address(&self, page: u64) -> u64 {
        self.vm.regions()[0].0 + page * PAGE_BYTES as u64
    }

    fn check(&self, pages: impl Iterator<Item = u64>, pause: Duration) -> Result<String> {
        let mut expected = vec![0; PAGE_BYTES];
        let mut took_us = Vec::new();
        for page in pages {
            let began = Instant::now();
            let bytes = self.vm.read(self.address(page));
            took_us.push(began.elapsed().as_micros().to_string());
            match self.removed.contains(&page) {
                true => expected.fill(0),
                false => self.file.read_exact_at(&mut expected, page * PAGE_BYTES as u64)?,
            }
            if bytes != expected {
                let zeros = bytes.iter().all(|byte| *byte == 0);
                let what = if zeros { "zeros" } else { "other bytes" };
                return Ok(format!("page {page} is wrong: {what}"));
            }
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
        }
        Ok(format!("right {}", took_us.join(" ")))
    }
}

fn flood(vm: &PretendVm, first: u64, pages: u64) {
    loop {
        vm.remove(first, pages);
        for page in 0..pages {
            if vm.read(first + page * PAGE_BYTES as u64).iter().any(|byte| *byte != 0) {
                // The test sees the end of the process.
                eprintln!("a page that was given back has bytes");
                std::process::exit(1);
            }
        }
    }
}
