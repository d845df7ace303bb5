//! Stores that earlier versions wrote stay readable for ever (`tests/data/make-golden.sh` made them).

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use reap_tests::worker::reap_pack_json;

fn golden() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/data"))
}

#[test]
fn golden_stores_give_what_was_put_in() -> Result<()> {
    let mut versions = 0;
    for entry in fs::read_dir(golden())? {
        let version = entry?.path();
        if version.is_dir() {
            check(&version).with_context(|| version.display().to_string())?;
            versions += 1;
        }
    }
    ensure!(versions > 0, "there are no golden stores");
    Ok(())
}

fn check(version: &Path) -> Result<()> {
    // Reading writes pins: into a copy.
    let scratch = tempfile::tempdir()?;
    let copied =
        Command::new("cp").arg("-r").arg(version.join("store")).arg(scratch.path()).status()?;
    ensure!(copied.success(), "the store cannot be copied");
    let url = format!("file://{}/store", scratch.path().display());

    let mut names = 0;
    for entry in fs::read_dir(version)? {
        let sums = entry?.path();
        let Some(name) = sums.file_name().and_then(|name| name.to_str()?.strip_suffix(".sha256"))
        else {
            continue;
        };
        let out = scratch.path().join(name);
        reap_pack_json(&url, &["export", name, &out.display().to_string()])?;
        let right =
            Command::new("sha256sum").arg("--check").arg(&sums).current_dir(&out).output()?;
        ensure!(right.status.success(), "{name}: {}", String::from_utf8_lossy(&right.stdout));
        names += 1;
    }
    let listed = reap_pack_json(&url, &["ls"])?;
    ensure!(listed.as_array().is_some_and(|rows| rows.len() == names && names > 2), "{listed}");
    let verified = reap_pack_json(&url, &["verify", "--all"])?;
    let nothing = |key: &str| verified[key].as_array().is_some_and(Vec::is_empty);
    ensure!(nothing("problems") && nothing("warnings"), "{verified}");
    ensure!(verified["working_sets"] == 1, "{verified}");

    let trace = scratch.path().join("trace");
    reap_pack_json(&url, &["ws", "export", "golden:v1", &trace.display().to_string()])?;
    ensure!(fs::read(&trace)? == fs::read(version.join("trace"))?, "another working set");
    let collected = reap_pack_json(&url, &["gc", "--dry-run"])?;
    ensure!(collected["garbage"].as_array().is_some_and(Vec::is_empty), "{collected}");
    Ok(())
}
