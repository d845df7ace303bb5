//! Connections: each request is read, met by its fate, forwarded and answered.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::CONTENT_LENGTH;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, http};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::Shared;
use super::body::{AnyBody, Broken, Lane, Treated, Treatment, whole};
use super::log::Entry;
use super::plan::{Asked, Fate, Fault, Operation, Shape};

/// A client's connection and the one to the server that belongs to it.
struct Connection {
    shared: Arc<Shared>,
    number: u64,
    /// The client's socket once more, for resets.
    socket: Option<OwnedFd>,
    /// A client asks one thing at a time.
    server: tokio::sync::Mutex<Option<SendRequest<AnyBody>>>,
    up: Arc<Lane>,
    down: Arc<Lane>,
}

/// Serves one client until it or the plan ends the connection.
pub(super) async fn serve(shared: Arc<Shared>, stream: TcpStream, number: u64) {
    // A socket that is gone is found gone when it is read.
    let _gone = stream.set_nodelay(true);
    let socket = rustix::io::dup(&stream).ok();
    let connection = Arc::new(Connection {
        shared,
        number,
        socket,
        server: tokio::sync::Mutex::default(),
        up: Arc::new(Lane::new()),
        down: Arc::new(Lane::new()),
    });
    let answer = service_fn(|request| {
        // In a task of its own: what was forwarded takes effect, whether or not the client waits.
        let task = tokio::spawn(answer(connection.clone(), request));
        async move { task.await.unwrap_or(Err(Broken)) }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .preserve_header_case(true)
        .serve_connection(TokioIo::new(stream), answer);
    // Ends with an error wherever a fault ended it.
    let _outcome = serving.await;
}

async fn answer(
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Response<AnyBody>, Broken> {
    let (head, body) = request.into_parts();
    let mut body = Some(body);
    // Only the body of a DELETE of several says which.
    let several = match (&head.method, head.uri.query()) {
        (&Method::POST, Some(query)) if query.contains("delete") => {
            let read = body.take().map(BodyExt::collect);
            let read = match read {
                Some(read) => read.await.map_err(|_| Broken)?,
                None => return Err(Broken),
            };
            Some(read.to_bytes())
        }
        _ => None,
    };
    let asked = asked(&head, several.as_ref());
    let shared = &connection.shared;
    let number = shared.log.begin(|number, began_us| Entry {
        number,
        connection: connection.number,
        operation: asked.operation,
        key: asked.key.clone(),
        range: range(&head),
        began_us,
        answered_us: None,
        ended_us: None,
        status: None,
        received_bytes: several.as_ref().map_or(0, |body| body.len() as u64),
        sent_bytes: 0,
        fault: None,
        is_duplicate: false,
    });
    let (fate, shape) = {
        let mut plan = shared.plan.lock();
        (plan.decide(&asked, number), plan.shape)
    };
    let received = Arc::new(Mutex::new(Instant::now()));
    let exchange = Exchange { connection: connection.clone(), number, fate, shape, received };
    let body = match (several, body) {
        (Some(bytes), _) => whole(bytes),
        (None, Some(body)) => exchange.watched(body),
        (None, None) => return Err(Broken),
    };
    let outcome = exchange.carry_out(head, body).await;
    if outcome.is_err() {
        shared.log.end(number);
    }
    outcome
}

/// One request and its answer.
struct Exchange {
    connection: Arc<Connection>,
    number: u64,
    fate: Fate,
    shape: Shape,
    /// When its last byte was here.
    received: Arc<Mutex<Instant>>,
}

impl Exchange {
    async fn carry_out(
        &self,
        head: http::request::Parts,
        mut body: AnyBody,
    ) -> Result<Response<AnyBody>, Broken> {
        match self.fate.fault {
            Some(Fault::Refuse(status)) => {
                // Read first, so that the answer meets a client that listens.
                while let Some(frame) = body.frame().await {
                    frame?;
                }
                self.wait_for_answer().await;
                return Ok(self.refusal(status));
            }
            Some(Fault::Reset) => return self.reset(),
            Some(Fault::Hang(long)) => {
                self.met();
                tokio::time::sleep(long).await;
                return Err(Broken);
            }
            Some(Fault::Duplicate(after)) => {
                let bytes = body.collect().await?.to_bytes();
                self.duplicate(after, &head, &bytes);
                body = whole(bytes);
            }
            _ => {}
        }
        let answer = self.forward(head, body).await?;
        match self.fate.fault {
            Some(Fault::LoseAnswer) => {
                self.met();
                Err(Broken)
            }
            Some(Fault::FailAnswer(status)) => {
                self.wait_for_answer().await;
                Ok(self.refusal(status))
            }
            Some(Fault::HangAnswer(long)) => {
                self.met();
                tokio::time::sleep(long).await;
                Err(Broken)
            }
            _ => {
                self.wait_for_answer().await;
                Ok(self.treat(answer))
            }
        }
    }

    /// Waits until the answer may begin, to some 0.1 ms: a timer of tokio's fires one or two milliseconds late, which in
    /// three rounds of 30 is more than what is to be measured. The kernel wakes a sleeping thread on time.
    async fn wait_for_answer(&self) {
        let due = *self.received.lock() + self.fate.delay;
        let rest = due.saturating_duration_since(Instant::now());
        if !rest.is_zero() {
            // It fails where the proxy ends.
            tokio::task::spawn_blocking(move || std::thread::sleep(rest)).await.unwrap_or_default();
        }
    }

    /// Notes that the fault happened.
    fn met(&self) {
        let name = self.fate.fault.map(|fault| fault.name());
        self.connection.shared.log.change(self.number, |entry| entry.fault = name);
    }

    fn reset<T>(&self) -> Result<T, Broken> {
        self.met();
        if let Some(socket) = &self.connection.socket {
            let linger = Some(std::time::Duration::ZERO);
            // Without it the connection ends in the usual way, which is a fault as well.
            let _refused = rustix::net::sockopt::set_socket_linger(socket, linger);
        }
        Err(Broken)
    }

    fn refusal(&self, status: u16) -> Response<AnyBody> {
        self.met();
        let code = if status == 503 { "SlowDown" } else { "InternalError" };
        let text = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>The test's proxy says so.</Message></Error>"
        );
        let mut answer = Response::new(self.watched_answer(whole(text.into()), None, None));
        *answer.status_mut() = StatusCode::from_u16(status).unwrap_or_default();
        self.connection.shared.log.answered(self.number, status);
        answer
    }

    /// The client's body, paced and counted.
    fn watched(&self, body: Incoming) -> AnyBody {
        let (shared, number) = (self.connection.shared.clone(), self.number);
        let received = self.received.clone();
        let treatment = Treatment {
            lane: self.connection.up.clone(),
            bytes_per_second: self.shape.bytes_per_second,
            cut_at: None,
            flip_at: None,
            watch: Box::new(move |piece| {
                let Some(piece) = piece else { return };
                *received.lock() = Instant::now();
                let bytes = piece.len() as u64;
                shared.log.change(number, |entry| entry.received_bytes += bytes);
            }),
        };
        Treated::new(body, treatment).boxed_unsync()
    }

    fn watched_answer<B>(&self, body: B, cut_at: Option<u64>, flip_at: Option<u64>) -> AnyBody
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
    {
        let (shared, number) = (self.connection.shared.clone(), self.number);
        let treatment = Treatment {
            lane: self.connection.down.clone(),
            bytes_per_second: self.shape.bytes_per_second,
            cut_at,
            flip_at,
            watch: Box::new(move |piece| match piece {
                Some(piece) => {
                    let bytes = piece.len() as u64;
                    shared.log.change(number, |entry| entry.sent_bytes += bytes);
                }
                None => shared.log.end(number),
            }),
        };
        Treated::new(body, treatment).boxed_unsync()
    }

    /// The server's answer, on its way to the client.
    fn treat(&self, answer: Response<Incoming>) -> Response<AnyBody> {
        let (mut head, body) = answer.into_parts();
        head.version = hyper::Version::HTTP_11;
        self.connection.shared.log.answered(self.number, head.status.as_u16());
        let length = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        let length = length.and_then(|length| length.parse::<u64>().ok());
        let length = length.filter(|length| *length > 0 && head.status.is_success());
        let place = length.map(|length| (length as f64 * self.fate.place) as u64);
        let (cut_at, flip_at) = match self.fate.fault {
            Some(Fault::Truncate) => (place, None),
            Some(Fault::Flip) => (None, place),
            _ => (None, None),
        };
        if cut_at.or(flip_at).is_some() {
            self.met();
        }
        Response::from_parts(head, self.watched_answer(body, cut_at, flip_at))
    }

    async fn forward(
        &self,
        head: http::request::Parts,
        body: AnyBody,
    ) -> Result<Response<Incoming>, Broken> {
        let request = Request::from_parts(head, body);
        let mut kept = self.connection.server.lock().await;
        let mut ready = None;
        if let Some(mut sender) = kept.take()
            && sender.ready().await.is_ok()
        {
            ready = Some(sender);
        }
        let mut sender = match ready {
            Some(sender) => sender,
            None => connect(&self.connection.shared).await?,
        };
        let answer = sender.send_request(request).await.map_err(|_| Broken)?;
        *kept = Some(sender);
        Ok(answer)
    }

    /// Sends the request once more, later, over a connection of its own.
    fn duplicate(&self, after: std::time::Duration, head: &http::request::Parts, body: &Bytes) {
        self.met();
        let (shared, number) = (self.connection.shared.clone(), self.number);
        let mut request = Request::new(whole(body.clone()));
        *request.method_mut() = head.method.clone();
        *request.uri_mut() = head.uri.clone();
        *request.headers_mut() = head.headers.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let Some(first) = shared.log.find(number) else { return };
            let own = shared.log.begin(|number, began_us| Entry {
                number,
                began_us,
                answered_us: None,
                ended_us: None,
                status: None,
                is_duplicate: true,
                ..first
            });
            let sent = match connect(&shared).await {
                Ok(mut sender) => sender.send_request(request).await.map_err(|_| Broken),
                Err(error) => Err(error),
            };
            if let Ok(answer) = sent {
                shared.log.answered(own, answer.status().as_u16());
            }
            shared.log.end(own);
        });
    }
}

