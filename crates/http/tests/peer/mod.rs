//! Peers that know nothing of polymq: bytes on a socket.

#![allow(dead_code)] // each test binary uses a part

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use polymq_core::{
    Address, Bus, Connection, ConsumeOptions, Consumer, Environment, Error, ErrorKind, Incoming, Message, Registry,
    Settings,
};
use polymq_http::{HttpBackend, HttpConnection};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

pub const PATIENCE: Duration = Duration::from_secs(30);

/// A head and a body, of a request or of a response.
#[derive(Debug, Clone)]
pub struct Exchange {
    pub first_line: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Exchange {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn status(&self) -> u16 {
        self.first_line.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status line")
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// Reads one head and its body; `None` when the other side has closed before.
pub async fn read(stream: &mut TcpStream) -> Option<Exchange> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
    let mut lines = text.split("\r\n");
    let first_line = lines.next()?.to_owned();
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect();
    let mut exchange = Exchange { first_line, headers, body: bytes.split_off(head + 4) };
    let length = exchange.header("content-length").map_or(0, |length| length.parse().expect("a number"));
    while exchange.body.len() < length {
        if stream.read_buf(&mut exchange.body).await.ok()? == 0 {
            return None;
        }
    }
    Some(exchange)
}

/// A request in HTTP/1.1, written by hand.
pub fn request(method: &str, path: &str, headers: &str, body: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: here\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
}

/// Sends these bytes over a connection of their own and reads the answer.
pub async fn ask(address: SocketAddr, bytes: &str) -> Exchange {
    let mut stream = TcpStream::connect(address).await.expect("connect");
    ask_over(&mut stream, bytes).await
}

pub async fn ask_over(stream: &mut TcpStream, bytes: &str) -> Exchange {
    stream.write_all(bytes.as_bytes()).await.expect("write");
    tokio::time::timeout(PATIENCE, read(stream)).await.expect("an answer in time").expect("an answer")
}

/// Posts in the background.
pub fn post(address: SocketAddr, path: &str, body: &str) -> JoinHandle<Exchange> {
    let bytes = request("POST", path, "", body);
    tokio::spawn(async move { ask(address, &bytes).await })
}

/// What a stub does with a request.
pub enum Act {
    Answer(String),
    /// Reads the request and closes.
    HangUp,
    /// Reads the request and says nothing.
    Silence,
    /// An answer without end.
    Flood,
}

pub fn answer(status: &str, headers: &str, body: &str) -> Act {
    Act::Answer(format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len()))
}

/// A server that answers each request as it is told, and remembers them.
pub struct Stub {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<Exchange>>>,
    flooded: Arc<AtomicUsize>,
    serving: JoinHandle<()>,
}

impl Stub {
    pub async fn start(act: impl Fn(&Exchange) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (requests, flooded, act) = (Arc::new(Mutex::default()), Arc::new(AtomicUsize::new(0)), Arc::new(act));
        let (seen, written) = (Arc::clone(&requests), Arc::clone(&flooded));
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&act), Arc::clone(&seen), Arc::clone(&written)));
            }
        });
        Self { address, requests, flooded, serving }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// How many bytes of answers without end were taken.
    pub fn flooded(&self) -> usize {
        self.flooded.load(Ordering::SeqCst)
    }

    pub fn requests(&self) -> Vec<Exchange> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Stub {
    /// Whether this is the error of a request that got no answer: its outcome is unknown, unless it cannot have come here.
    pub fn is_unanswered(&self, error: &Error, asked: impl Fn(&Exchange) -> bool) -> bool {
        let is_here = self.requests().iter().any(asked);
        error.kind() == ErrorKind::UnknownOutcome || error.kind() == ErrorKind::Timeout && !is_here
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    act: Arc<impl Fn(&Exchange) -> Act + Send + Sync + 'static>,
    seen: Arc<Mutex<Vec<Exchange>>>,
    flooded: Arc<AtomicUsize>,
) {
    while let Some(request) = read(&mut stream).await {
        seen.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
        match act(&request) {
            Act::Answer(bytes) => stream.write_all(bytes.as_bytes()).await.expect("write"),
            Act::HangUp => return,
            Act::Silence => std::future::pending().await,
            Act::Flood => {
                let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
                let mut written = stream.write_all(head.as_bytes()).await;
                while written.is_ok() {
                    flooded.fetch_add(chunk.len(), Ordering::SeqCst);
                    written = stream.write_all(chunk.as_bytes()).await;
                }
                return;
            }
        }
    }
}

/// A connection that listens, with the consumer of one queue.
pub async fn listening(
    settings: &[(&str, &str)],
    options: &ConsumeOptions,
) -> (HttpConnection, Box<dyn Consumer>, SocketAddr) {
    let here = Settings::new().with("listen", "127.0.0.1:0/in");
    let settings = settings.iter().fold(here, |settings, (key, value)| settings.with(*key, *value));
    let connection = HttpConnection::connect(&settings).expect("valid settings");
    let consumer = connection.consumer(&Address::queue("orders"), options).await.expect("listen");
    let address = connection.local_address().await.expect("it listens");
    (connection, consumer, address)
}

pub async fn plain() -> (HttpConnection, Box<dyn Consumer>, SocketAddr) {
    listening(&[], &ConsumeOptions::default()).await
}

pub async fn next(consumer: &mut Box<dyn Consumer>) -> Incoming {
    let mut received = Vec::new();
    tokio::time::timeout(PATIENCE, consumer.receive(1, &mut received)).await.expect("in time").expect("receive");
    received.remove(0)
}

/// A bus over HTTP; settings follow the URL as its query.
pub async fn bus(url: &str) -> Bus {
    let mut registry = Registry::new();
    registry.add(Arc::new(HttpBackend)).expect("one backend");
    let builder = Bus::builder().registry(registry).environment(Environment::default()).backend("http").url(url);
    builder.connect().await.expect("connect")
}

/// A URL at which nobody listens yet.
pub fn free_url() -> String {
    format!("http://127.0.0.1:{}", polymq_testkit::free_port())
}

pub fn order(id: u32) -> Message {
    Message::new(format!("{{\"id\":{id}}}")).with_id(format!("order-{id}")).with_content_type("application/json")
}
