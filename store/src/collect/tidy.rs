//! What killed processes left that no snapshot and no transaction owns: condemned lists, probes, and in a
//! local store staged files and empty directories.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::machine::Collector;
use crate::Error;
use crate::format::keys::PackId;
use crate::objects::Objects;

/// Whoever wrote what is this old is dead. If not, it fails, and nothing is lost: a collector stops when its
/// list is gone, and a staged file that is gone cannot become an object.
const DEAD: Duration = Duration::from_secs(3600);

/// Clears away what is old by the store's clock, which says `now_unix_ms`.
pub(super) async fn tidy(
    objects: &Objects,
    now_unix_ms: u64,
    collector: &Collector,
) -> Result<(), Error> {
    for prefix in ["gc/condemned", "gc/probe"] {
        for object in objects.list(prefix).await? {
            let age = Duration::from_millis(now_unix_ms.saturating_sub(object.modified_unix_ms));
            if age > DEAD {
                objects.delete(&object.key).await?;
            }
        }
    }
    if let Some(root) = objects.local_root() {
        tidy_directory(root, collector).map_err(|error| Error::local(root.display(), error))?;
    }
    Ok(())
}

/// Staged files are `<object>#<number>`, beside the object that they would become.
fn tidy_directory(directory: &Path, collector: &Collector) -> std::io::Result<()> {
    let Some(entries) = unless_gone(std::fs::read_dir(directory))? else { return Ok(()) };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            tidy_directory(&path, collector)?;
            if is_old(&entry) {
                // One that is not empty stays.
                std::fs::remove_dir(&path).unwrap_or_default();
            }
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((object, _)) = name.split_once('#') else { continue };
        // A transaction with a decision writes no pack any more, and packs are what takes space.
        let pack = object.parse::<PackId>().ok();
        if pack.is_some_and(|pack| collector.is_decided(&pack.txn)) || is_old(&entry) {
            unless_gone(std::fs::remove_file(&path))?;
        }
    }
    Ok(())
}

fn is_old(entry: &std::fs::DirEntry) -> bool {
    let modified = entry.metadata().and_then(|metadata| metadata.modified());
    let age = modified.map(|then| SystemTime::now().duration_since(then));
    age.is_ok_and(|age| age.is_ok_and(|age| age > DEAD))
}

/// Others may be faster.
fn unless_gone<T>(outcome: std::io::Result<T>) -> std::io::Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
