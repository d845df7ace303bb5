//! `reapd`: serves snapshots on a worker node.

mod api;
mod arguments;
mod client;
mod kept;
mod learner;
mod metrics;
mod prepared;
mod run;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use hyper::Method;
use serde_json::{Value, json};

use crate::output::size;
pub use arguments::{Arguments, Command};

/// Runs `reapd` with the process's arguments.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    crate::output::finish("reapd", dispatch(&arguments))
}

fn dispatch(arguments: &Arguments) -> Result<()> {
    match &arguments.command {
        Command::Run(run) => run::run(run),
        Command::Prepare { daemon, name, mode, profile, warm, plain_copy } => {
            let body = json!({
                "mode": mode, "profile": profile, "warm": warm, "plain_copy": plain_copy,
            });
            let answer = ask(&daemon.run_dir, Method::PUT, &snapshot_path(name), Some(body))?;
            print(arguments.json, &answer, &prepared_lines(&answer))
        }
        Command::Status { daemon, timeline: Some(id) } => {
            let path = format!("/restores/{id}/timeline");
            let answer = ask(&daemon.run_dir, Method::GET, &path, None)?;
            print(arguments.json, &answer, &timeline_lines(&answer))
        }
        Command::Status { daemon, timeline: None } => {
            let snapshots = ask(&daemon.run_dir, Method::GET, "/snapshots", None)?;
            let restores = ask(&daemon.run_dir, Method::GET, "/restores", None)?;
            let store = ask(&daemon.run_dir, Method::GET, "/store", None)?;
            let cache = ask(&daemon.run_dir, Method::GET, "/cache", None)?;
            let text = status_lines(&snapshots, &restores)
                + &store_line(&store)
                + &prefetch_line(&cache["prefetch"])
                + &cache_line(&cache["disk"])
                + &copies_line(&cache["plain_copies"]);
            let all = json!({
                "snapshots": snapshots,
                "restores": restores,
                "store": store,
                "cache": cache,
            });
            print(arguments.json, &all, &text)
        }
        Command::Metrics { daemon } => {
            let text = on_runtime(client::text(&daemon.run_dir, Method::GET, "/metrics", None))?;
            print(arguments.json, &Value::String(text.clone()), &text)
        }
        Command::Release { daemon, name, profile } => {
            let body = json!({ "profile": profile });
            let answer = ask(&daemon.run_dir, Method::DELETE, &snapshot_path(name), Some(body))?;
            print(arguments.json, &answer, &format!("{name} is released"))
        }
    }
}

/// The path of a snapshot in the API; what a name may hold needs no escaping but for this.
fn snapshot_path(name: &str) -> String {
    let escaped: String = name
        .bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'~' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect();
    format!("/snapshots/{escaped}")
}

fn ask(
    run_dir: &std::path::Path,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> Result<Value> {
    on_runtime(client::request(run_dir, method, path, body))
}

fn on_runtime<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(work)
}

fn print(json: bool, value: &Value, text: &str) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    match json {
        true => writeln!(out, "{value:#}")?,
        false => writeln!(out, "{}", text.trim_end())?,
    }
    Ok(())
}

fn prepared_lines(prepared: &Value) -> String {
    let text = |at: &Value| at.as_str().unwrap_or("-").to_owned();
    let mut lines = format!(
        "{}{} is {}, mode {}, working set {}\nuffd {}\nmemory {}\nstate {}\n",
        text(&prepared["name"]),
        match prepared["profile"].as_str() {
            None | Some("") => String::new(),
            Some(profile) => format!(" ({profile})"),
        },
        text(&prepared["id"]),
        text(&prepared["mode"]),
        prepared["working_set"],
        text(&prepared["uffd"]),
        text(&prepared["memory"]),
        text(&prepared["state"]),
    );
    if let Some(bytes) = prepared["plain_copy_bytes"].as_u64() {
        lines.push_str(&format!("memory has a plain copy of {}\n", size(bytes)));
    }
    for (name, path) in prepared["disks"].as_object().into_iter().flatten() {
        lines.push_str(&format!("disk {name} {}\n", text(path)));
    }
    for warning in prepared["warnings"].as_array().into_iter().flatten() {
        lines.push_str(&format!("warning: {}\n", text(warning)));
    }
    lines
}

