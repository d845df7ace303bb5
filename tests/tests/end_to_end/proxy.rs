//! The shaping proxy against a real server: each fault does what its name says, and is seen in the log.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reap_tests::proxy::{Delay, Entry, Fault, Operation, Plan, Proxy, Rule, Shape, server_in};
use reap_tests::servers::Moto;

/// An answer as far as it came: its status and its body; neither where there was none.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    status: Option<u16>,
    body: Vec<u8>,
    is_whole: bool,
}

/// One request on a connection of its own.
fn ask(address: SocketAddr, line: &str, body: &[u8]) -> Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let length = body.len();
    // moto gives nothing to strangers, and checks no signature.
    let known = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";
    let head = format!(
        "{line} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nAuthorization: {known}\r\nConnection: close\r\n"
    );
    // A fault may end the connection at any byte.
    let sent = write!(stream, "{head}\r\n").and_then(|()| stream.write_all(body));
    let mut answer = Vec::new();
    let read = sent.and_then(|()| stream.read_to_end(&mut answer));
    let Some(end) = answer.windows(4).position(|at| at == b"\r\n\r\n") else {
        return Ok(Answer::default());
    };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
    let body = answer[end + 4..].to_vec();
    let is_whole =
        read.is_ok() && length.is_none_or(|length| length.trim().parse() == Ok(body.len()));
    Ok(Answer { status, body, is_whole })
}

struct Between {
    server: Moto,
    proxy: Proxy,
}

impl Between {
    fn start() -> Result<Self> {
        let server = Moto::start()?;
        let proxy = Proxy::start(server_in(server.environment())?, Plan::default())?;
        Ok(Self { server, proxy })
    }

    /// The next request gets `fault`.
    fn next_gets(&self, fault: Fault) {
        let rule = Rule { operation: None, key_contains: String::new(), skip: 0, times: 1, fault };
        self.proxy.follow(Plan { rules: vec![rule], ..Plan::default() });
        self.proxy.forget();
    }

    fn ask(&self, line: &str, body: &[u8]) -> Result<Answer> {
        ask(self.proxy.address(), line, body)
    }

    fn straight(&self, line: &str) -> Result<Answer> {
        ask(server_in(self.server.environment())?, line, b"")
    }

    /// The only request since [`Self::next_gets`].
    fn logged(&self) -> Result<Entry> {
        let mut requests = self.proxy.requests();
        ensure!(requests.len() == 1, "{requests:?}");
        requests.pop().context("a request")
    }
}

#[test]
fn the_proxy_forwards_what_it_logs() -> Result<()> {
    let between = Between::start()?;
    let bytes: Vec<u8> = (0..300_000u32).map(|at| (at / 7) as u8).collect();
    let put = between.ask("PUT /snapshots/a/b%3Ac", &bytes)?;
    ensure!(put.status == Some(200), "{put:?}");
    let got = between.ask("GET /snapshots/a/b%3Ac", b"")?;
    ensure!(got.is_whole && got.body == bytes, "other bytes");
    between.ask("HEAD /snapshots/a/b%3Ac", b"")?;
    let listed = between.ask("GET /snapshots?list-type=2&prefix=a%2F", b"")?;
    ensure!(String::from_utf8_lossy(&listed.body).contains("a/b:c"), "{listed:?}");
    let several = b"<Delete><Object><Key>a/b:c</Key></Object></Delete>";
    ensure!(between.ask("POST /snapshots?delete", several)?.status == Some(200));
    ensure!(between.ask("GET /snapshots/a/b%3Ac", b"")?.status == Some(404));

    let logged = between.proxy.requests();
    let seen: Vec<_> = logged.iter().map(|entry| (entry.operation, entry.key.as_str())).collect();
    let key = "snapshots/a/b:c";
    let expected = [
        (Operation::Put, key),
        (Operation::Get, key),
        (Operation::Head, key),
        (Operation::List, "snapshots/a/"),
        (Operation::Delete, key),
        (Operation::Get, key),
    ];
    ensure!(seen == expected, "{seen:?}");
    ensure!(logged[0].received_bytes == 300_000 && logged[1].sent_bytes == 300_000, "{logged:?}");
    ensure!(logged.iter().all(|entry| entry.fault.is_none() && entry.ended_us.is_some()));
    Ok(())
}

