//! A request to a running daemon, over its Unix socket.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use reap_store::Error;
use serde_json::Value;

/// Longest answer that is read: some 10,000 restores.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Sends a request; answers with the body, which is JSON.
pub(super) async fn request(
    run_dir: &Path,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> Result<Value> {
    let text = text(run_dir, method, path, body).await?;
    match text.is_empty() {
        true => Ok(Value::Null),
        false => serde_json::from_str(&text).context("the daemon's answer is not JSON"),
    }
}

/// Sends a request; answers with the body. An answer that is not a success is an error with the
/// daemon's own line.
pub(super) async fn text(
    run_dir: &Path,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> Result<String> {
    let socket = run_dir.join("api.sock");
    let stream = tokio::net::UnixStream::connect(&socket).await.map_err(|error| {
        let text = format!(
            "no daemon answers here ({error}): is 'reapd run' running with this --run-dir?"
        );
        Error::not_found(socket.display(), text)
    })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let body = body.map(|body| body.to_string()).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "reapd")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES);
    let bytes = body.collect().await.map_err(|error| anyhow!("the daemon's answer: {error}"))?;
    connection.abort();
    let text = String::from_utf8(bytes.to_bytes().into()).context("the daemon's answer")?;
    if status.is_success() {
        return Ok(text);
    }
    let answer: Value = serde_json::from_str(&text).unwrap_or_default();
    let message = answer["error"].as_str().unwrap_or("the daemon refused").to_owned();
    let kind = super::api::kind_of(status);
    Err(Error::new(kind, "reapd", message).into())
}
