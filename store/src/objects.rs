//! The objects of a store, wherever it is: create-only PUT, GET, ranged GET, LIST, DELETE.
//!
//! A remote store is reached through [`remote`], where all time-outs and retries of single requests
//! are. A local store is written through `object_store` (which stages, syncs and links), but read
//! directly where it matters.

mod credentials;
mod errors;
mod gate;
mod pace;
mod remote;
mod traffic;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use serde::Serialize;
use url::Url;

use crate::{Error, ErrorKind, Urgency};
use credentials::Credentials;
use errors::keys_may_be_refused;
pub(crate) use gate::Pass;
use remote::Clients;
use traffic::Traffic;

/// An upload of at most this is not expected to take longer than any other request.
const SMALL_UPLOAD_BYTES: usize = 256 << 10;
/// DELETEs in flight.
const PARALLEL_DELETES: usize = 16;

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedObject {
    /// Key, relative to the store.
    pub key: String,
    /// Length.
    pub bytes: u64,
    /// When it was written, by the store's clock, milliseconds since 1970.
    pub modified_unix_ms: u64,
}

/// How a store is reached, and how it bears it.
#[derive(Clone, Debug, Serialize)]
pub struct Connection {
    /// The store's URL as the user wrote it.
    pub url: String,
    /// Where its credentials come from.
    pub credentials: String,
    /// When they expire, in seconds since 1970, where that is known.
    pub credentials_expire_unix: Option<i64>,
    /// Answers that meant "slow down".
    pub throttled_answers: u64,
    /// Prefetch requests that may be in flight now.
    pub prefetch_requests: usize,
    /// Requests other than prefetch and demand that may be in flight now.
    pub other_requests: usize,
}

/// Access to the objects of one store. Clones share connections.
#[derive(Clone)]
pub struct Objects {
    url: String,
    clients: Clients,
    credentials: Credentials,
    traffic: Arc<Traffic>,
    prefix: object_store::path::Path,
    local_root: Option<PathBuf>,
}

impl Objects {
    /// Sets up access; nothing is asked yet. `make_directory`: a local store's directory is made.
    pub fn connect(url: &str, make_directory: bool) -> Result<Self, Error> {
        let parsed = Url::parse(url)
            .map_err(|error| Error::invalid(url, format!("not a store URL ({error}): write file:///path, s3://bucket/prefix, gs://... or az://...")))?;
        if parsed.scheme() == "file" {
            return Self::connect_local(url, &parsed, make_directory);
        }
        let prefix = object_store::path::Path::from_url_path(parsed.path())
            .map_err(|error| Error::invalid(url, error))?;
        let credentials = Credentials::choose(parsed.scheme())?;
        let traffic = Arc::new(Traffic::new());
        let clients = Clients::remote(url, &parsed, &credentials, &traffic)?;
        Ok(Self { url: url.to_owned(), clients, credentials, traffic, prefix, local_root: None })
    }

    /// A store of a test's own.
    #[cfg(test)]
    pub(crate) fn over(store: Arc<dyn ObjectStore>) -> Self {
        Self::unwatched("s3://simulation", store, None)
    }

    fn unwatched(url: &str, store: Arc<dyn ObjectStore>, local_root: Option<PathBuf>) -> Self {
        Self {
            url: url.to_owned(),
            clients: Clients::same(store),
            credentials: Credentials::None,
            traffic: Arc::new(Traffic::new()),
            prefix: object_store::path::Path::default(),
            local_root,
        }
    }

