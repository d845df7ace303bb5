//! The proxy of the tests as a program: between any client and an object store, or measuring itself.

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use reap_tests::proxy::{Delay, Plan, Proxy, Rates, Shape, overhead};

/// A proxy on loopback that makes an object store slow and unreliable.
///
/// Point a client at it with AWS_ENDPOINT_URL. It ends with SIGINT or SIGTERM; errors are given in per cent of
/// all requests.
#[derive(Debug, Parser)]
struct Arguments {
    /// The server, such as 127.0.0.1:7480
    #[arg(long, required_unless_present = "measure")]
    server: Option<SocketAddr>,
    /// Where to listen; a free port if it is 0
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The first byte of an answer comes so much later
    #[arg(long, value_name = "MS", default_value_t = 0)]
    first_byte_ms: u64,
    /// ... for half of the requests, and so much later at most for 99 %: log-normal
    #[arg(long, value_name = "MS")]
    first_byte_p99_ms: Option<u64>,
    /// Megabytes (10^6) a second of each connection, each way; S3 gives 90
    #[arg(long, value_name = "MB")]
    megabytes_per_second: Option<u64>,
    /// Fail before they take effect: 503, 500, reset
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    before_effect: f64,
    /// Fail after they took effect: answer lost, 500
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    after_effect: f64,
    /// Hang for 1 to 4 s
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    hang: f64,
    /// Bodies of objects that end early
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    truncated: f64,
    /// Bodies of objects with a wrong bit
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    wrong: f64,
    /// PUTs and DELETEs that come once more, 1 to 4 s later
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    duplicate: f64,
    /// Decides what chance would
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the log here once a second, one JSON object a request
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Say what the proxy adds without shaping, and end
    #[arg(long)]
    measure: bool,
}

impl Arguments {
    fn plan(&self) -> Plan {
        let p50 = Duration::from_millis(self.first_byte_ms);
        let first_byte = match self.first_byte_p99_ms.map(Duration::from_millis) {
            Some(p99) => Delay::Spread { p50, p99 },
            None if p50.is_zero() => Delay::None,
            None => Delay::Fixed(p50),
        };
        let rates = Rates {
            before_effect: self.before_effect / 100.0,
            after_effect: self.after_effect / 100.0,
            hang: self.hang / 100.0,
            truncated: self.truncated / 100.0,
            wrong: self.wrong / 100.0,
            duplicate: self.duplicate / 100.0,
            ..Rates::default()
        };
        let bytes_per_second = self.megabytes_per_second.map(|megabytes| megabytes * 1_000_000);
        let shape = Shape { first_byte, bytes_per_second };
        Plan { shape, rates, rules: Vec::new(), seed: self.seed }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.measure {
        println!("{}", overhead::measure()?);
        return Ok(());
    }
    let server = arguments.server.context("--server")?;
    let proxy = Proxy::listen(arguments.listen, server, arguments.plan())?;
    println!("http://{}", proxy.address());
    std::io::stdout().flush()?;
    let mut log = arguments.log.as_ref().map(std::fs::File::create).transpose()?;
    loop {
        std::thread::sleep(Duration::from_secs(1));
        let Some(log) = &mut log else { continue };
        // Together, so that none falls between them; what is being answered waits for the next time.
        for entry in proxy.take_ended() {
            serde_json::to_writer(&mut *log, &entry)?;
            log.write_all(b"\n")?;
        }
    }
}
