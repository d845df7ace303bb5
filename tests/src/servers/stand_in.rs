//! An S3 server in memory that does what no real one does on demand: answers late, is overloaded at a given
//! number of requests, hangs, goes away, and lets its keys expire.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, Response, StatusCode, header};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use super::BUCKET;

/// Longest object.
const MAX_OBJECT_BYTES: usize = 64 << 20;
/// Of all objects: nothing that is tested with this server goes by time.
const MODIFIED: (&str, &str) = ("Wed, 01 Jan 2025 00:00:00 GMT", "2025-01-01T00:00:00.000Z");

/// What the server does, changed while it runs.
#[derive(Debug, Default)]
pub struct Behaviour {
    /// Every request takes so many milliseconds.
    pub latency_ms: AtomicU64,
    /// Every so many ranged GETs one takes a second more; 0: none.
    pub stall_every: AtomicU64,
    /// Requests that are served at the same time; more are answered with 503. 0: any number.
    pub capacity: AtomicUsize,
    /// Requests are taken and never answered.
    pub hangs: AtomicBool,
    /// The only access key that is accepted; any, if empty.
    pub access_key: Mutex<String>,
    /// Requests that came with another key.
    pub refused: AtomicU64,
    /// Answers with 503.
    pub turned_away: AtomicU64,
    /// Requests that were served.
    pub served: AtomicU64,
    ranges: AtomicU64,
    in_flight: AtomicUsize,
    objects: Mutex<BTreeMap<String, axum::body::Bytes>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Behaviour {
    /// From now on only this key is accepted.
    pub fn accept_only(&self, access_key: &str) {
        access_key.clone_into(&mut lock(&self.access_key));
    }

    /// Forgets all objects whose keys contain this.
    pub fn lose(&self, part_of_key: &str) {
        lock(&self.objects).retain(|key, _| !key.contains(part_of_key));
    }
}

/// The server; it ends on drop.
pub struct StandIn {
    runtime: Runtime,
    address: SocketAddr,
    serving: Option<JoinHandle<()>>,
    /// What it does.
    pub behaviour: Arc<Behaviour>,
}

impl StandIn {
    /// Starts one with an empty bucket.
    pub fn start() -> Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut server = Self { runtime, address, serving: None, behaviour: Arc::default() };
        server.come_back()?;
        Ok(server)
    }

    /// Stops listening and breaks all connections.
    pub fn go_away(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
        }
    }

    /// Listens at the same address, with the same objects.
    pub fn come_back(&mut self) -> Result<()> {
        let address = self.address;
        let listener = self.runtime.block_on(async {
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(1024)
        })?;
        let behaviour = self.behaviour.clone();
        self.serving = Some(self.runtime.spawn(serve(listener, behaviour)));
        Ok(())
    }

    /// URL of a store in its bucket.
    pub fn url(&self) -> String {
        format!("s3://{BUCKET}/fleet")
    }

    /// What our programs need to find it, without keys.
    pub fn environment(&self) -> super::Environment {
        vec![
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
            ("AWS_METADATA_ENDPOINT", format!("http://{}", self.address)),
            ("AWS_REGION", "us-east-1".into()),
            // Deleting many at once is all that it does not know.
            ("AWS_DISABLE_BULK_DELETE", "true".into()),
            ("NO_PROXY", "127.0.0.1".into()),
        ]
    }

    /// The same with keys that never change.
    pub fn environment_with_keys(&self) -> super::Environment {
        let keys = [("AWS_ACCESS_KEY_ID", "KEY"), ("AWS_SECRET_ACCESS_KEY", "secret")];
        let keys = keys.map(|(name, value)| (name, value.to_owned()));
        self.environment().into_iter().chain(keys).collect()
    }
}

/// Connections are tasks of this one, so that they end with it.
async fn serve(listener: tokio::net::TcpListener, behaviour: Arc<Behaviour>) {
    let mut connections = tokio::task::JoinSet::new();
    let router = Router::new().fallback(answer).with_state(behaviour);
    while let Ok((stream, _)) = listener.accept().await {
        // Small answers otherwise wait for an acknowledgement on loopback.
        let _unheeded = stream.set_nodelay(true);
        let service = hyper_util::service::TowerToHyperService::new(router.clone());
        let io = hyper_util::rt::TokioIo::new(stream);
        connections.spawn(async move {
            let serving = hyper::server::conn::http1::Builder::new().serve_connection(io, service);
            // The client went away.
            let _broken = serving.await;
        });
    }
}

/// One request in flight.
struct InFlight<'a>(&'a Behaviour);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn answer(State(behaviour): State<Arc<Behaviour>>, request: Request) -> Response<Body> {
    respond(&behaviour, request).await.unwrap_or_else(|error| {
        failure(StatusCode::BAD_REQUEST, "InvalidRequest", &format!("{error:#}"))
    })
}

