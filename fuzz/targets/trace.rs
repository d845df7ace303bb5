//! Traces of `reap-bench`: what `ws export` writes, and what people write by hand.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_tests::bench::Trace;

const PAGES: u64 = 65_536;

fuzz_target!(|text: &str| {
    let Ok(trace) = Trace::parse(text, PAGES) else { return };
    assert!(trace.pages().iter().all(|page| *page < PAGES));
    let in_runs: u64 = trace.runs().iter().map(|(_, pages)| pages).sum();
    assert_eq!(in_runs, trace.pages().len() as u64);
    let lines: Vec<String> = trace.pages().iter().map(u64::to_string).collect();
    let again = Trace::parse(&lines.join("\n"), PAGES).expect("what was read is read again");
    assert_eq!(again.pages(), trace.pages());
});
