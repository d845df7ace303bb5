//! `reap-bench`: cold and warm starts by every way a user has, interleaved, in one run.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use reap_tests::bench::answers::Answers;
use reap_tests::bench::remote::Remote;
use reap_tests::bench::report::{Measured, json, table};
use reap_tests::bench::touch::{Way, touch};
use reap_tests::bench::ways::{Bench, Function};
use reap_tests::bench::{Trace, answers, guests, plot};
use reap_tests::lab::{FUNCTIONS, Lab};

/// Measures how long a VM's first pages take, by every way a user has, interleaved in one run.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// From memory files and traces: `reap-pack ws export` writes traces, one page number a line
    Run {
        /// May be given several times
        #[arg(long = "function", value_name = "NAME=MEMORY,TRACE", required = true, value_parser = parse_function)]
        functions: Vec<(String, PathBuf, PathBuf)>,
        #[command(flatten)]
        options: Options,
    },
    /// From real guests that are booted, snapshot and recorded first. Needs QEMU, as `make demo` does
    Guests {
        /// Which functions
        #[arg(long = "function", value_name = "NAME", default_values = FUNCTIONS)]
        functions: Vec<String>,
        /// Guest memory in MiB; may be given several times
        #[arg(long, default_values_t = [256])]
        memory_mib: Vec<u32>,
        #[command(flatten)]
        options: Options,
    },
    /// One start, for the other commands: touches a trace and prints what it took as JSON
    Touch {
        /// The memory file
        memory: PathBuf,
        /// The trace
        trace: PathBuf,
        /// Touches nothing before standard input ends
        #[arg(long)]
        held: bool,
        #[command(subcommand)]
        way: Way,
    },
}

#[derive(Args)]
struct Options {
    /// Every way is taken this often, in turns
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only starts from the remote store
    #[arg(long)]
    remote_only: bool,
    /// Directory for the store, made and removed; on the disk that is to be measured
    #[arg(long, default_value = "target")]
    scratch: PathBuf,
    /// Write all figures here
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw a picture here
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn parse_function(text: &str) -> Result<(String, PathBuf, PathBuf), String> {
    let parts = text.split_once('=').and_then(|(name, files)| {
        let (memory, trace) = files.rsplit_once(',')?;
        Some((name.to_owned(), memory.into(), trace.into()))
    });
    parts.ok_or_else(|| "write NAME=MEMORY,TRACE".to_owned())
}

fn main() -> std::process::ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("reap-bench: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn read_trace(trace: &Path, memory: &Path) -> Result<Trace> {
    let length = std::fs::metadata(memory).with_context(|| format!("{}", memory.display()))?.len();
    Trace::read(trace, length / 4096)
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Touch { memory, trace, held, way } => {
            let touched = touch(&memory, &read_trace(&trace, &memory)?, &way, held)?;
            println!("{}", serde_json::to_string(&touched)?);
            Ok(())
        }
        Command::Run { functions, options } => {
            let read =
                |(name, memory, trace_file): (String, PathBuf, PathBuf)| -> Result<Function> {
                    let trace = read_trace(&trace_file, &memory)?;
                    Ok(Function { name, memory, trace_file, trace })
                };
            let functions: Vec<_> = functions.into_iter().map(read).collect::<Result<_>>()?;
            measure(&functions, &options, &scratch(&options)?, None)
        }
        Command::Guests { functions, memory_mib, options } => {
            let scratch = scratch(&options)?;
            let lab = Lab::open()?;
            let mut made = Vec::new();
            for memory_mib in memory_mib {
                for function in &functions {
                    eprintln!("{function} with {memory_mib} MiB: boot, snapshot, record");
                    made.push(guests::function(&lab, function, memory_mib, scratch.path())?);
                }
            }
            let mut guests: Vec<_> = made.iter().map(Answers::of).collect();
            // These are starts from local stores.
            let rounds = if options.remote_only { 0 } else { options.rounds };
            for round in 1..=rounds {
                eprintln!("answers, round {round} of {rounds}");
                for (made, answers) in made.iter().zip(&mut guests) {
                    answers.round(&lab, made)?;
                }
            }
            for (made, answers) in made.iter().zip(&mut guests).filter(|_| rounds > 0) {
                answers.learn(&lab, made)?;
            }
            let functions: Vec<_> = made.into_iter().map(|made| made.function).collect();
            measure(&functions, &options, &scratch, (rounds > 0).then_some(&guests[..]))
        }
    }
}

fn scratch(options: &Options) -> Result<tempfile::TempDir> {
    let at = std::fs::canonicalize(&options.scratch)
        .with_context(|| format!("no directory {}", options.scratch.display()))?;
    Ok(tempfile::Builder::new().prefix("reap-bench").tempdir_in(at)?)
}

fn measure(
    functions: &[Function],
    options: &Options,
    scratch: &tempfile::TempDir,
    guests: Option<&[Answers]>,
) -> Result<()> {
    let bench = Bench::set_up(&scratch.path().join("bench"), functions)?;
    let remote = Remote::set_up(bench.url(), functions, scratch.path())?;
    let mut measured: Vec<_> = functions
        .iter()
        .map(|function| {
            let pages = function.trace.pages().len();
            let (name, working_set_bytes) =
                (function.name.clone(), remote.working_set_bytes(function));
            Measured { name, pages, working_set_bytes, starts: Vec::new(), remote: Vec::new() }
        })
        .collect();
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        for (function, into) in functions.iter().zip(&mut measured) {
            if !options.remote_only {
                into.starts.extend(bench.round(function)?);
            }
            into.push_remote(remote.start(function)?);
        }
    }
    print!("{}", table(&measured));
    let mut value = json(&measured);
    if let Some(guests) = guests {
        print!("{}", answers::table(guests));
        value["answers"] = answers::json(guests);
    }
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&value)?)?;
    }
    if let Some(path) = &options.svg {
        std::fs::write(path, plot::svg(&measured))?;
    }
    Ok(())
}