async fn respond(behaviour: &Behaviour, request: Request) -> Result<Response<Body>> {
    if behaviour.hangs.load(Ordering::SeqCst) {
        std::future::pending::<()>().await;
    }
    let (parts, body) = request.into_parts();
    if let Some(path) = parts.uri.path().strip_prefix("/latest/") {
        return Ok(metadata(path, &lock(&behaviour.access_key)));
    }
    let in_flight = behaviour.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
    let _in_flight = InFlight(behaviour);
    let capacity = behaviour.capacity.load(Ordering::SeqCst);
    if capacity > 0 && in_flight > capacity {
        behaviour.turned_away.fetch_add(1, Ordering::SeqCst);
        return Ok(failure(StatusCode::SERVICE_UNAVAILABLE, "SlowDown", "reduce your rate"));
    }
    if !is_accepted(&parts.headers, &lock(&behaviour.access_key)) {
        behaviour.refused.fetch_add(1, Ordering::SeqCst);
        return Ok(failure(StatusCode::BAD_REQUEST, "ExpiredToken", "the key has expired"));
    }
    let bytes = to_bytes(body, MAX_OBJECT_BYTES).await?;
    let ranged = parts.headers.contains_key(header::RANGE);
    let mut wait = Duration::from_millis(behaviour.latency_ms.load(Ordering::SeqCst));
    let every = behaviour.stall_every.load(Ordering::SeqCst);
    if ranged && every > 0 && behaviour.ranges.fetch_add(1, Ordering::SeqCst) % every == every - 1 {
        wait += Duration::from_secs(1);
    }
    tokio::time::sleep(wait).await;
    behaviour.served.fetch_add(1, Ordering::SeqCst);
    let key = parts.uri.path().trim_start_matches('/').trim_start_matches(BUCKET);
    let key = key.trim_start_matches('/').to_owned();
    let mut objects = lock(&behaviour.objects);
    match parts.method {
        Method::GET if key.is_empty() => list(&objects, parts.uri.query().unwrap_or_default()),
        Method::GET | Method::HEAD => match objects.get(&key) {
            Some(object) => get(object, &parts.headers),
            None => Ok(failure(StatusCode::NOT_FOUND, "NoSuchKey", &key)),
        },
        Method::PUT => {
            let create = parts.headers.contains_key(header::IF_NONE_MATCH);
            if create && objects.contains_key(&key) {
                let status = StatusCode::PRECONDITION_FAILED;
                return Ok(failure(status, "PreconditionFailed", &key));
            }
            objects.insert(key, bytes);
            Ok(Response::builder().header(header::ETAG, "\"1\"").body(Body::empty())?)
        }
        Method::DELETE => {
            objects.remove(&key);
            Ok(Response::builder().status(StatusCode::NO_CONTENT).body(Body::empty())?)
        }
        _ => Ok(failure(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", &key)),
    }
}

fn is_accepted(headers: &HeaderMap, access_key: &str) -> bool {
    let signed = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let key = signed.and_then(|value| value.split("Credential=").nth(1)?.split('/').next());
    access_key.is_empty() || key == Some(access_key)
}

fn failure(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let text = format!("<Error><Code>{code}</Code><Message>{message}</Message></Error>");
    let mut answer = Response::new(Body::from(text));
    *answer.status_mut() = status;
    answer
}

fn get(object: &axum::body::Bytes, headers: &HeaderMap) -> Result<Response<Body>> {
    let answer =
        Response::builder().header(header::ETAG, "\"1\"").header(header::LAST_MODIFIED, MODIFIED.0);
    let Some(range) = headers.get(header::RANGE) else {
        return Ok(answer.body(Body::from(object.clone()))?);
    };
    let range = range.to_str()?.strip_prefix("bytes=").context("bytes")?;
    let (first, last) = range.split_once('-').context("a range")?;
    let (first, last): (usize, usize) = (first.parse()?, last.parse()?);
    let end = (last + 1).min(object.len());
    if first >= end {
        return Ok(failure(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange", range));
    }
    let content = format!("bytes {first}-{}/{}", end - 1, object.len());
    let answer = answer.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, content);
    Ok(answer.body(Body::from(object.slice(first..end)))?)
}

/// The whole listing in one page.
fn list(objects: &BTreeMap<String, axum::body::Bytes>, query: &str) -> Result<Response<Body>> {
    let prefix = query.split('&').find_map(|pair| pair.strip_prefix("prefix="));
    let prefix = prefix.unwrap_or_default().replace("%2F", "/").replace("%3A", ":");
    let mut text = format!(
        "<ListBucketResult><Name>{BUCKET}</Name><Prefix>{prefix}</Prefix><IsTruncated>false</IsTruncated>"
    );
    for (key, object) in objects.iter().filter(|(key, _)| key.starts_with(&prefix)) {
        write!(
            text,
            "<Contents><Key>{key}</Key><LastModified>{}</LastModified><ETag>\"1\"</ETag><Size>{}</Size>\
             <StorageClass>STANDARD</StorageClass></Contents>",
            MODIFIED.1,
            object.len()
        )?;
    }
    text.push_str("</ListBucketResult>");
    Ok(Response::new(Body::from(text)))
}

/// The service that gives a machine its role's keys: those that are accepted, for so short that they are
/// asked for again all the time.
fn metadata(path: &str, access_key: &str) -> Response<Body> {
    let text = match path {
        "api/token" => "token".to_owned(),
        "meta-data/iam/security-credentials/" => "role".to_owned(),
        _ => format!(
            r#"{{"AccessKeyId": "{access_key}", "SecretAccessKey": "secret", "Token": "token", "Expiration": "2025-01-01T00:00:00Z"}}"#
        ),
    };
    Response::new(Body::from(text))
}
