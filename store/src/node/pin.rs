//! Carrying out a [`Reader`]'s requests on a store.

use crate::format::{keys, record};
use crate::reader::{Answer, Reader, Request};
use crate::store::Store;
use crate::{Error, SnapshotId};

/// One opening of a snapshot by a node, and its pin.
pub(crate) struct Pin {
    store: Store,
    node: SnapshotId,
    snapshot: SnapshotId,
    key: String,
    reader: Reader,
}

impl Pin {
    /// Nothing is asked of the store yet. The key is of this opening alone: a late duplicate of a DELETE
    /// of an earlier one must not take it away.
    pub(crate) fn new(store: &Store, node: SnapshotId, snapshot: SnapshotId) -> Self {
        let key = keys::pin(node, SnapshotId::random(), snapshot);
        Self { store: store.clone(), node, snapshot, key, reader: Reader::default() }
    }

    /// Pins the snapshot and looks for its tomb then, while `read` reads it. On an error it has let go.
    pub(crate) async fn open<T>(
        &mut self,
        read: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let (pinned, read) = futures::join!(self.pin_and_look(), read);
        // What was read says more than a pin that failed.
        let opened = match (read, pinned) {
            (Ok(read), Ok(())) => Ok(read),
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        if opened.is_err() {
            self.reader.fail();
            if let Err(error) = self.let_go().await {
                tracing::warn!("pin {}: {error}", self.key);
            }
        }
        opened
    }

    async fn pin_and_look(&mut self) -> Result<(), Error> {
        for request in [Request::Pin, Request::LookForTomb] {
            debug_assert_eq!(self.reader.next(), Some(request));
            let answer = self.carry_out(request).await?;
            self.reader.take(answer);
        }
        match self.reader.was_removed() {
            true => Err(Error::not_found(self.snapshot, "the snapshot was removed")),
            false => Ok(()),
        }
    }

    /// Writes the pin again; collectors never go by its age, people may.
    pub(crate) async fn renew(&self) -> Result<(), Error> {
        match self.reader.is_serving() {
            true => self.carry_out(Request::Pin).await.map(|_| ()),
            false => Ok(()),
        }
    }

    /// Deletes the pin, after which the snapshot must not be read. On an error it is there still: try
    /// again.
    pub(crate) async fn let_go(&mut self) -> Result<(), Error> {
        self.reader.let_go();
        if self.reader.next() == Some(Request::Unpin) {
            let answer = self.carry_out(Request::Unpin).await?;
            self.reader.take(answer);
        }
        Ok(())
    }

    /// Whether it may be there still, though nobody reads.
    pub(crate) fn is_left(&self) -> bool {
        self.reader.next() == Some(Request::Unpin)
    }

    async fn carry_out(&self, request: Request) -> Result<Answer, Error> {
        let objects = self.store.objects();
        match request {
            Request::Pin => {
                let marker = record::seal(&self.store.marker(self.snapshot, self.node));
                objects.overwrite(&self.key, marker).await.map(|()| Answer::Done)
            }
            Request::LookForTomb => self.store.is_removed(self.snapshot).await.map(Answer::Tomb),
            Request::Unpin => objects.delete(&self.key).await.map(|()| Answer::Done),
        }
    }
}

/// Deletes the pins that an earlier process of this node left when it was killed.
pub(super) async fn clear(store: &Store, node: SnapshotId) -> Result<(), Error> {
    let left = store.objects().list(&keys::pins(node)).await?;
    let keys: Vec<_> = left.into_iter().map(|object| object.key).collect();
    store.objects().delete_all(&keys).await
}
