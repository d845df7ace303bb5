//! Runs a fleet of real processes on the S3 server that the environment names: `make fleet`.

use anyhow::{Context, Result};
use clap::Parser;
use reap_tests::fleet::{Options, run};
use reap_tests::proxy::server_in;

/// A fleet on one bucket, with faults on the way and processes that are killed and stopped.
///
/// AWS_ENDPOINT_URL and the keys name a server on loopback.
#[derive(Debug, Parser)]
struct Arguments {
    /// Where the store is to be; nothing may be there
    #[arg(long, default_value = "s3://snapshots/fleet")]
    store: String,
    #[arg(long, default_value_t = 100)]
    rounds: u32,
    /// Decides what chance would, as far as it is not the processes' own
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let endpoint = std::env::var("AWS_ENDPOINT_URL").context("AWS_ENDPOINT_URL")?;
    let directory = tempfile::tempdir()?;
    let options = Options {
        url: arguments.store,
        server: server_in([("AWS_ENDPOINT_URL", endpoint)])?,
        rounds: arguments.rounds,
        seed: arguments.seed,
        directory: directory.path().to_owned(),
    };
    let events = run(&options)?;
    for (said, count) in events.failures() {
        println!("{count} times: {said}");
    }
    println!("{} rounds, nothing lost: {events}", options.rounds);
    Ok(())
}
