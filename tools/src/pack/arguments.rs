//! The command line of `reap-pack`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

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
    Ls,
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
    /// Read, decode and check everything that a snapshot consists of
    Verify {
        /// Name or id
        #[arg(required_unless_present = "all")]
        snapshot: Option<String>,
        /// All snapshots of the store
        #[arg(long)]
        all: bool,
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
    /// Remove a snapshot, for ever. VMs that run from it go on; collection frees the bytes
    Rm {
        /// Name or id
        snapshot: String,
        /// Although it has other names
        #[arg(long)]
        force: bool,
    },
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
    /// Write the recorded pages of guest memory as text, a page number and its first touch in
    /// microseconds a line, in first-touch order
    Export {
        /// Name or id
        snapshot: String,
        /// The file to write
        file: PathBuf,
        /// Which working set; else the one that a restore would use
        #[arg(long)]
        sequence: Option<u64>,
    },
}