fn status_lines(snapshots: &Value, restores: &Value) -> String {
    let mut lines = String::new();
    for prepared in snapshots.as_array().into_iter().flatten() {
        lines.push_str(&prepared_lines(prepared));
    }
    for restore in restores.as_array().into_iter().flatten() {
        let faults: u64 = ["cached", "fetched", "zero", "removed"]
            .iter()
            .filter_map(|class| restore[format!("faults_{class}")]["count"].as_u64())
            .sum();
        lines.push_str(&format!(
            "restore {} pid {} {}: {} planned, {} installed, {} late, {} missed, {} faults, {}{}\n",
            restore["id"],
            restore["pid"],
            restore["mode"].as_str().unwrap_or_default(),
            restore["planned_pages"],
            restore["prefetched_pages"],
            restore["late_pages"],
            restore["missed_pages"],
            faults,
            if restore["end"].is_null() {
                "running".to_owned()
            } else {
                restore["end"].to_string()
            },
            fit_text(restore),
        ));
    }
    lines
}

fn store_line(store: &Value) -> String {
    let (connection, fetch) = (&store["connection"], &store["fetch"]);
    let text = |at: &Value| at.as_str().unwrap_or_default().to_owned();
    format!(
        "store {}: {} reads, {} bytes, {} retries, {} late reads asked twice, {} answers to slow down, credentials: {}\n",
        text(&connection["url"]),
        fetch["store_reads"],
        fetch["store_bytes"],
        fetch["retries"],
        fetch["hedged_reads"],
        connection["throttled_answers"],
        text(&connection["credentials"]),
    )
}

fn prefetch_line(prefetch: &Value) -> String {
    let bytes = |name: &str| size(prefetch[name].as_u64().unwrap_or_default());
    format!(
        "prefetch: {} in flight of {}, {} at most so far; {} wait for room\n",
        bytes("in_flight_bytes"),
        bytes("limit_bytes"),
        bytes("highest_bytes"),
        prefetch["waiting"],
    )
}

/// Nothing where there is no disk cache.
fn cache_line(disk: &Value) -> String {
    if disk.is_null() {
        return String::new();
    }
    let bytes = |name: &str| size(disk[name].as_u64().unwrap_or_default());
    format!(
        "cache: {} of {}: {} pinned, {} evictable; {} pinned and not here yet, {} frames dropped\n",
        bytes("used_bytes"),
        bytes("limit_bytes"),
        bytes("pinned_bytes"),
        bytes("evictable_bytes"),
        bytes("missing_pinned_bytes"),
        disk["dropped_frames"],
    )
}

/// Nothing where there is none.
fn copies_line(copies: &Value) -> String {
    let bytes = |name: &str| size(copies[name].as_u64().unwrap_or_default());
    match copies["files"].as_u64() {
        None | Some(0) => String::new(),
        Some(files) => {
            format!("plain copies: {files}, {} of {}\n", bytes("used_bytes"), bytes("limit_bytes"))
        }
    }
}

/// How well the working set of a restore fitted, if there was one.
fn fit_text(restore: &Value) -> String {
    let fit = &restore["fit"];
    let (Some(precision), Some(recall)) = (fit["precision"].as_f64(), fit["recall"].as_f64())
    else {
        return String::new();
    };
    let wasted = size(fit["wasted_bytes"].as_u64().unwrap_or_default());
    let kind = if fit["estimated"] == true { "estimated" } else { "seen" };
    let inert = if restore["inert"] == true { ", NOTHING WAS INSTALLED" } else { "" };
    format!(
        ", precision {:.1} %, recall {:.1} %, {wasted} wasted ({kind}){inert}",
        precision * 100.0,
        recall * 100.0
    )
}

/// An event a line.
fn timeline_lines(timeline: &Value) -> String {
    let mut lines = "at_us took_us page pages what\n".to_owned();
    for event in timeline["events"].as_array().into_iter().flatten() {
        let what = event["kind"].as_str().unwrap_or_default();
        lines.push_str(&format!(
            "{} {} {} {} {what}{}\n",
            event["at_us"],
            event["took_us"],
            event["page"],
            event["pages"],
            match (what.starts_with("fault"), event["planned"] == true) {
                (true, true) => " planned",
                _ => "",
            }
        ));
    }
    lines.push_str(&format!("{} more events are not kept\n", timeline["dropped"]));
    lines
}
