//! A body on its way through: counted, paced, cut or changed.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};

/// The proxy ended a connection: because it was told to, or because the other side did.
#[derive(Debug)]
pub(super) struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the connection ends here")
    }
}

impl std::error::Error for Broken {}

/// Any body.
pub(super) type AnyBody = http_body_util::combinators::UnsyncBoxBody<Bytes, Broken>;

/// A body that is there already.
pub(super) fn whole(bytes: Bytes) -> AnyBody {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// Paced bytes go on in pieces of this size: 0.7 ms at 90 MB/s.
const PIECE_BYTES: usize = 64 << 10;
/// Timers fire up to a millisecond late; what that costs is made up for.
const SLACK: Duration = Duration::from_millis(2);

/// One direction of a connection: when it is free for the next bytes.
pub(super) struct Lane {
    free_at: Mutex<Instant>,
}

impl Lane {
    pub(super) fn new() -> Self {
        Self { free_at: Mutex::new(Instant::now()) }
    }

    /// Takes the lane for so many bytes; answers when they have passed.
    fn take(&self, bytes: usize, bytes_per_second: u64) -> Instant {
        let now = Instant::now();
        let lasts = Duration::from_secs_f64(bytes as f64 / bytes_per_second.max(1) as f64);
        let mut free_at = self.free_at.lock();
        *free_at = (*free_at).max(now.checked_sub(SLACK).unwrap_or(now)) + lasts;
        *free_at
    }
}

/// Told of each piece of a body that goes on, and of the end.
pub(super) type Watch = Box<dyn FnMut(Option<&Bytes>) + Send>;

/// What happens to a body.
pub(super) struct Treatment {
    pub(super) lane: Arc<Lane>,
    pub(super) bytes_per_second: Option<u64>,
    /// It ends, and the connection with it, at this byte.
    pub(super) cut_at: Option<u64>,
    /// This byte has a wrong bit.
    pub(super) flip_at: Option<u64>,
    /// Called with each piece that goes on, and with `None` at the end, however it comes.
    pub(super) watch: Watch,
}

/// A body that is treated.
pub(super) struct Treated<B> {
    inner: B,
    treatment: Treatment,
    passed: u64,
    is_cut: bool,
    waiting: VecDeque<Bytes>,
    until: Option<Pin<Box<Sleep>>>,
}

impl<B> Treated<B> {
    pub(super) fn new(inner: B, treatment: Treatment) -> Self {
        Self { inner, treatment, passed: 0, is_cut: false, waiting: VecDeque::new(), until: None }
    }

    /// The next piece goes on, as it is to be.
    fn pass(&mut self, mut piece: Bytes) -> Frame<Bytes> {
        let end = self.passed + piece.len() as u64;
        let within = |at: Option<u64>| at.filter(|at| (self.passed..end).contains(at));
        let place = |at: u64| usize::try_from(at - self.passed).unwrap_or(usize::MAX);
        if let Some(at) = within(self.treatment.flip_at) {
            let mut changed = piece.to_vec();
            changed[place(at)] ^= 0x10;
            piece = changed.into();
        }
        if let Some(at) = within(self.treatment.cut_at) {
            // What is before the cut goes on, and nothing after it.
            piece.truncate(place(at));
            self.is_cut = true;
        }
        self.passed = end;
        (self.treatment.watch)(Some(&piece));
        Frame::data(piece)
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Treated<B> {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if self.is_cut {
            return Poll::Ready(Some(Err(Broken)));
        }
        loop {
            if let Some(until) = &mut self.until {
                ready!(until.as_mut().poll(context));
                self.until = None;
                if let Some(piece) = self.waiting.pop_front() {
                    return Poll::Ready(Some(Ok(self.pass(piece))));
                }
            }
            if self.waiting.is_empty() {
                let Some(frame) = ready!(Pin::new(&mut self.inner).poll_frame(context)) else {
                    return Poll::Ready(None);
                };
                let data = match frame.map(Frame::into_data) {
                    Ok(Ok(data)) => data,
                    Ok(Err(trailers)) => return Poll::Ready(Some(Ok(trailers))),
                    Err(_) => return Poll::Ready(Some(Err(Broken))),
                };
                if self.treatment.bytes_per_second.is_none() {
                    return Poll::Ready(Some(Ok(self.pass(data))));
                }
                self.split(data);
            }
            let (Some(first), Some(rate)) = (self.waiting.front(), self.treatment.bytes_per_second)
            else {
                continue;
            };
            let due = self.treatment.lane.take(first.len(), rate);
            self.until = Some(Box::pin(tokio::time::sleep_until(due)));
        }
    }

    fn is_end_stream(&self) -> bool {
        !self.is_cut && self.waiting.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<B> Treated<B> {
    fn split(&mut self, mut data: Bytes) {
        while data.len() > PIECE_BYTES {
            self.waiting.push_back(data.split_to(PIECE_BYTES));
        }
        self.waiting.push_back(data);
    }
}

impl<B> Drop for Treated<B> {
    fn drop(&mut self) {
        (self.treatment.watch)(None);
    }
}
