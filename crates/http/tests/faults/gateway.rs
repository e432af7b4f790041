//! What stands before services in most houses: it passes requests on, asks for a token, and says "not so fast".
//!
//! The first part of a path is `open` or `guarded`, the second the port of the service.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use polymq_testkit::{BrokerControl, free_port};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    task::{JoinHandle, JoinSet},
};

use crate::peer::{Exchange, read};

#[derive(Debug)]
pub(crate) struct Gateway {
    address: SocketAddr,
    rules: Arc<Rules>,
    runtime: Option<Runtime>,
    serving: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Rules {
    token: Mutex<String>,
    throttled: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gateway {
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        // It is bound again after a stop.
        let listener = std::net::TcpListener::bind(("127.0.0.1", free_port())).expect("a port");
        let gateway = Self {
            address: listener.local_addr().expect("an address"),
            rules: Arc::default(),
            runtime: Some(runtime.expect("a runtime")),
            serving: Mutex::default(),
        };
        gateway.serve(listener);
        gateway
    }

    pub(crate) fn set_token(&self, token: &str) {
        *lock(&self.rules.token) = token.to_owned();
    }

    pub(crate) fn throttle(&self, on: bool) {
        self.rules.throttled.store(on, Ordering::SeqCst);
    }

    fn serve(&self, listener: std::net::TcpListener) {
        listener.set_nonblocking(true).expect("a listener for tokio");
        let rules = Arc::clone(&self.rules);
        let serving = self.runtime.as_ref().expect("until it is dropped").spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            // They end with this task.
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((client, _)) = accepted else { continue };
                        connections.spawn(pass(client, Arc::clone(&rules)));
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        *lock(&self.serving) = Some(serving);
    }
}

#[async_trait]
impl BrokerControl for Gateway {
    fn address(&self) -> SocketAddr {
        self.address
    }

    async fn start(&self) {
        if lock(&self.serving).is_none() {
            self.serve(std::net::TcpListener::bind(self.address).expect("its port is free again"));
        }
    }

    async fn stop(&self) {
        let serving = lock(&self.serving).take();
        if let Some(serving) = serving {
            serving.abort();
            let _ = serving.await;
        }
    }

    async fn kill(&self) {
        self.stop().await;
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// One request after the other. A service that is not there, or ends in between, ends the connection.
async fn pass(mut client: TcpStream, rules: Arc<Rules>) -> Option<()> {
    let _ = client.set_nodelay(true);
    let mut service = None;
    loop {
        let request = read(&mut client).await?;
        let answer = match rules.refusal(&request) {
            Some(refusal) => refusal.to_owned().into_bytes(),
            None => {
                if service.is_none() {
                    let port = request.first_line.split('/').nth(2)?.parse().ok()?;
                    service = Some(TcpStream::connect(("127.0.0.1", port)).await.ok()?);
                }
                let service = service.as_mut()?;
                service.write_all(&written(&request)).await.ok()?;
                written(&read(service).await?)
            }
        };
        client.write_all(&answer).await.ok()?;
    }
}

impl Rules {
    fn refusal(&self, request: &Exchange) -> Option<&'static str> {
        let guarded = request.first_line.split('/').nth(1) == Some("guarded");
        let token = format!("Bearer {}", lock(&self.token));
        if guarded && request.header("authorization") != Some(&token) {
            return Some("HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Bearer\r\ncontent-length: 0\r\n\r\n");
        }
        let throttled = self.throttled.load(Ordering::SeqCst);
        throttled.then_some("HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n")
    }
}

fn written(exchange: &Exchange) -> Vec<u8> {
    let mut bytes = format!("{}\r\n", exchange.first_line).into_bytes();
    for (name, value) in &exchange.headers {
        bytes.extend(format!("{name}: {value}\r\n").into_bytes());
    }
    bytes.extend(b"\r\n");
    bytes.extend(&exchange.body);
    bytes
}