    fn connect_local(url: &str, parsed: &Url, make_directory: bool) -> Result<Self, Error> {
        let root = parsed
            .to_file_path()
            .map_err(|()| Error::invalid(url, "a local store is file:///absolute/path"))?;
        if make_directory {
            std::fs::create_dir_all(&root).map_err(|error| Error::local(root.display(), error))?;
        }
        let root = std::fs::canonicalize(&root).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::not_found(url, "there is no store: make one with 'reap-pack init'")
            }
            _ => Error::local(root.display(), error),
        })?;
        let system = object_store::local::LocalFileSystem::new_with_prefix(&root)
            .map_err(|error| Error::local(root.display(), error))?
            .with_fsync(true);
        Ok(Self::unwatched(url, Arc::new(system), Some(root)))
    }

    /// The store's URL as the user wrote it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The directory of a local store.
    pub fn local_root(&self) -> Option<&Path> {
        self.local_root.as_deref()
    }

    /// Creates an object that must not be there. An object there with these very bytes was created
    /// by an earlier try of ours whose answer was lost: every record holds a nonce or lies under a
    /// random name.
    pub async fn create(&self, key: &str, chunks: &[Bytes]) -> Result<(), Error> {
        let error = match self.put(key, chunks, PutMode::Create).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if error.kind() != ErrorKind::Exists {
            return Err(error);
        }
        let length = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let there = match self.get(key, length).await {
            Ok(there) => there,
            // Whose it is, is not known: that is no refusal.
            Err(unknown) if unknown.kind() == ErrorKind::Unreachable => return Err(unknown),
            Err(_) => return Err(error),
        };
        let mut rest = &there[..];
        let same = chunks.iter().all(|chunk| match rest.split_at_checked(chunk.len()) {
            Some((head, tail)) if head == chunk => {
                rest = tail;
                true
            }
            _ => false,
        });
        if same && rest.is_empty() { Ok(()) } else { Err(error) }
    }

    /// Whether the store lets an object that is there be created once more. `bytes` are those that it has, so that nothing
    /// is changed if it does.
    pub(crate) async fn is_created_again(&self, key: &str, bytes: Bytes) -> Result<bool, Error> {
        match self.put(key, &[bytes], PutMode::Create).await {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Exists => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes an object whatever is there: leases and pins are renewed so, nothing else.
    pub async fn overwrite(&self, key: &str, bytes: Vec<u8>) -> Result<(), Error> {
        self.put(key, &[bytes.into()], PutMode::Overwrite).await
    }

    async fn put(&self, key: &str, chunks: &[Bytes], mode: PutMode) -> Result<(), Error> {
        let path = self.path(key);
        let payload: PutPayload = chunks.iter().cloned().collect();
        let small = payload.content_length() <= SMALL_UPLOAD_BYTES;
        let client = if small { &self.clients.bulk } else { &self.clients.upload };
        let options = PutOptions { mode, ..PutOptions::default() };
        let put = || client.put_opts(&path, payload.clone(), options.clone());
        self.ask(key, put).await.map(|_| ())
    }

    /// A whole object of at most `limit` bytes.
    pub async fn get(&self, key: &str, limit: u64) -> Result<Bytes, Error> {
        let path = self.path(key);
        let get = || self.clients.bulk.get_opts(&path, GetOptions::default());
        let result = self.ask(key, get).await?;
        if result.meta.size > limit {
            let text = format!("is {} bytes long, over the limit of {limit}", result.meta.size);
            return Err(Error::damaged(key, text));
        }
        result.bytes().await.map_err(|error| self.explain(key, &error))
    }

    /// A part of an object; shorter if the object ends before.
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, Error> {
        let path = self.path(key);
        self.ask(key, || self.clients.bulk.get_range(&path, range.clone())).await
    }

    /// The same, tried once: for the fetch path, which retries by itself and knows who waits. A
    /// prefetch needs a [place](Self::prefetch_pass).
    pub(crate) async fn try_range(
        &self,
        key: &str,
        range: Range<u64>,
        urgency: Urgency,
    ) -> Result<Bytes, Error> {
        let path = self.path(key);
        let client = match urgency {
            Urgency::Demand => &self.clients.demand,
            Urgency::Prefetch => &self.clients.prefetch,
        };
        self.ask_with_keys(key, || client.get_range(&path, range.clone())).await
    }

    /// Waits until the store can take one more prefetch.
    pub(crate) async fn prefetch_pass(&self) -> Pass<'_> {
        self.traffic.prefetch().await
    }

    /// How the store is reached, and how it bears it.
    pub fn connection(&self) -> Connection {
        let (throttled_answers, prefetch_requests, other_requests) = self.traffic.load();
        Connection {
            url: self.url.clone(),
            credentials: self.credentials.describe(),
            credentials_expire_unix: self.credentials.expire_unix(),
            throttled_answers,
            prefetch_requests,
            other_requests,
        }
    }

    /// Makes a request that is neither demand nor prefetch.
    async fn ask<T, R>(&self, key: &str, request: impl Fn() -> R) -> Result<T, Error>
    where
        R: Future<Output = object_store::Result<T>>,
    {
        let _pass = self.traffic.bulk().await;
        self.ask_with_keys(key, request).await
    }

    /// Makes a request; once more if it seems that the store did not accept the credentials, and there are
    /// others now.
    async fn ask_with_keys<T, R>(&self, key: &str, request: impl Fn() -> R) -> Result<T, Error>
    where
        R: Future<Output = object_store::Result<T>>,
    {
        let before = self.credentials.generation();
        let mut answer = request().await;
        if answer.as_ref().is_err_and(keys_may_be_refused) {
            self.credentials.renew();
            if self.credentials.generation() != before {
                answer = request().await;
            }
        }
        answer.map_err(|error| self.explain(key, &error))
    }

    /// The length of an object.
    pub async fn length(&self, key: &str) -> Result<u64, Error> {
        let path = self.path(key);
        Ok(self.ask(key, || self.clients.bulk.head(&path)).await?.size)
    }

    /// Whether an object is there.
    pub async fn exists(&self, key: &str) -> Result<bool, Error> {
        match self.length(key).await {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// All objects whose keys begin with `prefix`, which ends with `/` (or is empty), by key.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ListedObject>, Error> {
        let path = self.path(prefix.trim_end_matches('/'));
        let list = || self.clients.bulk.list(Some(&path)).try_collect::<Vec<_>>();
        let listed = self.ask(prefix, list).await?;
        let mut objects: Vec<_> = listed
            .into_iter()
            .filter_map(|meta| {
                let modified = meta.last_modified.timestamp_millis();
                Some(ListedObject {
                    key: self.key(&meta.location)?,
                    bytes: meta.size,
                    modified_unix_ms: u64::try_from(modified).unwrap_or(0),
                })
            })
            .collect();
        objects.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(objects)
    }

    /// Deletes an object; one that is not there is no error.
    pub async fn delete(&self, key: &str) -> Result<(), Error> {
        let path = self.path(key);
        match self.ask(key, || self.clients.bulk.delete(&path)).await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Deletes objects in any order, several at a time, up to the first that cannot be.
    pub async fn delete_all(&self, keys: &[String]) -> Result<(), Error> {
        let deleting = futures::stream::iter(keys).map(|key| self.delete(key));
        deleting.buffer_unordered(PARALLEL_DELETES).try_collect().await
    }

    /// Whether anything lies under the store's URL.
    pub async fn any(&self) -> Result<bool, Error> {
        let path = self.path("");
        let first = async || self.clients.bulk.list(Some(&path)).try_next().await;
        Ok(self.ask("", first).await?.is_some())
    }

    fn path(&self, key: &str) -> object_store::path::Path {
        let parts = key.split('/').filter(|part| !part.is_empty());
        parts.fold(self.prefix.clone(), |path, part| path.join(part))
    }

    fn key(&self, location: &object_store::path::Path) -> Option<String> {
        let parts: Vec<_> = location.prefix_match(&self.prefix)?.collect();
        let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
        Some(parts.join("/"))
    }
}
