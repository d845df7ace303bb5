//! What the proxy adds where it shapes nothing: the same requests to the same server, straight and through it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Plan, Proxy};

const ROUNDS: usize = 7;
const SMALL_BYTES: usize = 64 << 10;
const SMALL_REQUESTS: usize = 300;
const LARGE_BYTES: usize = 64 << 20;

/// Median latency of small GETs and speed of large ones on one connection, both ways, in turns.
pub fn measure() -> Result<String> {
    let server = serve_zeros()?;
    let proxy = Proxy::start(server, Plan::default())?;
    let mut latencies: [Vec<Duration>; 2] = Default::default();
    let mut speeds: [Vec<f64>; 2] = Default::default();
    for _ in 0..ROUNDS {
        for (way, address) in [server, proxy.address()].into_iter().enumerate() {
            let mut client = Client::connect(address)?;
            for _ in 0..SMALL_REQUESTS {
                latencies[way].push(client.get(SMALL_BYTES)?);
            }
            let took = client.get(LARGE_BYTES)?;
            speeds[way].push(LARGE_BYTES as f64 / 1e6 / took.as_secs_f64());
        }
    }
    let latency = latencies.map(|mut all| {
        all.sort();
        all[all.len() / 2].as_micros()
    });
    let speed = speeds.map(|mut all| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    });
    Ok(format!(
        "GET of 64 KiB, p50: {} us straight, {} us through the proxy\nGET of 64 MiB on one connection: {:.0} MB/s straight, {:.0} MB/s through the proxy",
        latency[0], latency[1], speed[0], speed[1]
    ))
}

/// A server of zeros: `GET /<bytes>`. Its threads end with the process.
fn serve_zeros() -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || answer_with_zeros(stream));
        }
    });
    Ok(address)
}

fn answer_with_zeros(stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let zeros = vec![0; 1 << 20];
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = stream;
    loop {
        let head = read_head(&mut reader)?;
        let target = head.split(' ').nth(1).context("a target")?;
        let mut left: usize = target.trim_start_matches('/').parse()?;
        write!(writer, "HTTP/1.1 200 OK\r\nContent-Length: {left}\r\n\r\n")?;
        while left > 0 {
            let piece = left.min(zeros.len());
            writer.write_all(&zeros[..piece])?;
            left -= piece;
        }
    }
}

fn read_head(reader: &mut impl BufRead) -> Result<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        ensure!(reader.read_line(&mut head)? > 0, "the connection ended");
    }
    Ok(head)
}

struct Client {
    reader: BufReader<TcpStream>,
    buffer: Vec<u8>,
}

impl Client {
    fn connect(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(Self { reader: BufReader::new(stream), buffer: vec![0; 1 << 20] })
    }

    fn get(&mut self, bytes: usize) -> Result<Duration> {
        let began = Instant::now();
        let request = format!("GET /{bytes} HTTP/1.1\r\nHost: zeros\r\n\r\n");
        self.reader.get_mut().write_all(request.as_bytes())?;
        read_head(&mut self.reader)?;
        let mut left = bytes;
        while left > 0 {
            let piece = left.min(self.buffer.len());
            let read = self.reader.read(&mut self.buffer[..piece])?;
            ensure!(read > 0, "the answer ended early");
            left -= read;
        }
        Ok(began.elapsed())
    }
}
