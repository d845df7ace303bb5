//! The accept thread: sockets, and handshakes in progress. It serves no faults, so a client that
//! stalls in its handshake stalls nobody else.

use std::collections::HashMap;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::handshake::{HandshakeError, Message};
use crate::layout::Layout;
use crate::persist::persist;
use crate::poller::Poller;

/// A handshake that takes longer is refused.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(2);
/// Handshakes in progress at once. One more ends the oldest: a VMM is done within milliseconds, so who stalls
/// must not keep others out.
const MAX_HANDSHAKES: usize = 256;
/// Bytes of a message that are taken at once.
const CHUNK_BYTES: usize = 4096;
/// How often deadlines are looked at while a handshake is in progress.
const TICK: Duration = Duration::from_millis(100);

/// What came of a complete handshake.
pub(crate) struct Arrival {
    pub(crate) layout: Layout,
    pub(crate) uffd: OwnedFd,
    pub(crate) socket: UnixStream,
}

/// Takes over a VM; a refusal closes everything that came with it.
pub(crate) type OnArrival = Box<dyn Fn(Arrival) -> Result<(), HandshakeError> + Send + Sync>;

/// A socket that is listened on.
pub(crate) struct Bound {
    pub(crate) listener: UnixListener,
    /// Length of the memory file.
    pub(crate) memory_bytes: u64,
    pub(crate) on_arrival: OnArrival,
    /// For logs.
    pub(crate) name: String,
}

struct Handshake {
    bound: Arc<Bound>,
    socket: UnixStream,
    message: Message,
    fds: Vec<OwnedFd>,
    began: Instant,
}

pub(crate) struct Acceptor {
    poller: Poller,
    listeners: Mutex<HashMap<u64, Arc<Bound>>>,
    next: Mutex<u64>,
    stopping: AtomicBool,
}

impl Acceptor {
    pub(crate) fn new() -> std::io::Result<Self> {
        let poller = Poller::new()?;
        let (listeners, next) = (Mutex::default(), Mutex::new(0));
        Ok(Self { poller, listeners, next, stopping: AtomicBool::new(false) })
    }

    /// Listens; answers with what [`Acceptor::remove`] wants.
    pub(crate) fn add(&self, bound: Bound) -> std::io::Result<u64> {
        bound.listener.set_nonblocking(true)?;
        let key = self.next_key();
        let bound = Arc::new(bound);
        self.listeners.lock().insert(key, bound.clone());
        self.poller.watch(&bound.listener, key)?;
        Ok(key)
    }

    /// Stops listening.
    pub(crate) fn remove(&self, key: u64) {
        if let Some(bound) = self.listeners.lock().remove(&key) {
            self.poller.forget(&bound.listener);
        }
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.poller.wake_up();
    }

    fn next_key(&self) -> u64 {
        let mut next = self.next.lock();
        *next += 1;
        *next
    }

    /// The accept thread.
    pub(crate) fn run(&self) {
        // A panic ends the handshakes in progress: their sockets are closed.
        persist("accept", || self.serve(), || {});
    }

    fn serve(&self) {
        let mut handshakes: HashMap<u64, Handshake> = HashMap::new();
        while !self.stopping.load(Ordering::Acquire) {
            for (key, _) in self.poller.wait((!handshakes.is_empty()).then_some(TICK)) {
                let listener = self.listeners.lock().get(&key).cloned();
                if let Some(bound) = listener {
                    if handshakes.len() >= MAX_HANDSHAKES {
                        end_oldest(&mut handshakes);
                    }
                    self.accept(&bound, &mut handshakes);
                } else if let Some(handshake) = handshakes.remove(&key)
                    && let Some(unfinished) = advance(handshake)
                {
                    handshakes.insert(key, unfinished);
                }
            }
            handshakes.retain(|_, handshake| {
                let late = handshake.began.elapsed() > HANDSHAKE_DEADLINE;
                if late {
                    refuse(&handshake.bound, &HandshakeError::Late(HANDSHAKE_DEADLINE.as_secs()));
                }
                !late
            });
        }
    }

    fn accept(&self, bound: &Arc<Bound>, handshakes: &mut HashMap<u64, Handshake>) {
        let socket = match bound.listener.accept() {
            Ok((socket, _)) => socket,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::error!("{}: cannot accept: {error}", bound.name);
                // Out of descriptors, most likely: not a reason to spin.
                std::thread::sleep(TICK);
                return;
            }
        };
        let key = self.next_key();
        let ready = socket.set_nonblocking(true).and_then(|()| self.poller.watch(&socket, key));
        if let Err(error) = ready {
            refuse(bound, &HandshakeError::Socket(error.to_string()));
            return;
        }
        let message = Message::new(bound.memory_bytes);
        let (fds, began) = (Vec::new(), Instant::now());
        handshakes.insert(key, Handshake { bound: bound.clone(), socket, message, fds, began });
    }
}

fn end_oldest(handshakes: &mut HashMap<u64, Handshake>) {
    // Keys are given out in order.
    let oldest = handshakes.keys().min().copied();
    if let Some(handshake) = oldest.and_then(|key| handshakes.remove(&key)) {
        let text = format!("more than {MAX_HANDSHAKES} are in progress, and this is the oldest");
        refuse(&handshake.bound, &HandshakeError::Rule(text));
    }
}

fn refuse(bound: &Bound, error: &HandshakeError) {
    tracing::warn!("{}: {error}", bound.name);
}

/// Takes what has arrived; the handshake again if it is not complete. Closing the socket takes it
/// off the epoll set.
fn advance(mut handshake: Handshake) -> Option<Handshake> {
    match receive(&mut handshake) {
        Ok(None) => Some(handshake),
        Ok(Some(layout)) => {
            let Handshake { bound, socket, mut fds, .. } = handshake;
            let uffd = fds.pop()?;
            if let Err(error) = (bound.on_arrival)(Arrival { layout, uffd, socket }) {
                refuse(&bound, &error);
            }
            None
        }
        Err(error) => {
            refuse(&handshake.bound, &error);
            None
        }
    }
}

/// Reads what is there; the layout once message and descriptor are complete.
fn receive(handshake: &mut Handshake) -> Result<Option<Layout>, HandshakeError> {
    let rule = |text: &str| HandshakeError::Rule(text.into());
    loop {
        let mut chunk = [0; CHUNK_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(
            &handshake.socket,
            &mut [IoSliceMut::new(&mut chunk)],
            &mut control,
            flags,
        );
        let count = match received {
            Ok(message) => message.bytes,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(HandshakeError::Socket(error.to_string())),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                handshake.fds.extend(fds);
            }
        }
        if handshake.fds.len() > 1 {
            return Err(rule("there is more than one descriptor"));
        }
        if count == 0 {
            return Err(rule("the connection was closed before the message was complete"));
        }
        handshake.message.push(&chunk[..count])?;
        if let Some(layout) = handshake.message.layout()
            && let Some(fd) = handshake.fds.first()
        {
            check_is_userfaultfd(fd)?;
            return Ok(Some(layout.clone()));
        }
    }
}

fn check_is_userfaultfd(fd: &OwnedFd) -> Result<(), HandshakeError> {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let target =
        std::fs::read_link(link).map_err(|error| HandshakeError::Socket(error.to_string()))?;
    if target.as_os_str() == "anon_inode:[userfaultfd]" {
        return Ok(());
    }
    Err(HandshakeError::Rule(format!("the descriptor is {}, not a userfaultfd", target.display())))
}
