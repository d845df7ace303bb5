//! The HTTP API on the Unix socket.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use reap_store::{Error, ErrorKind};
use serde::Deserialize;
use serde_json::{Value, json};

use super::metrics;
use super::prepared::{Daemon, PrepareMode, Use, Wanted};

/// Longest request body.
const MAX_BODY_BYTES: usize = 64 << 10;

/// All routes. `docs/OPERATIONS.md` describes them.
pub(super) fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/snapshots", get(list))
        .route("/snapshots/{name}", put(prepare).delete(release))
        .route("/cache", get(cache))
        .route("/metrics", get(metrics))
        .route("/restores", get(restores))
        .route("/store", get(store))
        .route("/restores/{id}/settle", put(settle))
        .route("/restores/{id}/timeline", get(timeline))
        .fallback(no_route)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(daemon)
}

/// The metrics alone, for those who may not have the rest.
pub(super) fn metrics_router(daemon: Arc<Daemon>) -> Router {
    Router::new().route("/metrics", get(metrics)).fallback(no_route).with_state(daemon)
}

async fn no_route() -> Failure {
    Failure(Error::not_found("the path", "there is no such route"))
}

/// The body of a prepare call; without one the mode is `auto`, and the profile the usual one.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Prepare {
    #[serde(default)]
    mode: PrepareMode,
    /// Bring all of it into the node's cache, and keep it there while it is prepared.
    #[serde(default)]
    warm: bool,
    /// Write its memory to this node's disk once more, as it is, for those who read all of it through the mount.
    #[serde(default)]
    plain_copy: bool,
    #[serde(default)]
    profile: String,
}

/// The body of a release call.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Release {
    #[serde(default)]
    profile: String,
}

/// A body, or its default where there is none.
fn body<T: Default + serde::de::DeserializeOwned>(text: &str, remedy: &str) -> Result<T, Failure> {
    match text.trim() {
        "" => Ok(T::default()),
        text => serde_json::from_str(text).map_err(|error| {
            Failure(Error::invalid("the body", format!("{error}: send {remedy}")))
        }),
    }
}

/// A snapshot by name, in one of its uses.
fn use_of(name: &str, profile: &str) -> Result<Use, Failure> {
    Ok((name.parse().map_err(Failure)?, profile.parse().map_err(Failure)?))
}

/// An error as its status and `{"error": line}`.
struct Failure(Error);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.0.kind() {
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::Exists | ErrorKind::Refused => StatusCode::CONFLICT,
            ErrorKind::Damaged => StatusCode::UNPROCESSABLE_ENTITY,
            ErrorKind::Unreachable => StatusCode::BAD_GATEWAY,
            ErrorKind::Local => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(json!({ "error": self.0.to_string() }))).into_response()
    }
}

/// The kind of error that a status stands for.
pub(super) fn kind_of(status: StatusCode) -> ErrorKind {
    match status {
        StatusCode::BAD_REQUEST => ErrorKind::Invalid,
        StatusCode::NOT_FOUND => ErrorKind::NotFound,
        StatusCode::CONFLICT => ErrorKind::Refused,
        StatusCode::UNPROCESSABLE_ENTITY => ErrorKind::Damaged,
        StatusCode::BAD_GATEWAY => ErrorKind::Unreachable,
        _ => ErrorKind::Local,
    }
}

async fn list(State(daemon): State<Arc<Daemon>>) -> Json<Value> {
    Json(json!(daemon.snapshots()))
}

async fn metrics(State(daemon): State<Arc<Daemon>>) -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::text(daemon))
}

async fn restores(State(daemon): State<Arc<Daemon>>) -> Json<Value> {
    Json(json!(daemon.restores()))
}

async fn store(State(daemon): State<Arc<Daemon>>) -> Json<Value> {
    Json(daemon.store())
}

async fn cache(State(daemon): State<Arc<Daemon>>) -> Json<Value> {
    Json(json!({
        "memory_bytes": daemon.node.memory_cache_bytes(),
        "prefetch": daemon.node.prefetch_status(),
        "disk": daemon.node.cache_status(),
        "plain_copies": daemon.node.plain_copies_status(),
    }))
}

async fn prepare(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    text: String,
) -> Result<Json<Value>, Failure> {
    let remedy = r#"{"mode": "auto" | "record" | "prefetch" | "demand", "profile": text, "warm": true | false, "plain_copy": true | false}"#;
    let request: Prepare = body(&text, remedy)?;
    let key = use_of(&name, &request.profile)?;
    let Prepare { mode, warm, plain_copy, .. } = request;
    let wanted = Wanted { mode, warm, plain_copy };
    let description = daemon.prepare(key, wanted).await.map_err(Failure)?;
    Ok(Json(json!(description)))
}

async fn release(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    text: String,
) -> Result<Json<Value>, Failure> {
    let request: Release = body(&text, r#"{"profile": text}"#)?;
    let key = use_of(&name, &request.profile)?;
    match daemon.release(&key).await {
        true => Ok(Json(json!({ "released": name, "profile": request.profile }))),
        false => Err(Failure(Error::not_found(&name, "the snapshot is not prepared"))),
    }
}

async fn timeline(
    State(daemon): State<Arc<Daemon>>,
    Path(id): Path<u64>,
) -> Result<Json<Value>, Failure> {
    let found = daemon.timeline(id);
    let (restore, timeline) = found.ok_or_else(|| {
        Failure(Error::not_found(format!("restore {id}"), "there is no such restore"))
    })?;
    Ok(Json(json!({ "restore": restore, "events": timeline.events, "dropped": timeline.dropped })))
}

async fn settle(
    State(daemon): State<Arc<Daemon>>,
    Path(id): Path<u64>,
) -> Result<Json<Value>, Failure> {
    match daemon.server.settle(id) {
        true => Ok(Json(json!({ "settled": id }))),
        false => {
            let text = "there is no such restore, or it records nothing";
            Err(Failure(Error::not_found(format!("restore {id}"), text)))
        }
    }
}
