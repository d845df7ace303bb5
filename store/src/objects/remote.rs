//! Clients of a remote store: for each purpose one, with time-outs and retries of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use url::Url;

use super::credentials::Credentials;
use super::errors::chain;
use super::traffic::Traffic;
use crate::Error;

/// What a request is for. All time-outs and all retries below the fetch path's own are in [`Purpose::patience`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A range that somebody waits for.
    Demand,
    /// A range that is fetched ahead.
    Prefetch,
    /// Records, listings, deletions, whole objects.
    Bulk,
    /// PUT, of up to 4 GiB in principle and 32 MiB as packs are made.
    Upload,
}

/// How long a client waits.
struct Patience {
    /// Without any byte of an answer. For an upload this includes sending the body.
    idle: Duration,
    /// For the whole request, body included.
    total: Duration,
    /// Tries after the first, made by the client itself.
    retries: usize,
}

/// A connection that is not made by then is given up: a second SYN is sent after 1 s.
const CONNECT: Duration = Duration::from_secs(2);
/// An idle connection is closed by us before a store or a load balancer closes it (60 s and more).
const POOL_IDLE: Duration = Duration::from_secs(50);
/// Waits between a client's own tries grow from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

impl Purpose {
    fn patience(self) -> Patience {
        let seconds = Duration::from_secs;
        match self {
            // Retries are the fetch path's: it knows the deadline of who waits. A body that moves
            // is not thrown away after 2 s, or a slow line would never bring one.
            Self::Demand => Patience { idle: seconds(2), total: seconds(10), retries: 0 },
            // Demand may join such a request, so it does not hang much longer. 12 MiB in 60 s are
            // 140 kB/s.
            Self::Prefetch => Patience { idle: seconds(3), total: seconds(60), retries: 0 },
            Self::Bulk => Patience { idle: seconds(10), total: seconds(300), retries: 4 },
            // 32 MiB in 300 s are 110 kB/s.
            Self::Upload => Patience { idle: seconds(300), total: seconds(300), retries: 4 },
        }
    }
}

/// The clients of one store.
#[derive(Clone)]
pub(super) struct Clients {
    pub(super) demand: Arc<dyn ObjectStore>,
    pub(super) prefetch: Arc<dyn ObjectStore>,
    pub(super) bulk: Arc<dyn ObjectStore>,
    pub(super) upload: Arc<dyn ObjectStore>,
}

impl Clients {
    /// One for everything: a local store, or a test's own.
    pub(super) fn same(store: Arc<dyn ObjectStore>) -> Self {
        Self { demand: store.clone(), prefetch: store.clone(), bulk: store.clone(), upload: store }
    }

    /// Nothing is asked yet.
    pub(super) fn remote(
        url: &str,
        parsed: &Url,
        credentials: &Credentials,
        traffic: &Arc<Traffic>,
    ) -> Result<Self, Error> {
        let client = |purpose| connect(url, parsed, purpose, credentials, traffic);
        Ok(Self {
            demand: client(Purpose::Demand)?,
            prefetch: client(Purpose::Prefetch)?,
            bulk: client(Purpose::Bulk)?,
            upload: client(Purpose::Upload)?,
        })
    }
}

/// Variables that may name an endpoint without TLS.
const ENDPOINTS: [&str; 6] = [
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "AWS_ENDPOINT_URL_S3",
    "AZURE_ENDPOINT",
    "AZURE_STORAGE_ENDPOINT",
    "GOOGLE_BASE_URL",
];

fn connect(
    url: &str,
    parsed: &Url,
    purpose: Purpose,
    credentials: &Credentials,
    traffic: &Arc<Traffic>,
) -> Result<Arc<dyn ObjectStore>, Error> {
    let patience = purpose.patience();
    let plain = |variable| std::env::var(variable).is_ok_and(|at| at.starts_with("http:"));
    let options = ClientOptions::new()
        .with_connect_timeout(CONNECT)
        .with_read_timeout(patience.idle)
        .with_timeout(patience.total)
        .with_allow_http(ENDPOINTS.into_iter().any(plain))
        .with_pool_idle_timeout(POOL_IDLE);
    let retry = RetryConfig {
        backoff: BackoffConfig { init_backoff: BACKOFF.0, max_backoff: BACKOFF.1, base: 2.0 },
        max_retries: patience.retries,
        retry_timeout: patience.total,
    };
    let watched = Watched { purpose, traffic: traffic.clone() };
    let invalid = |error: object_store::Error| Error::invalid(url, chain(&error));
    // The builders share no trait.
    macro_rules! build {
        ($builder:expr) => {
            Arc::new(
                $builder
                    .with_url(url)
                    .with_client_options(options)
                    .with_retry(retry)
                    .with_http_connector(watched)
                    .build()
                    .map_err(invalid)?,
            )
        };
    }
    Ok(match parsed.scheme() {
        "s3" | "s3a" => {
            let builder = object_store::aws::AmazonS3Builder::from_env();
            build!(match credentials.shared_file() {
                Some(file) => builder.with_credentials(file),
                None => builder,
            })
        }
        "gs" => build!(object_store::gcp::GoogleCloudStorageBuilder::from_env()),
        "az" | "azure" | "abfs" | "abfss" => {
            build!(object_store::azure::MicrosoftAzureBuilder::from_env())
        }
        other => {
            let text = format!("unknown scheme {other:?}: use file://, s3://, gs:// or az://");
            return Err(Error::invalid(url, text));
        }
    })
}

/// Connects as usual, and has every answer looked at, also those that the client itself retries.
#[derive(Clone, Debug)]
struct Watched {
    purpose: Purpose,
    traffic: Arc<Traffic>,
}

impl HttpConnector for Watched {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        Ok(HttpClient::new(WatchedClient { client, watched: self.clone() }))
    }
}

#[derive(Debug)]
struct WatchedClient {
    client: HttpClient,
    watched: Watched,
}

#[async_trait]
impl HttpService for WatchedClient {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let began = Instant::now();
        let answer = self.client.execute(request).await?;
        let Watched { purpose, traffic } = &self.watched;
        traffic.answered(*purpose, answer.status().as_u16(), began);
        Ok(answer)
    }
}
