//! Lets a Kafka be reached through a proxy.
//!
//! A broker tells its clients where to connect, which is past any proxy. A relay stands before the proxy and puts its
//! own port in the place of the broker's in every answer. It breaks nothing by itself, and passes on what is broken.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream, tcp::ReadHalf, tcp::WriteHalf},
    runtime::Runtime,
};

/// The relays of a broker, one before each proxy.
#[derive(Debug)]
pub struct Relays {
    broker: SocketAddr,
    known: Mutex<HashMap<SocketAddr, SocketAddr>>,
    /// What becomes something else of the same length in every answer.
    changes: Vec<(Vec<u8>, Vec<u8>)>,
    runtime: Option<Runtime>,
}

impl Relays {
    pub fn new(broker: SocketAddr) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = Some(runtime.expect("a runtime for relays"));
        Self { broker, known: Mutex::default(), changes: Vec::new(), runtime }
    }

    /// Puts something else, of the same length, in the place of what clients would be answered.
    pub fn changing(mut self, from: &[u8], to: &[u8]) -> Self {
        assert_eq!(from.len(), to.len());
        self.changes.push((from.to_vec(), to.to_vec()));
        self
    }

    /// Where clients connect that are to go through `proxy`.
    pub fn before(&self, proxy: SocketAddr) -> SocketAddr {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        *known.entry(proxy).or_insert_with(|| {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port for a relay");
            listener.set_nonblocking(true).expect("a listener for tokio");
            let address = listener.local_addr().expect("an address");
            let port = |port: u16| [b"127.0.0.1", &u32::from(port).to_be_bytes()[..]].concat();
            let mut changes = self.changes.clone();
            changes.push((port(self.broker.port()), port(address.port())));
            let runtime = self.runtime.as_ref().expect("until it is dropped");
            runtime.spawn(async move {
                let listener = TcpListener::from_std(listener).expect("a listener");
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(serve(client, proxy, changes.clone()));
                }
            });
            address
        })
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(mut client: TcpStream, proxy: SocketAddr, changes: Vec<(Vec<u8>, Vec<u8>)>) {
    if let Ok(mut server) = TcpStream::connect(proxy).await {
        let _ = client.set_nodelay(true);
        let _ = server.set_nodelay(true);
        {
            let ((mut from_client, to_client), (from_server, mut to_server)) = (client.split(), server.split());
            // Whichever ends first ends both: Kafka knows no half-open connection.
            tokio::select! {
                _ = copy(&mut from_client, &mut to_server) => {}
                _ = answers(from_server, to_client, &changes) => {}
            }
        }
        let _ = server.set_zero_linger();
    }
    let _ = client.set_zero_linger();
}

async fn answers(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, changes: &[(Vec<u8>, Vec<u8>)]) -> std::io::Result<()> {
    loop {
        let length = from.read_u32().await?;
        let mut frame = vec![0; length as usize];
        from.read_exact(&mut frame).await?;
        for (theirs, ours) in changes {
            let mut at = 0;
            while let Some(found) = frame[at..].windows(theirs.len()).position(|window| window == theirs) {
                frame[at + found..at + found + ours.len()].copy_from_slice(ours);
                at += found + ours.len();
            }
        }
        to.write_u32(length).await?;
        to.write_all(&frame).await?;
    }
}
