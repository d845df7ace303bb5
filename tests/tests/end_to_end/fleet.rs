//! The commands around dedup over snapshots, as people and scripts run them.

use super::*;

/// Pages that are all different.
fn distinct_bytes(pages: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![seed; pages * 4096];
    for (number, page) in bytes.chunks_exact_mut(4096).enumerate() {
        page.iter_mut().enumerate().for_each(|(at, byte)| *byte ^= (at / 3) as u8);
        page[..8].copy_from_slice(&(number as u64 | u64::from(seed) << 32).to_le_bytes());
    }
    bytes
}

impl Fixture {
    fn write(&self, name: &str, bytes: &[u8]) -> Result<String> {
        let path = self.path(name);
        fs::write(&path, bytes)?;
        Ok(path.display().to_string())
    }

    fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        reap_pack_json(&self.url, arguments)
    }

    fn export_is(&self, url: &str, name: &str, memory: &str) -> Result<()> {
        let out = tempfile::tempdir_in(self.directory.path())?;
        let to = out.path().display().to_string();
        reap_pack_json(url, &["export", name, &to])?;
        ensure!(same_bytes(Path::new(memory), &out.path().join("memory"))?, "{name}: other bytes");
        Ok(())
    }

    /// `f` needs few pages of what is left of a removed snapshot; answers with its memory file.
    fn mostly_dead(&self) -> Result<String> {
        let old = distinct_bytes(4000, 1);
        let old_file = self.write("old", &old)?;
        self.json(&["pack", "--name", "f", "--memory", &old_file])?;
        let mut new = distinct_bytes(4000, 2);
        new[..500 * 4096].copy_from_slice(&old[..500 * 4096]);
        let memory = self.write("new", &new)?;
        let first = self.json(&["show", "f"])?["snapshot"].as_str().map(str::to_owned);
        let packed = self.json(&["pack", "--name", "f", "--memory", &memory])?;
        ensure!(packed["statistics"]["parent_pages"] == 500, "{packed}");
        self.json(&["rm", &first.context("an id")?])?;
        Ok(memory)
    }
}

#[test]
fn stats_tree_and_copy_tell_scripts_what_they_did() -> Result<()> {
    let fixture = Fixture::new()?;
    let bytes = distinct_bytes(1000, 1);
    let memory = fixture.write("memory", &bytes)?;
    fixture.json(&["pack", "--name", "f", "--memory", &memory])?;
    let mut changed = bytes.clone();
    changed[4096 + 50] ^= 1;
    let changed = fixture.write("changed", &changed)?;
    fixture.json(&["pack", "--name", "g", "--memory", &changed, "--parent", "f"])?;
    let tree = fixture.json(&["ls", "--tree"])?;
    ensure!(tree[0]["names"][0] == "f" && tree[0]["children"][0]["names"][0] == "g", "{tree}");
    let stats = fixture.json(&["stats"])?;
    ensure!(stats["raw_bytes"] == 2 * 1000 * 4096 && stats["garbage_bytes"] == 0, "{stats}");
    let lines = reap_pack(&fixture.url, &["ls", "--tree"])?;
    let lines = String::from_utf8_lossy(&lines.stdout).into_owned();
    ensure!(lines.lines().nth(1).is_some_and(|line| line.starts_with("  g  ")), "{lines}");

    let other = format!("file://{}/other", fixture.directory.path().display());
    reap_pack_json(&other, &["init"])?;
    fixture.json(&["copy", "f", "--to", &other, "--name", "x"])?;
    let copied = fixture.json(&["copy", "g", "--to", &other, "--name", "x"])?;
    ensure!(copied["statistics"]["unique_pages"] == 1, "{copied}");
    fixture.export_is(&other, "x", &changed)
}

#[test]
fn a_killed_repack_leaves_the_old_snapshot_or_the_new_one() -> Result<()> {
    let fixture = Fixture::new()?;
    let memory = fixture.mostly_dead()?;
    for delay_ms in (0..60).step_by(4) {
        fixture.killed_after(delay_ms, &["repack", "--all"])?;
        fixture.export_is(&fixture.url, "f", &memory)?;
    }
    fixture.json(&["repack", "--all"])?;
    let verified = fixture.json(&["verify", "--all"])?;
    ensure!(verified["problems"].as_array().is_some_and(Vec::is_empty), "{verified}");
    fixture.export_is(&fixture.url, "f", &memory)?;
    let again = fixture.json(&["repack", "--all"])?;
    ensure!(again.as_array().is_some_and(Vec::is_empty), "nothing is left to do: {again}");
    Ok(())
}

#[test]
fn wrong_wishes_for_parents_get_one_line_and_leave_nothing() -> Result<()> {
    let fixture = Fixture::new()?;
    let memory = fixture.write("memory", &distinct_bytes(10, 1))?;
    let longer = fixture.write("longer", &distinct_bytes(11, 1))?;
    fixture.json(&["pack", "--name", "f", "--memory", &memory])?;
    let nowhere = format!("file://{}/nowhere", fixture.directory.path().display());
    let pack = ["pack", "--name", "g", "--memory"];
    let cases: [(Vec<&str>, i32); 7] = [
        ([&pack[..], &[&memory, "--parent", "nobody"]].concat(), 3),
        ([&pack[..], &[&longer, "--diff", "--parent", "f"]].concat(), 2),
        ([&pack[..], &[&memory, "--diff", "--parent", "f"]].concat(), 2),
        (vec!["repack", "nobody"], 3),
        (vec!["copy", "f", "--to", &nowhere], 3),
        (vec!["copy", "f", "--to", &fixture.url], 6),
        (vec!["copy", "f", "--to", "nonsense"], 2),
    ];
    for (arguments, code) in cases {
        let output = reap_pack(&fixture.url, &arguments)?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(code), "{arguments:?}: {}: {error}", output.status);
        ensure!(error.lines().count() == 1 && error.len() > 20, "{arguments:?}: {error:?}");
    }
    let ids = fixture.json(&["ls", "--tree"])?;
    ensure!(ids.as_array().is_some_and(|rows| rows.len() == 1), "{ids}");
    let leases = fs::read_dir(fixture.path("store/lease")).map_or(0, Iterator::count);
    ensure!(leases == 0, "{leases} leases are left");
    Ok(())
}
