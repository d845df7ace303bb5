//! One start: maps memory, touches the pages of a trace in order, checks them.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};

use super::Trace;
use super::memory::{Faults, Mapping, PAGE};

/// Touches that take longer than this had to wait for a page.
const WAITED: Duration = Duration::from_micros(2);

/// Where the pages come from.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Way {
    /// A private mapping of a file
    File {
        /// The file
        path: PathBuf,
    },
    /// A handler that speaks Firecracker's protocol
    Socket {
        /// Its socket
        path: PathBuf,
    },
    /// The same for a snapshot that `reapd` is asked to prepare first; that counts
    Prepare {
        /// The daemon's API socket
        api: PathBuf,
        /// The snapshot's name
        name: String,
    },
    /// A one-thread handler in this process that copies page by page from the mapped memory file
    Demand,
    /// As REAP was published: the raw working-set file in one read, one copy a run, then as `demand`
    Reap {
        /// The working-set file: the pages of the trace's runs, by address
        working_set: PathBuf,
        /// Through the page cache instead of O_DIRECT
        #[arg(long)]
        cached: bool,
    },
}

/// What a start took.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Touched {
    /// From before the mapping was made (and the snapshot prepared, where that is part of it) until the last
    /// page of the trace was touched, microseconds.
    pub all_us: f64,
    /// Touches that waited.
    pub waits: u64,
    /// Their median, microseconds.
    pub wait_p50_us: f64,
    /// Their 99th percentile, microseconds.
    pub wait_p99_us: f64,
}

