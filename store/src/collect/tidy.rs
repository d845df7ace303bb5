//! What no snapshot and no transaction owns: old records of names, and what killed processes left: condemned lists,
//! probes, and in a local store staged files and empty directories.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::machine::Collector;
use crate::Error;
use crate::format::keys::{self, NameKey, PackId};
use crate::objects::{ListedObject, Objects};

/// Whoever wrote what is this old is dead. If not, it fails, and nothing is lost: a collector stops when its
/// list is gone, and a staged file that is gone cannot become an object.
const DEAD: Duration = Duration::from_secs(3600);
/// Records that a name keeps, the newest: what it stood for is told for so long, and a listing stays one page.
const KEPT_RECORDS: u64 = 100;

/// Clears away what is old by the store's clock, which says `now_unix_ms`.
pub(super) async fn tidy(
    objects: &Objects,
    now_unix_ms: u64,
    collector: &Collector,
) -> Result<(), Error> {
    let mut useless = replaced_names(objects.list("ref/").await?);
    for prefix in ["gc/condemned", "gc/probe"] {
        useless.extend(objects.list(prefix).await?);
    }
    for object in useless {
        let age = Duration::from_millis(now_unix_ms.saturating_sub(object.modified_unix_ms));
        if age > DEAD {
            objects.delete(&object.key).await?;
        }
    }
    if let Some(root) = objects.local_root() {
        tidy_directory(root, collector).map_err(|error| Error::local(root.display(), error))?;
    }
    Ok(())
}

/// Records of names with [`KEPT_RECORDS`] newer ones, and hints beside records that are not the newest. A writer that
/// listed one of these as the newest, an hour ago, may write its successor once more: others were given since, and
/// the name stands for the last of them.
fn replaced_names(listed: Vec<ListedObject>) -> Vec<ListedObject> {
    let mut newest = BTreeMap::new();
    for object in &listed {
        if let (Some(name), Some(NameKey::Record(sequence))) =
            (keys::name_of(&object.key), keys::name_key(&object.key))
        {
            let known = newest.entry(name).or_insert(sequence);
            *known = sequence.max(*known);
        }
    }
    let is_replaced = |object: &ListedObject| {
        let newest = keys::name_of(&object.key).and_then(|name| newest.get(&name));
        match (keys::name_key(&object.key), newest) {
            (Some(NameKey::Record(sequence)), Some(newest)) => sequence + KEPT_RECORDS <= *newest,
            (Some(NameKey::Hint(sequence, _)), Some(newest)) => sequence < *newest,
            _ => false,
        }
    };
    listed.into_iter().filter(is_replaced).collect()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SnapshotId;

    #[test]
    fn a_name_keeps_its_newest_records_and_one_hint() {
        let (name, other) = ("f".parse().expect("a name"), "g".parse().expect("a name"));
        let id = SnapshotId::from_bytes([7; 16]);
        let mut keys: Vec<_> = (1..=150)
            .flat_map(|number| [keys::reference(&name, number), keys::hint(&name, number, id)])
            .collect();
        keys.extend([keys::reference(&other, 1), keys::hint(&other, 1, id)]);
        let listed = |key: String| ListedObject { key, bytes: 0, modified_unix_ms: 0 };
        let replaced = replaced_names(keys.into_iter().map(listed).collect());
        let replaced: Vec<_> = replaced.into_iter().map(|object| object.key).collect();
        assert_eq!(replaced.len(), 50 + 149);
        assert!(replaced.contains(&keys::reference(&name, 50)));
        assert!(!replaced.contains(&keys::reference(&name, 51)));
        assert!(!replaced.contains(&keys::hint(&name, 150, id)));
        assert!(!replaced.iter().any(|key| key.starts_with("ref/g/")));
    }
}
