//! Waiting for many descriptors at once, and being woken by another thread.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec};

/// Descriptors taken from the kernel at once.
const EVENTS_AT_ONCE: usize = 64;
/// A wait that fails is not tried again at once: the loop around it must not spin.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(1);
/// Key of the wake-up itself; nobody else may use it.
const WAKE: u64 = u64::MAX;

/// An epoll set with a wake-up. Keys are the caller's; descriptors are reused, so keys should not be.
pub(crate) struct Poller {
    epoll: OwnedFd,
    wake: OwnedFd,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN)?;
        Ok(Self { epoll, wake })
    }

    /// Reports `key` whenever `fd` is readable.
    pub(crate) fn watch(&self, fd: impl AsFd, key: u64) -> io::Result<()> {
        epoll::add(&self.epoll, fd, EventData::new_u64(key), EventFlags::IN)?;
        Ok(())
    }

    /// Reports nothing of `fd` any more; one that is not watched is no error.
    pub(crate) fn forget(&self, fd: impl AsFd) {
        epoll::delete(&self.epoll, fd).unwrap_or_default();
    }

    /// Ends a wait, or the next one.
    pub(crate) fn wake_up(&self) {
        // Only a full counter refuses, and then the thread is awake anyway.
        let _full = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Keys of what is ready, with how; empty after `timeout` or a wake-up.
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> Vec<(u64, EventFlags)> {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut events = Vec::with_capacity(EVENTS_AT_ONCE);
        let space = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.epoll, space, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!("cannot wait for events: {error}");
                std::thread::sleep(PAUSE_AFTER_FAILURE);
            }
        }
        let mut ready = Vec::with_capacity(events.len());
        for event in events {
            match event.data.u64() {
                WAKE => {
                    // The counter only wakes; what it is about is the caller's to find.
                    let _empty = rustix::io::read(&self.wake, &mut [0; 8]);
                }
                key => ready.push((key, event.flags)),
            }
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_is_ready_is_reported_by_key_and_a_wake_up_ends_one_wait() {
        let poller = Poller::new().expect("poller");
        let (mut writer, reader) = UnixStream::pair().expect("pair");
        poller.watch(&reader, 7).expect("watched");
        poller.wake_up();
        assert!(poller.wait(None).is_empty(), "woken, with nothing ready");
        assert!(poller.wait(Some(Duration::from_millis(1))).is_empty(), "the wake-up is used up");
        writer.write_all(b"x").expect("written");
        let keys: Vec<u64> = poller.wait(None).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, vec![7]);
        poller.forget(&reader);
        assert!(poller.wait(Some(Duration::from_millis(1))).is_empty());
        poller.forget(&reader);
    }
}
