//! The command line of `reapd`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::prepared::PrepareMode;
use crate::output::{EXIT_CODES, parse_size};

/// Serves microVM snapshots on a worker node: by a mount and by userfaultfd.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct Arguments {
    /// Print JSON for scripts instead of lines for people
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Mount the store and serve it, in the foreground, until SIGTERM or SIGINT
    Run(Box<Run>),
    /// Prepare a snapshot on the running daemon; prints its paths
    Prepare {
        /// Where the daemon runs
        #[command(flatten)]
        daemon: RunDir,
        /// Name of the snapshot
        name: String,
        /// auto: record a working set if there is none, else prefetch it and go on learning; record: record a
        /// new one in its place; prefetch: there must be one, and it is used as it is; demand: neither
        #[arg(long, value_enum, default_value_t = PrepareMode::Auto)]
        mode: PrepareMode,
        /// Which use of the snapshot this is, when it has several that touch other pages. Each has its own
        /// socket (NAME,PROFILE.sock) and its own working set
        #[arg(long, default_value = "", hide_default_value = true)]
        profile: String,
        /// Bring all of it into this node's cache before this returns, and keep it there while it is
        /// prepared: no restore and no reader waits for the store then
        #[arg(long)]
        warm: bool,
        /// Write its memory once more to this node's disk, as it is, before this returns, for VMMs that read
        /// all of their memory file at each start: the kernel then reads that copy in place of the mount. It is
        /// verified when it is written, and gone when the snapshot is released or the daemon ends
        #[arg(long)]
        plain_copy: bool,
    },
    /// Show what the running daemon has prepared and what it restores
    Status {
        /// Where the daemon runs
        #[command(flatten)]
        daemon: RunDir,
        /// Show what this restore did when; with --json for 'reap-pack ws show --timeline'
        #[arg(long, value_name = "RESTORE")]
        timeline: Option<u64>,
    },
    /// Print what the running daemon has counted, as Prometheus reads it
    Metrics {
        /// Where the daemon runs
        #[command(flatten)]
        daemon: RunDir,
    },
    /// Stop accepting VMs for a snapshot; VMs that run go on
    Release {
        /// Where the daemon runs
        #[command(flatten)]
        daemon: RunDir,
        /// Name of the snapshot
        name: String,
        /// The profile that it was prepared with
        #[arg(long, default_value = "", hide_default_value = true)]
        profile: String,
    },
}

/// Where a running daemon is found.
#[derive(Args, Debug)]
pub struct RunDir {
    /// The directory given to `reapd run`
    #[arg(long, env = "REAP_RUN_DIR", default_value = "/run/reap")]
    pub run_dir: PathBuf,
}

/// Arguments of `run`.
#[derive(Args, Debug)]
pub struct Run {
    /// The store: file:///path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix
    #[arg(long, env = "REAP_STORE")]
    pub store: String,
    /// Directory of this node's cache and identity; it may be emptied while reapd does not run
    #[arg(long, value_name = "DIR")]
    pub cache: PathBuf,
    /// Most bytes of frames of a remote store kept on disk. A local store is read in place
    #[arg(long, value_name = "SIZE", default_value = "20GiB", value_parser = parse_size)]
    pub cache_size: u64,
    /// Bytes that the cache and plain copies leave free on their file system, so that they never fill a disk
    /// that others use
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub cache_free_floor: u64,
    /// Most bytes of plain copies of memory (`reapd prepare --plain-copy`), which lie on the cache's disk
    #[arg(long, value_name = "SIZE", default_value = "20GiB", value_parser = parse_size)]
    pub plain_copies: u64,
    /// Most bytes of decoded frames kept in memory: the working sets of the snapshots in use
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = parse_size)]
    pub memory_cache: u64,
    /// Most bytes in flight of all prefetching: stored bytes asked for, and decoded ones until they are
    /// installed. A restore has half of it, two a third each, and so on. At least 8 MiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = parse_size)]
    pub prefetch_budget: u64,
    /// Where to mount; an empty directory, made if it is not there
    #[arg(long, value_name = "DIR")]
    pub mount: PathBuf,
    /// Directory of the sockets and of `ready`, made if it is not there
    #[arg(long, value_name = "DIR", env = "REAP_RUN_DIR", default_value = "/run/reap")]
    pub run_dir: PathBuf,
    /// Serve the metrics for Prometheus here too, at /metrics, by HTTP; nothing else is served there. They
    /// tell how many VMs start and how fast, and nothing of what is in them. Default: only on the API's socket
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub metrics: Option<std::net::SocketAddr>,
    /// Prepare this snapshot before `ready` appears; may be given several times
    #[arg(long, value_name = "NAME")]
    pub prepare: Vec<String>,
    /// Permissions of the userfaultfd sockets, octal. A jailed VMM needs to reach its socket
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = parse_mode)]
    pub socket_mode: u32,
    /// Owner of the userfaultfd sockets, and the only user besides root whose VMMs are served
    #[arg(long, value_name = "UID")]
    pub socket_uid: Option<u32>,
    /// A fault that cannot be served for this long ends its VM: a guest that hangs or reads wrong
    /// memory is worse than a dead one
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub fault_deadline: u64,
    /// A recording is published when no new page was touched for this long
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    pub settle: u64,
    /// Most bytes of the pages of one working set; what is touched most often stays. 512 MiB install in a
    /// quarter of a second, and no function that was measured touches a fifth of that at its start
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = parse_size)]
    pub working_set_size: u64,
    /// After SIGTERM, VMs get the rest of their memory so that they can go on alone; one that has not
    /// got it after this long is ended
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub stop_deadline: u64,
    /// Refuse to open files for writing, as a read-only file system does. QEMU before 8.2 opens
    /// memory files so, which is why the default lets the open pass and refuses the writes
    #[arg(long)]
    pub refuse_write_open: bool,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).map_err(|_| "write octal digits, such as 0600")?;
    if mode & !0o770 != 0 {
        return Err(
            "a socket that everybody may write to would hand guest memory to anybody".into()
        );
    }
    Ok(mode)
}