async fn connect(shared: &Shared) -> Result<SendRequest<AnyBody>, Broken> {
    let stream = TcpStream::connect(shared.server).await.map_err(|_| Broken)?;
    stream.set_nodelay(true).map_err(|_| Broken)?;
    let handshake = hyper::client::conn::http1::Builder::new()
        .preserve_header_case(true)
        .handshake(TokioIo::new(stream))
        .await;
    let (sender, connection) = handshake.map_err(|_| Broken)?;
    tokio::spawn(connection);
    Ok(sender)
}

/// What the head of a request asks for.
fn asked(head: &http::request::Parts, several: Option<&Bytes>) -> Asked {
    let path = decoded(head.uri.path().trim_matches('/'));
    let query = head.uri.query().unwrap_or_default();
    let parameter = |name: &str| {
        let mut values = query.split('&').filter_map(|pair| pair.split_once('='));
        values.find(|(key, _)| *key == name).map(|(_, value)| decoded(value))
    };
    let lists = parameter("list-type").is_some() || parameter("comp").as_deref() == Some("list");
    if let Some(body) = several {
        let text = String::from_utf8_lossy(body);
        let keys = text.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
        let key = keys.map(|key| format!("{path}/{key}")).collect::<Vec<_>>().join(" ");
        return Asked { operation: Operation::Delete, key };
    }
    let operation = match head.method {
        Method::GET if lists => Operation::List,
        Method::GET => Operation::Get,
        Method::HEAD => Operation::Head,
        Method::PUT => Operation::Put,
        Method::DELETE => Operation::Delete,
        _ => Operation::Other,
    };
    match (operation, parameter("prefix")) {
        (Operation::List, Some(prefix)) => Asked { operation, key: format!("{path}/{prefix}") },
        _ => Asked { operation, key: path },
    }
}

/// With `%XX` as the bytes that they stand for.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| *first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn range(head: &http::request::Parts) -> Option<(u64, u64)> {
    let text = head.headers.get(http::header::RANGE)?.to_str().ok()?;
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}
