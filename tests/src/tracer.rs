//! A program under `ptrace`, killed at one exact system call.
//!
//! Calls are counted over all threads of the program, and only those that change something under one
//! directory: a kill between two of them finds the same files as a kill before the second.
#![expect(unsafe_code, reason = "the kernel's interface for tracing")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Longer paths are none of ours.
const MAX_PATH_BYTES: usize = 4096;

/// Where to kill, by the number of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillAt {
    /// When the program asks for it: it does not happen.
    Before(usize),
    /// When it is done, and nothing after it.
    After(usize),
}

/// How a traced program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with this exit code.
    Exited(i32),
    /// As wished.
    Killed,
}

/// What a traced program did.
#[derive(Clone, Debug)]
pub struct Traced {
    /// The calls that changed something, by name, in order; the one it was killed at is the last.
    pub calls: Vec<&'static str>,
    /// How it ended.
    pub end: End,
}

/// Runs a program to its end, or until it is killed. `root` is a directory without symbolic links in
/// its path; calls that change something elsewhere are not counted.
pub fn run(command: &mut Command, root: &Path, kill_at: Option<KillAt>) -> Result<Traced> {
    // SAFETY: between fork and exec only this one system call is made.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(std::io::Error::from)) };
    let child = command.spawn()?;
    let main = Pid::from_raw(child.id().cast_signed());
    let mut run = Run { main, root, kill_at, calls: Vec::new(), leaving: None };
    let end = run.follow();
    if end.is_err() {
        // It may be gone already.
        kill(main, Signal::SIGKILL).unwrap_or_default();
        while waitpid(main, Some(WaitPidFlag::__WALL)).is_ok_and(|status| !is_end(status, main)) {}
    }
    Ok(Traced { end: end?, calls: run.calls })
}

struct Run<'a> {
    main: Pid,
    root: &'a Path,
    kill_at: Option<KillAt>,
    calls: Vec<&'static str>,
    /// The thread that must be killed when it leaves its call.
    leaving: Option<Pid>,
}

impl Run<'_> {
    fn follow(&mut self) -> Result<End> {
        let first = waitpid(self.main, Some(WaitPidFlag::__WALL))?;
        let WaitStatus::Stopped(_, Signal::SIGTRAP) = first else {
            bail!("the program cannot be traced: {first:?}");
        };
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_EXITKILL;
        ptrace::setoptions(self.main, options)?;
        ptrace::syscall(self.main, None)?;
        let mut is_killed = false;
        loop {
            // This thread's own children alone: other tests run beside this one.
            let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
            let status = waitpid(Pid::from_raw(-1), Some(flags))?;
            let (thread, signal) = match status {
                WaitStatus::Exited(pid, code) if pid == self.main => return Ok(End::Exited(code)),
                WaitStatus::Signaled(pid, signal, _) if pid == self.main => {
                    ensure!(is_killed && signal == Signal::SIGKILL, "ended by {signal}");
                    return Ok(End::Killed);
                }
                WaitStatus::PtraceSyscall(thread) => {
                    if !is_killed && self.must_die(thread)? {
                        kill(self.main, Signal::SIGKILL)?;
                        is_killed = true;
                    }
                    (thread, None)
                }
                // A thread that begins stops so.
                WaitStatus::Stopped(thread, Signal::SIGSTOP) => (thread, None),
                WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
                WaitStatus::PtraceEvent(thread, ..) => (thread, None),
                _ => continue,
            };
            match ptrace::syscall(thread, signal) {
                // Killed meanwhile.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// At a thread's way into or out of the kernel: whether this is where to kill.
    fn must_die(&mut self, thread: Pid) -> Result<bool> {
        let info = match ptrace::syscall_info(thread) {
            Err(Errno::ESRCH) => return Ok(false),
            info => info?,
        };
        if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
            return Ok(self.leaving == Some(thread));
        }
        // SAFETY: the kernel filled in what stands for an entry, as it said in `op`.
        let entry = unsafe { info.u.entry };
        let Some(name) = self.change(thread, entry.nr.cast_signed(), &entry.args) else {
            return Ok(false);
        };
        if self.leaving.is_some() {
            // What happens after the call that it is killed after, is none of its calls.
            return Ok(false);
        }
        let number = self.calls.len();
        self.calls.push(name);
        if self.kill_at == Some(KillAt::After(number)) {
            self.leaving = Some(thread);
        }
        Ok(self.kill_at == Some(KillAt::Before(number)))
    }

    /// The name of a call that changes something under the root.
    fn change(&self, thread: Pid, call: i64, args: &[u64; 6]) -> Option<&'static str> {
        let by_descriptor = |name| self.is_ours(thread, args[0]).then_some(name);
        let by_path = |name, path: u64| self.is_ours_by_path(thread, path).then_some(name);
        match call {
            libc::SYS_openat if args[2] & libc::O_CREAT.cast_unsigned() as u64 != 0 => {
                by_path("openat", args[1])
            }
            libc::SYS_write => by_descriptor("write"),
            libc::SYS_pwrite64 => by_descriptor("pwrite"),
            libc::SYS_writev => by_descriptor("writev"),
            libc::SYS_ftruncate => by_descriptor("ftruncate"),
            libc::SYS_fallocate => by_descriptor("fallocate"),
            libc::SYS_fsync => by_descriptor("fsync"),
            libc::SYS_fdatasync => by_descriptor("fdatasync"),
            libc::SYS_linkat => by_path("linkat", args[1]),
            libc::SYS_renameat | libc::SYS_renameat2 => by_path("renameat", args[1]),
            libc::SYS_unlinkat => by_path("unlinkat", args[1]),
            libc::SYS_mkdirat => by_path("mkdirat", args[1]),
            _ => self.older_change(thread, call, args),
        }
    }

    /// Calls that newer machines do not have.
    #[cfg(target_arch = "x86_64")]
    fn older_change(&self, thread: Pid, call: i64, args: &[u64; 6]) -> Option<&'static str> {
        let name = match call {
            libc::SYS_link => "link",
            libc::SYS_rename => "rename",
            libc::SYS_unlink => "unlink",
            libc::SYS_mkdir => "mkdir",
            libc::SYS_rmdir => "rmdir",
            _ => return None,
        };
        self.is_ours_by_path(thread, args[0]).then_some(name)
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn older_change(&self, _: Pid, _: i64, _: &[u64; 6]) -> Option<&'static str> {
        None
    }

    fn is_ours(&self, thread: Pid, descriptor: u64) -> bool {
        std::fs::read_link(format!("/proc/{thread}/fd/{descriptor}"))
            .is_ok_and(|path| path.starts_with(self.root))
    }

    fn is_ours_by_path(&self, thread: Pid, address: u64) -> bool {
        read_path(thread, address).is_some_and(|path| path.starts_with(self.root))
    }
}

fn is_end(status: WaitStatus, main: Pid) -> bool {
    matches!(status, WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) if pid == main)
}

/// The path at an address of a stopped thread.
fn read_path(thread: Pid, address: u64) -> Option<PathBuf> {
    let memory = File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut path = Vec::new();
    let mut piece = [0; 256];
    while path.len() < MAX_PATH_BYTES {
        // Short at the end of what is mapped.
        let read = memory.read_at(&mut piece, address + path.len() as u64).ok()?;
        let end = piece[..read].iter().position(|byte| *byte == 0);
        path.extend_from_slice(&piece[..end.unwrap_or(read)]);
        if end.is_some() || read == 0 {
            return Some(String::from_utf8(path).ok()?.into());
        }
    }
    None
}
