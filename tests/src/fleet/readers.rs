//! A worker node: `reapd` with a mount and a disk cache behind the proxy, killed now and then.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use reap_store::SnapshotId;

use super::content::Content;
use super::events::Events;
use super::processes::Programs;
use crate::worker::Worker;

/// How often a daemon that does not come up through the faults is started again.
const STARTS: usize = 5;

pub(super) struct MountReader {
    url: String,
    endpoint: (&'static str, String),
    directory: PathBuf,
    worker: Option<Worker>,
}

impl MountReader {
    pub(super) fn new(programs: &Programs, directory: &Path) -> Self {
        let (url, endpoint) = (programs.url().to_owned(), programs.endpoint());
        Self { url, endpoint, directory: directory.to_owned(), worker: None }
    }

    /// Reads a snapshot's memory through the mount; kills the daemon afterwards if `kill`.
    pub(super) fn read(
        &mut self,
        id: SnapshotId,
        content: &Content,
        kill: bool,
        events: &mut Events,
    ) -> Result<()> {
        let worker = self.started(events)?;
        let path = worker.mount().join("by-id").join(id.to_string()).join("memory");
        match content.require_equal(&path) {
            Ok(()) => events.read_through_mount += 1,
            // Nothing but bytes may be wrong with a reader, and never bytes.
            Err(error) => match error.downcast_ref::<std::io::Error>() {
                Some(failed) => events.note_failure(&format!("mount: {failed}")),
                None => return Err(error.context(format!("{id} through the mount"))),
            },
        }
        if kill && let Some(mut worker) = self.worker.take() {
            worker.kill()?;
            events.readers_killed += 1;
        }
        Ok(())
    }

    fn started(&mut self, events: &mut Events) -> Result<&Worker> {
        for _ in 0..STARTS {
            if self.worker.is_some() {
                break;
            }
            let through = [self.endpoint.clone()];
            let started = Worker::start_with(&self.url, &self.directory, &[], &through);
            match started {
                Ok(worker) => self.worker = Some(worker),
                Err(error) => events.note_failure(&format!("{error:#}")),
            }
        }
        match &self.worker {
            Some(worker) => Ok(worker),
            None => bail!("reapd does not start in {STARTS} tries"),
        }
    }

    /// Ends it, which gives its pins up.
    pub(super) fn stop(&mut self) -> Result<()> {
        let worker = self.worker.take();
        worker.map_or(Ok(()), Worker::stop).context("the reader with a mount")
    }
}
