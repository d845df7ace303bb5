//! Who a short-lived reader is: a random id, and a locked file of that name. The kernel lets go of the lock
//! when the process ends; where the file is there and not locked, somebody was killed and has left pins.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::pin;
use crate::store::Store;
use crate::{Error, SnapshotId};

/// A reader's file, locked.
pub(super) struct Identity {
    path: PathBuf,
    _locked: File,
}

impl Identity {
    /// It has no pins any more, and nobody needs to know of it.
    pub(super) fn is_spent(&self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!("{}: {error}", self.path.display());
        }
    }
}

/// Clears away the pins of readers of this store that were killed, and makes an identity. Without a
/// directory that can be written to it does without: should it be killed, its pins stay.
pub(super) async fn identity(directory: &Path, store: &Store) -> Option<(SnapshotId, Identity)> {
    let directory = directory.join(store.id().to_string()).join("readers");
    let made = async {
        std::fs::create_dir_all(&directory)?;
        clear(&directory, store).await?;
        make(&directory)
    };
    match made.await {
        Ok(identity) => Some(identity),
        Err(error) => {
            tracing::debug!("{}: {error}", directory.display());
            None
        }
    }
}

async fn clear(directory: &Path, store: &Store) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let Ok(reader) = entry.file_name().to_string_lossy().parse::<SnapshotId>() else {
            continue;
        };
        // One that ended meanwhile has taken its file with it.
        let Ok(file) = File::open(entry.path()) else { continue };
        if file.try_lock().is_err() {
            continue;
        }
        let cleared: Result<(), Error> = pin::clear(store, reader).await;
        match cleared {
            // Only now: until then the next one must know of it.
            Ok(()) => std::fs::remove_file(entry.path()).unwrap_or_default(),
            Err(error) => tracing::warn!("pins of a killed command stay: {error}"),
        }
    }
    Ok(())
}

fn make(directory: &Path) -> std::io::Result<(SnapshotId, Identity)> {
    let id = SnapshotId::random();
    let path = directory.join(id.to_string());
    let file = File::create_new(&path)?;
    // Somebody who clears away may be faster, and take it for a dead one's; it has no pins yet.
    file.try_lock()?;
    Ok((id, Identity { path, _locked: file }))
}
