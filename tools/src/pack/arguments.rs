//! The command line of `reap-pack`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use reap_store::verify::Share;

use super::verify::{LevelArgument, parse_share};
use crate::output::{EXIT_CODES, parse_size};

/// Packs microVM snapshots into a content-addressed, deduplicated store.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct Arguments {
    /// The store: file:///path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.
    /// Credentials and endpoints come from the providers' own environment variables
    #[arg(long, env = "REAP_STORE", global = true, default_value = "", hide_default_value = true)]
    pub store: String,
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
    /// Make a new, empty store
    Init,
    /// Pack a paused VM's files as a new snapshot
    Pack(Pack),
    /// List the snapshots by name
    Ls {
        /// Show all snapshots, each under the one whose packs it refers to
        #[arg(long)]
        tree: bool,
    },
    /// Show what a snapshot is: sizes, ratios, pages, working sets
    Show {
        /// Name or id
        snapshot: String,
    },
    /// Write a snapshot's files back, bit for bit and sparse
    Export {
        /// Name or id
        snapshot: String,
        /// Where to; made if it is not there, files in it are never overwritten
        directory: PathBuf,
    },
    /// Check what a snapshot consists of, as deeply as is asked for. Changes nothing; a missing object of
    /// a snapshot halts collection
    Verify(Verify),
    /// Bring back what is missing or damaged, from another store or from nodes' caches. Reads every pack;
    /// halts collection before it changes anything, and leaves it so
    Repair {
        /// Name or id
        #[arg(required_unless_present = "all")]
        snapshot: Option<String>,
        /// All snapshots of the store
        #[arg(long)]
        all: bool,
        /// A store with the same objects (a replica) or the same pages (a copy)
        #[arg(long, value_name = "URL")]
        from: Option<String>,
        /// The --cache directory of a reapd that does not run; may be given several times
        #[arg(long = "cache", value_name = "DIR")]
        caches: Vec<PathBuf>,
        /// Only show what is wrong and what can be brought back
        #[arg(long)]
        dry_run: bool,
    },
    /// Delete what no snapshot needs: removed snapshots, and what dead packers left. Safe beside packers,
    /// readers and other collectors
    Gc {
        /// Only show what would go, and why
        #[arg(long)]
        dry_run: bool,
        /// Also when over 30 % of the bytes would go, or over half of the snapshots are gone
        #[arg(long)]
        yes: bool,
        /// A packer that did not renew its lease for so long is gone; it renews it every 30 s. One that is
        /// not gone fails its pack, and loses nothing else
        #[arg(long, value_name = "SECONDS", default_value_t = reap_store::collect::LEASE_TIMEOUT.as_secs())]
        lease_timeout: u64,
    },
    /// Look at working sets
    #[command(subcommand)]
    Ws(WorkingSets),
    /// Give a snapshot one more name, or move a name to it
    Tag {
        /// Name or id
        snapshot: String,
        /// The new name
        name: String,
    },
    /// Say what the store holds: raw, unique, stored and garbage bytes, per snapshot and in all
    Stats,
    /// Copy a snapshot to another store; pages that relatives of it have there are not sent again
    Copy {
        /// Name or id
        snapshot: String,
        /// The other store's URL
        #[arg(long, value_name = "URL")]
        to: String,
        /// Its name there; the name it was packed under if not given
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        index: IndexDirectory,
    },
    /// Rewrite snapshots whose packs are mostly dead, so that collection can free them
    Repack {
        /// Name or id
        #[arg(required_unless_present = "all")]
        snapshot: Option<String>,
        /// All snapshots of the store
        #[arg(long)]
        all: bool,
        /// A pack is mostly dead when less than this share of it is in use, in percent
        #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(1..=100))]
        threshold: u8,
        #[command(flatten)]
        index: IndexDirectory,
    },
    /// Remove a snapshot, for ever. VMs that run from it go on; collection frees the bytes
    Rm {
        /// Name or id
        snapshot: String,
        /// Although it has other names
        #[arg(long)]
        force: bool,
    },
}

/// Where this node remembers what packs hold.
#[derive(Args, Debug)]
pub struct IndexDirectory {
    /// Directory in which this node remembers what packs hold, so that it need not ask again; it may
    /// be deleted at any time. $XDG_CACHE_HOME/reap or ~/.cache/reap if not given
    #[arg(long = "index", env = "REAP_INDEX", value_name = "DIR")]
    directory: Option<PathBuf>,
}

