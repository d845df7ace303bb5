//! How long a thread's turns on a processor are: the one wrapper of `sched_setattr`.
//!
//! Since Linux 6.12 a thread that wakes up takes the processor at once from one with longer turns, if it has
//! not had more than its share; from one with turns as long as its own only when that has had its turn,
//! which a timer of 4 ms decides. Before 6.12 the length of turns is ignored.
#![expect(unsafe_code, reason = "the C library has no function for sched_setattr")]

use std::io;

use rustix::process::nice;

/// The longest that the kernel takes.
const LONG_NS: u64 = 100_000_000;
/// The shortest.
const SHORT_NS: u64 = 100_000;

/// `struct sched_attr` in its first version, of `include/uapi/linux/sched/types.h`.
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// This thread works long, ahead of need: its nice value is `lower` higher, and whoever wakes up pushes it off
/// the processor. Not `SCHED_BATCH`: a start waits for it to begin
/// (`docs/decisions/0008-prefetch-beside-others.md`).
pub(crate) fn give_way(lower: i32) -> io::Result<()> {
    let nice = nice(lower)?;
    set(nice, LONG_NS)
}

/// This thread works briefly, and others wait for it: it is not to wait for whoever has a longer turn. Its
/// share of the processors stays what it is.
pub fn take_short_turns() -> io::Result<()> {
    let nice = nice(0)?;
    set(nice, SHORT_NS)
}

fn set(nice: i32, turn_ns: u64) -> io::Result<()> {
    let attributes = Attributes {
        size: u32::try_from(size_of::<Attributes>()).unwrap_or_default(),
        policy: u32::try_from(libc::SCHED_OTHER).unwrap_or_default(),
        flags: 0,
        nice,
        priority: 0,
        runtime_ns: turn_ns,
        deadline_ns: 0,
        period_ns: 0,
    };
    let (this_thread, flags) = (0, 0);
    // SAFETY: the kernel reads `size` bytes of `attributes`, which lives until it returns, and writes nothing
    // but this thread's own scheduling.
    let done = unsafe {
        libc::syscall(libc::SYS_sched_setattr, this_thread, &raw const attributes, flags)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_way_alone_and_another_keeps_its_share() {
        let thread = std::thread::spawn(|| {
            take_short_turns().expect("needs no privilege");
            give_way(3).expect("needs no privilege");
            nice(0).expect("asked")
        });
        let before = nice(0).expect("asked");
        assert_eq!(thread.join().expect("does not panic"), (before + 3).min(19));
        assert_eq!(nice(0).expect("asked"), before);
    }
}
