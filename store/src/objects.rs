//! The objects of a store, wherever it is: create-only PUT, GET, ranged GET, LIST, DELETE.
//!
//! Retry and time-outs of single requests live here and nowhere else. A local store is written
//! through `object_store` (which stages, syncs and links), but read directly where it matters.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, RetryConfig,
};
use url::Url;

use crate::{Error, ErrorKind};

/// Requests that somebody waits for: short tries, and the fetch path's own deadline around them.
const DEMAND_TRY: Duration = Duration::from_secs(2);
/// Everything else: uploads of a pack, listings.
const BULK_TRY: Duration = Duration::from_secs(60);

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

/// Access to the objects of one store. Clones share connections.
#[derive(Clone)]
pub struct Objects {
    url: String,
    bulk: Arc<dyn ObjectStore>,
    demand: Arc<dyn ObjectStore>,
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
        Ok(Self {
            url: url.to_owned(),
            bulk: connect_remote(url, &parsed, BULK_TRY)?,
            demand: connect_remote(url, &parsed, DEMAND_TRY)?,
            prefix,
            local_root: None,
        })
    }

    /// A store of a test's own.
    #[cfg(test)]
    pub(crate) fn over(store: Arc<dyn ObjectStore>) -> Self {
        let prefix = object_store::path::Path::default();
        let url = "s3://simulation".to_owned();
        Self { url, bulk: store.clone(), demand: store, prefix, local_root: None }
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
        let system: Arc<dyn ObjectStore> = Arc::new(system);
        Ok(Self {
            url: url.to_owned(),
            bulk: system.clone(),
            demand: system,
            prefix: object_store::path::Path::default(),
            local_root: Some(root),
        })
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
        let payload: PutPayload = chunks.iter().cloned().collect();
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let error = match self.bulk.put_opts(&self.path(key), payload, options).await {
            Ok(_) => return Ok(()),
            Err(error) => self.explain(key, &error),
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

    /// Writes an object whatever is there: leases and pins are renewed so, nothing else.
    pub async fn overwrite(&self, key: &str, bytes: Vec<u8>) -> Result<(), Error> {
        let put = self.bulk.put(&self.path(key), PutPayload::from(bytes)).await;
        put.map(|_| ()).map_err(|error| self.explain(key, &error))
    }

    /// A whole object of at most `limit` bytes.
    pub async fn get(&self, key: &str, limit: u64) -> Result<Bytes, Error> {
        let options = GetOptions::default();
        let result = self.bulk.get_opts(&self.path(key), options).await;
        let result = result.map_err(|error| self.explain(key, &error))?;
        if result.meta.size > limit {
            let text = format!("is {} bytes long, over the limit of {limit}", result.meta.size);
            return Err(Error::damaged(key, text));
        }
        result.bytes().await.map_err(|error| self.explain(key, &error))
    }

    /// A part of an object; shorter if the object ends before. `patient`: nobody waits for it.
    pub async fn get_range(
        &self,
        key: &str,
        range: Range<u64>,
        patient: bool,
    ) -> Result<Bytes, Error> {
        let client = if patient { &self.bulk } else { &self.demand };
        let got = client.get_range(&self.path(key), range).await;
        got.map_err(|error| self.explain(key, &error))
    }

    /// The length of an object.
    pub async fn length(&self, key: &str) -> Result<u64, Error> {
        let head = self.bulk.head(&self.path(key)).await;
        head.map(|meta| meta.size).map_err(|error| self.explain(key, &error))
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
        let listed = self.bulk.list(Some(&path)).try_collect::<Vec<_>>().await;
        let listed = listed.map_err(|error| self.explain(prefix, &error))?;
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
        match self.bulk.delete(&self.path(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.explain(key, &error)),
        }
    }

    /// Deletes objects in any order, several at a time, up to the first that cannot be.
    pub async fn delete_all(&self, keys: &[String]) -> Result<(), Error> {
        let deleting = futures::stream::iter(keys).map(|key| self.delete(key));
        deleting.buffer_unordered(PARALLEL_DELETES).try_collect().await
    }

    /// Whether anything lies under the store's URL.
    pub async fn any(&self) -> Result<bool, Error> {
        let first = self.bulk.list(Some(&self.path(""))).try_next().await;
        first.map(|object| object.is_some()).map_err(|error| self.explain("", &error))
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

    fn explain(&self, key: &str, error: &object_store::Error) -> Error {
        use object_store::Error as Source;
        let kind = match error {
            Source::NotFound { .. } => ErrorKind::NotFound,
            Source::AlreadyExists { .. } | Source::Precondition { .. } => ErrorKind::Exists,
            Source::PermissionDenied { .. } | Source::Unauthenticated { .. } => ErrorKind::Refused,
            Source::NotSupported { .. } | Source::NotImplemented { .. } => ErrorKind::Refused,
            _ if self.local_root.is_some() => ErrorKind::Local,
            _ => ErrorKind::Unreachable,
        };
        let object = format!("{}/{key}", self.url.trim_end_matches('/'));
        match kind {
            ErrorKind::NotFound => Error::not_found(object, "is not there"),
            ErrorKind::Exists => Error::exists(object, "is there already"),
            _ => Error::new(kind, object, chain(error)),
        }
    }
}

fn connect_remote(
    url: &str,
    parsed: &Url,
    per_try: Duration,
) -> Result<Arc<dyn ObjectStore>, Error> {
    let invalid = |error: object_store::Error| Error::invalid(url, chain(&error));
    let options = ClientOptions::new()
        .with_connect_timeout(Duration::from_secs(2))
        .with_read_timeout(per_try)
        .with_timeout(per_try)
        .with_allow_http(
            std::env::var("AWS_ENDPOINT_URL").is_ok_and(|at| at.starts_with("http:"))
                || std::env::var("AWS_ENDPOINT").is_ok_and(|at| at.starts_with("http:"))
                || std::env::var("AZURE_ENDPOINT").is_ok_and(|at| at.starts_with("http:")),
        )
        .with_pool_idle_timeout(Duration::from_secs(60));
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_secs(2),
            base: 2.0,
        },
        max_retries: 4,
        retry_timeout: per_try * 5,
    };
    Ok(match parsed.scheme() {
        "s3" | "s3a" => Arc::new(
            object_store::aws::AmazonS3Builder::from_env()
                .with_url(url)
                .with_client_options(options)
                .with_retry(retry)
                .build()
                .map_err(invalid)?,
        ),
        "gs" => Arc::new(
            object_store::gcp::GoogleCloudStorageBuilder::from_env()
                .with_url(url)
                .with_client_options(options)
                .with_retry(retry)
                .build()
                .map_err(invalid)?,
        ),
        "az" | "azure" | "abfs" | "abfss" => Arc::new(
            object_store::azure::MicrosoftAzureBuilder::from_env()
                .with_url(url)
                .with_client_options(options)
                .with_retry(retry)
                .build()
                .map_err(invalid)?,
        ),
        other => {
            let text = format!("unknown scheme {other:?}: use file://, s3://, gs:// or az://");
            return Err(Error::invalid(url, text));
        }
    })
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.contains(&next_text) {
            text = format!("{text}: {next_text}");
        }
        cause = next.source();
    }
    text.replace('\n', " ")
}