impl IndexDirectory {
    /// The directory, if there is a place for one.
    pub fn path(&self) -> Option<PathBuf> {
        self.directory.clone().or_else(Self::usual)
    }

    /// The directory of commands that have no such option.
    pub fn usual() -> Option<PathBuf> {
        let set = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty());
        let cache = || set("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || set("HOME").map(|home| PathBuf::from(home).join(".cache"));
        let usual = || cache().or_else(home).map(|cache| cache.join("reap"));
        set("REAP_INDEX").map(PathBuf::from).or_else(usual)
    }
}

/// Arguments of `verify`.
#[derive(Args, Debug)]
pub struct Verify {
    /// Name or id
    #[arg(required_unless_present = "all")]
    pub snapshot: Option<String>,
    /// All snapshots of the store, names, and the records that belong to no snapshot
    #[arg(long)]
    pub all: bool,
    /// How deeply to look; each level includes those before it
    #[arg(long, value_enum, default_value_t = LevelArgument::Everything)]
    pub level: LevelArgument,
    /// How much --level sample reads: a share of the frames, or bytes
    #[arg(long, value_name = "PERCENT%|SIZE", default_value = "1%", value_parser = parse_share)]
    pub sample: Share,
    /// Pick the frames that this number picks, and not others each time
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
}

/// Arguments of `pack`.
#[derive(Args, Debug)]
pub struct Pack {
    /// Name of the snapshot, such as resnet:v3. A name that is taken moves to the new snapshot
    #[arg(long)]
    pub name: String,
    /// The VM's memory file, raw, as Firecracker writes it
    #[arg(long, value_name = "FILE")]
    pub memory: PathBuf,
    /// The VM's device state
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// A disk image; may be given several times
    #[arg(long = "disk", value_name = "NAME=FILE")]
    pub disks: Vec<String>,
    /// A label, for people and for choosing; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub labels: Vec<String>,
    /// Refer to the pages of this snapshot (name or id) instead of storing them again; may be given
    /// several times. If not given: the newest snapshots of the same name or `base` label
    #[arg(long = "parent", value_name = "SNAPSHOT")]
    pub parents: Vec<String>,
    /// Refer to no other snapshot's pages
    #[arg(long, conflicts_with = "parents")]
    pub no_parent: bool,
    /// The memory file is a diff snapshot over the (first) parent: a hole is the parent's page, zeros
    /// that are written are zero
    #[arg(long, requires = "parents")]
    pub diff: bool,
    #[command(flatten)]
    pub index: IndexDirectory,
    /// Leave what is packed for the cache of this node's reapd: the directory of its --cache. For remote
    /// stores
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// The VMM that wrote the snapshot, such as firecracker
    #[arg(long)]
    pub vmm: Option<String>,
    /// Its version, such as 1.12.0
    #[arg(long)]
    pub vmm_version: Option<String>,
    /// Size of a guest page at snapshot time, such as 4KiB or 2MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub guest_page_size: Option<u64>,
    /// The zstd level. 3 packs at the speed of a disk; 9 stores about a tenth less, packs several
    /// times slower and decodes faster
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub level: i32,
}

/// What to do with working sets.
#[derive(Debug, Subcommand)]
pub enum WorkingSets {
    /// List all working sets of a snapshot, newest first
    Ls {
        /// Name or id
        snapshot: String,
    },
    /// Show what a working set holds; with --html as a picture
    Show {
        #[command(flatten)]
        which: Which,
        /// Write one HTML file with a map of guest memory and, with --timeline, what a restore did
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
        /// What 'reapd --json status --timeline RESTORE' printed
        #[arg(long, value_name = "FILE", requires = "html")]
        timeline: Option<PathBuf>,
    },
    /// Take a snapshot's working set out of use: the next restore records a new one
    Rm {
        /// Name or id
        snapshot: String,
        /// The profile
        #[arg(long, default_value = "", hide_default_value = true)]
        profile: String,
    },
    /// Write the recorded pages of guest memory as text, a page number and its first touch in
    /// microseconds a line, in first-touch order
    Export {
        #[command(flatten)]
        which: Which,
        /// The file to write
        file: PathBuf,
    },
}

/// A working set.
#[derive(Args, Debug)]
pub struct Which {
    /// Name or id
    pub snapshot: String,
    /// The profile
    #[arg(long, default_value = "", hide_default_value = true)]
    pub profile: String,
    /// Which working set; else the one that a restore would use
    #[arg(long)]
    pub sequence: Option<u64>,
}