/// Runs one start; one that is held touches nothing before standard input ends. An error if a page was not what the memory
/// file holds.
pub fn touch(memory_file: &Path, trace: &Trace, way: &Way, held: bool) -> Result<Touched> {
    let bytes = usize::try_from(std::fs::metadata(memory_file)?.len())?;
    ensure!(bytes.is_multiple_of(PAGE), "{}: not whole pages", memory_file.display());
    let began = Instant::now();
    let (memory, handler) = match way {
        Way::File { path } => (Arc::new(Mapping::file(&open(path)?, bytes)?), None),
        Way::Socket { path } => connect(path, bytes)?,
        Way::Prepare { api, name } => connect(&prepare(api, name)?, bytes)?,
        Way::Demand => demand(memory_file, bytes)?,
        Way::Reap { working_set, cached } => reap(memory_file, bytes, trace, working_set, *cached)?,
    };
    if held {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    }
    let mut waits = Vec::new();
    let mut last = Instant::now();
    for page in trace.pages() {
        memory.touch(*page);
        let now = Instant::now();
        if now - last > WAITED {
            waits.push(now - last);
        }
        last = now;
    }
    let all_us = began.elapsed().as_secs_f64() * 1e6;
    check(memory_file, trace, &memory)?;
    drop(handler);
    waits.sort_unstable();
    let at = |per_cent: usize| {
        let index = (waits.len() * per_cent / 100).min(waits.len().saturating_sub(1));
        waits.get(index).map_or(0.0, |wait| wait.as_secs_f64() * 1e6)
    };
    Ok(Touched { all_us, waits: waits.len() as u64, wait_p50_us: at(50), wait_p99_us: at(99) })
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

fn check(memory_file: &Path, trace: &Trace, memory: &Mapping) -> Result<()> {
    let file = open(memory_file)?;
    let mut expected = vec![0; PAGE];
    for page in trace.pages() {
        file.read_exact_at(&mut expected, page * PAGE as u64)?;
        ensure!(memory.page(*page) == expected, "page {page} of guest memory is wrong");
    }
    Ok(())
}

/// What serves the memory; ends with it.
enum Handler {
    /// A handler elsewhere knows by the socket's end that the VM is gone.
    Elsewhere {
        _socket: UnixStream,
        _faults: Faults,
    },
    Thread {
        thread: Option<std::thread::JoinHandle<Result<()>>>,
        stop: std::io::PipeWriter,
    },
}

impl Drop for Handler {
    fn drop(&mut self) {
        if let Self::Thread { thread, stop } = self {
            let stopped = stop.write_all(b".");
            if let Some(Err(_) | Ok(Err(_))) = thread.take().map(|thread| thread.join())
                && stopped.is_ok()
            {
                eprintln!("reap-bench: the handler thread failed");
            }
        }
    }
}

type Served = (Arc<Mapping>, Option<Handler>);

/// Has a snapshot prepared; answers with the socket at which its memory is served.
fn prepare(api: &Path, name: &str) -> Result<PathBuf> {
    let mut stream =
        UnixStream::connect(api).with_context(|| format!("no daemon at {}", api.display()))?;
    let body = r#"{"mode":"prefetch"}"#;
    let head = format!("PUT /snapshots/{name} HTTP/1.1\r\nHost: reapd\r\nConnection: close\r\n");
    let request = format!("{head}Content-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    ensure!(head.starts_with("HTTP/1.1 200"), "{name} is not prepared: {body}");
    let prepared: serde_json::Value = serde_json::from_str(body)?;
    Ok(prepared["uffd"].as_str().context("a socket")?.into())
}

fn connect(path: &Path, bytes: usize) -> Result<Served> {
    let memory = Mapping::anonymous(bytes)?;
    let faults = Faults::of(&memory)?;
    let region = serde_json::json!([{
        "base_host_virt_addr": memory.address(0), "size": bytes, "offset": 0,
        "page_size": PAGE, "page_size_kib": PAGE,
    }]);
    let socket =
        UnixStream::connect(path).with_context(|| format!("no handler at {}", path.display()))?;
    let given = faults.duplicate()?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [given.as_fd()];
    ensure!(control.push(SendAncillaryMessage::ScmRights(&fds)), "no room for the descriptor");
    let message = region.to_string();
    let parts = [IoSlice::new(message.as_bytes())];
    let sent = rustix::net::sendmsg(&socket, &parts, &mut control, SendFlags::NOSIGNAL)?;
    ensure!(sent == message.len(), "the handshake was cut short");
    Ok((Arc::new(memory), Some(Handler::Elsewhere { _socket: socket, _faults: faults })))
}

fn demand(memory_file: &Path, bytes: usize) -> Result<Served> {
    let memory = Arc::new(Mapping::anonymous(bytes)?);
    let faults = Faults::of(&memory)?;
    serve(memory_file, bytes, memory, faults)
}

fn serve(memory_file: &Path, bytes: usize, memory: Arc<Mapping>, faults: Faults) -> Result<Served> {
    let source = Mapping::file(&open(memory_file)?, bytes)?;
    let (reader, writer) = std::io::pipe()?;
    let stop = File::from(std::os::fd::OwnedFd::from(reader));
    let into = memory.clone();
    let thread = std::thread::spawn(move || faults.serve(&into, &source, &stop));
    Ok((memory, Some(Handler::Thread { thread: Some(thread), stop: writer })))
}

fn reap(
    memory_file: &Path,
    bytes: usize,
    trace: &Trace,
    working_set: &Path,
    cached: bool,
) -> Result<Served> {
    let memory = Arc::new(Mapping::anonymous(bytes)?);
    let faults = Faults::of(&memory)?;
    let direct = if cached { 0 } else { rustix::fs::OFlags::DIRECT.bits() as i32 };
    let mut file = File::options().read(true).custom_flags(direct).open(working_set)?;
    let mut buffer = Mapping::anonymous(trace.pages().len() * PAGE)?;
    file.read_exact(buffer.bytes_mut())?;
    let mut at = 0;
    for (first, count) in trace.runs() {
        faults.install(&memory, first, buffer.pages(at, count))?;
        at += count;
    }
    serve(memory_file, bytes, memory, faults)
}

/// Writes the file that [`Way::Reap`] reads.
pub fn write_reap_file(memory_file: &Path, trace: &Trace, working_set: &Path) -> Result<()> {
    let memory = open(memory_file)?;
    let mut out = std::io::BufWriter::new(File::create(working_set)?);
    let mut page_bytes = vec![0; PAGE];
    for (first, count) in trace.runs() {
        for page in first..first + count {
            memory.read_exact_at(&mut page_bytes, page * PAGE as u64)?;
            out.write_all(&page_bytes)?;
        }
    }
    Ok(out.into_inner()?.sync_all()?)
}
