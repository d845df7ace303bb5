//! Sizes on the command line, and the dates that listings show.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_tools::output::{parse_size, time};

fuzz_target!(|text: &str| {
    if let Ok(bytes) = parse_size(text) {
        assert_eq!(parse_size(&bytes.to_string()), Ok(bytes));
        assert!(time(bytes).ends_with('Z'));
    }
});
