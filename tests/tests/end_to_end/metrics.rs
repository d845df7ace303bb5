//! What a daemon counts, as Prometheus reads it.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;

use super::learning::{socket, start};
use super::*;
use reap_tests::worker::metric;

/// A request by HTTP to `address`, whole.
fn get(address: &str, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn what_restores_come_to_is_counted_for_prometheus() -> Result<()> {
    let (fixture, memory) = Fixture::with_snapshot()?;
    let worker = fixture.worker(&["--metrics", "127.0.0.1:0"])?;
    let trace = fixture.write_trace("trace", 0..300)?;
    let prepared = socket(&worker.prepare("f", "auto")?)?;
    start(&worker, &memory, &trace, &prepared)?;
    worker.wait_for_working_set("f")?;
    let wider = fixture.write_trace("wider", 0..400)?;
    let restore = start(&worker, &memory, &wider, &prepared)?;

    let metrics = worker.metrics()?;
    let is = |name: &str, part: &str, wanted: f64| -> Result<()> {
        let value = metric(&metrics, name, part)?;
        ensure!(value == wanted, "{name} {part} is {value}, not {wanted}: {metrics}");
        Ok(())
    };
    is("reap_restores_started_total", "mode=\"record\"", 1.0)?;
    is("reap_restores_started_total", "mode=\"prefetch\"", 1.0)?;
    is("reap_restores_started_total", "mode=\"sample\"", 0.0)?;
    is("reap_restores_ended_total", "outcome=\"vmm_ended\"", 2.0)?;
    is("reap_restores_killed_total", "", 0.0)?;
    is("reap_restores_running", "", 0.0)?;
    is("reap_prepared_snapshots", "", 1.0)?;
    is("reap_build_info", &format!("version=\"{}\"", env!("CARGO_PKG_VERSION")), 1.0)?;
    is("reap_oldest_fault_seconds", "", 0.0)?;
    for (name, keys) in [
        ("planned", ["planned_pages", "planned_zero_pages"]),
        ("installed", ["prefetched_pages", "prefetched_zero_pages"]),
        ("missed", ["missed_pages", "missed_zero_pages"]),
    ] {
        let wanted: f64 = keys.iter().filter_map(|key| restore[*key].as_f64()).sum();
        ensure!(wanted > 0.0, "no pages were {name}: this shows nothing");
        is(&format!("reap_prefetch_{name}_pages_total"), "", wanted)?;
    }

    // What is counted is documented, and the other way round; a local store has neither a cache on disk nor
    // credentials.
    let documented = super::documents::metrics()?;
    let helps = metrics.lines().filter_map(|line| line.strip_prefix("# HELP "));
    let there: BTreeSet<String> =
        helps.filter_map(|line| Some(line.split(' ').next()?.to_owned())).collect();
    let unknown: Vec<_> = there.difference(&documented).collect();
    ensure!(there.len() > 30 && unknown.is_empty(), "not documented: {unknown:?}");
    let not_here = |name: &&String| name.contains("_cache_") || name.contains("_credentials_");
    let missing: Vec<_> = documented.difference(&there).filter(|name| !not_here(name)).collect();
    ensure!(missing.is_empty(), "documented, and not counted: {missing:?}");

    // Every fault is in one bucket, and the last one has all.
    let faults = metric(&metrics, "reap_fault_seconds_count", "")?;
    ensure!(faults >= 300.0, "{faults} faults");
    is("reap_fault_seconds_bucket", "le=\"+Inf\"", faults)?;
    ensure!(metric(&metrics, "reap_fault_seconds_sum", "")? > 0.0, "{metrics}");

    let log = worker.log();
    let (_, address) = log.split_once("metrics at http://").context("an address")?;
    let (address, _) = address.split_once('/').context("a path")?;
    let answer = get(address, "/metrics")?;
    ensure!(answer.starts_with("HTTP/1.1 200") && answer.contains("version=0.0.4"), "{answer}");
    ensure!(metric(&answer, "reap_restores_ended_total", "")? == 2.0, "{answer}");
    for path in ["/restores", "/snapshots", "/"] {
        let answer = get(address, path)?;
        ensure!(answer.starts_with("HTTP/1.1 404"), "{path} is there for everybody: {answer}");
    }

    // An address that is taken is named.
    let at = fixture.path("another");
    let taken = Worker::start(&fixture.url, &at, &["--metrics", address]);
    let error = taken.err().context("two at one address")?.to_string();
    ensure!(error.contains(address) && error.contains("--metrics"), "{error}");
    worker.stop()
}