#[test]
fn a_fault_before_effect_leaves_nothing_and_one_after_it_leaves_all() -> Result<()> {
    let between = Between::start()?;
    let moment = Duration::from_millis(50);
    let cases = [
        (Fault::Refuse(503), Some(503), false),
        (Fault::Refuse(500), Some(500), false),
        (Fault::Reset, None, false),
        (Fault::Hang(moment), None, false),
        (Fault::LoseAnswer, None, true),
        (Fault::FailAnswer(500), Some(500), true),
        (Fault::HangAnswer(moment), None, true),
    ];
    for (fault, status, took_effect) in cases {
        let line = format!("/snapshots/{}", fault.name());
        between.next_gets(fault);
        let answer = between.ask(&format!("PUT {line}"), &[7; 100_000])?;
        ensure!(answer.status == status, "{fault:?}: {answer:?}");
        ensure!(between.logged()?.fault == Some(fault.name()), "{:?}", between.logged()?);
        let there = between.straight(&format!("GET {line}"))?;
        ensure!((there.status == Some(200)) == took_effect, "{fault:?}: {there:?}");
        between.straight(&format!("DELETE {line}"))?;
    }
    Ok(())
}

#[test]
fn a_client_that_goes_away_does_not_undo_what_it_sent() -> Result<()> {
    let between = Between::start()?;
    let shape = Shape { first_byte: Delay::Fixed(Duration::from_secs(2)), ..Shape::default() };
    between.proxy.follow(Plan { shape, ..Plan::default() });
    let mut stream = TcpStream::connect(between.proxy.address())?;
    write!(stream, "PUT /snapshots/left HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")?;
    std::thread::sleep(Duration::from_millis(100));
    drop(stream);
    let began = std::time::Instant::now();
    while between.straight("GET /snapshots/left")?.body != b"abc" {
        ensure!(began.elapsed() < Duration::from_secs(20), "the PUT was forgotten");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn bodies_are_cut_or_changed_in_one_bit() -> Result<()> {
    let between = Between::start()?;
    let bytes: Vec<u8> = (0..500_000u32).map(|at| (at / 11) as u8).collect();
    between.ask("PUT /snapshots/a", &bytes)?;
    between.next_gets(Fault::Truncate);
    let cut = between.ask("GET /snapshots/a", b"")?;
    ensure!(cut.status == Some(200) && !cut.is_whole, "{:?} {}", cut.status, cut.body.len());
    ensure!(bytes.starts_with(&cut.body) && between.logged()?.fault == Some("truncated"));
    between.next_gets(Fault::Flip);
    let changed = between.ask("GET /snapshots/a", b"")?;
    let wrong: Vec<_> =
        bytes.iter().zip(&changed.body).filter(|(one, other)| one != other).collect();
    ensure!(changed.is_whole && wrong.len() == 1, "{} bytes are wrong", wrong.len());
    ensure!((wrong[0].0 ^ wrong[0].1).count_ones() == 1 && between.logged()?.fault.is_some());
    Ok(())
}

#[test]
fn a_duplicate_comes_late_and_counts_as_such() -> Result<()> {
    let between = Between::start()?;
    between.next_gets(Fault::Duplicate(Duration::from_millis(300)));
    between.ask("PUT /snapshots/a", b"abc")?;
    between.straight("DELETE /snapshots/a")?;
    let began = std::time::Instant::now();
    // It brings back what was deleted: that is the point.
    while between.straight("GET /snapshots/a")?.body != b"abc" {
        ensure!(began.elapsed() < Duration::from_secs(20), "no duplicate came");
        std::thread::sleep(Duration::from_millis(20));
    }
    let logged = between.proxy.requests();
    ensure!(logged.len() == 2 && logged[1].is_duplicate && !logged[0].is_duplicate, "{logged:?}");
    ensure!(logged[0].fault == Some("duplicated") && logged[1].status == Some(200), "{logged:?}");
    Ok(())
}

#[test]
fn a_shaped_connection_is_as_slow_as_it_should_be() -> Result<()> {
    let between = Between::start()?;
    between.ask("PUT /snapshots/a", &[7; 200_000])?;
    let shape = Shape {
        first_byte: Delay::Fixed(Duration::from_millis(60)),
        bytes_per_second: Some(1_000_000),
    };
    between.proxy.follow(Plan { shape, ..Plan::default() });
    between.proxy.forget();
    ensure!(between.ask("GET /snapshots/a", b"")?.is_whole);
    let entry = between.logged()?;
    let answered_us = entry.answered_us.context("an answer")?;
    let ended_us = entry.ended_us.context("an end")?;
    // Lower bounds: a busy machine can only be slower.
    ensure!(answered_us - entry.began_us >= 60_000, "{entry:?}");
    ensure!(ended_us - answered_us >= 190_000, "200 kB at 1 MB/s: {entry:?}");
    Ok(())
}
