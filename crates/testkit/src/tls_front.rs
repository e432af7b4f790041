//! TLS before a server that speaks none, with a certificate that can be changed.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        DEFAULT_VERSIONS, RootCertStore, ServerConfig, SupportedProtocolVersion,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
        version::TLS12,
    },
};

use crate::{Certificates, cx::lock};

/// Ends TLS and passes on what was said, until this is dropped. Clients may show a certificate of the authority, and need not.
#[derive(Debug)]
pub struct TlsFront {
    address: SocketAddr,
    versions: &'static [&'static SupportedProtocolVersion],
    acceptor: Arc<Mutex<Shown>>,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Shown(TlsAcceptor);

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shown")
    }
}

impl TlsFront {
    /// Before this server, with the certificate `server`.
    ///
    /// # Panics
    /// When no port can be had.
    pub async fn before(server: SocketAddr, files: &Certificates) -> Self {
        Self::start(server, files, DEFAULT_VERSIONS).await
    }

    /// The same, with TLS 1.2 and nothing newer.
    ///
    /// # Panics
    /// When no port can be had.
    pub async fn of_1_2_before(server: SocketAddr, files: &Certificates) -> Self {
        static ONLY: &[&SupportedProtocolVersion] = &[&TLS12];
        Self::start(server, files, ONLY).await
    }

    async fn start(
        server: SocketAddr,
        files: &Certificates,
        versions: &'static [&'static SupportedProtocolVersion],
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let acceptor = Arc::new(Mutex::new(shown(files, "server", versions)));
        let task = tokio::spawn(accept(listener, server, Arc::clone(&acceptor)));
        Self { address, versions, acceptor, task }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whoever connects from now on is shown this one of the certificates. Connections that are there stay.
    ///
    /// # Panics
    /// When there is no such certificate.
    pub fn show(&self, certificate: &str, files: &Certificates) {
        *lock(&self.acceptor) = shown(files, certificate, self.versions);
    }
}

impl Drop for TlsFront {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn shown(files: &Certificates, name: &str, versions: &[&'static SupportedProtocolVersion]) -> Shown {
    let chain = |name: &str| -> Vec<_> {
        CertificateDer::pem_file_iter(files.path(&format!("{name}.pem"))).expect("a certificate").flatten().collect()
    };
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(chain("ca"));
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let verifier = verifier.allow_unauthenticated().build().expect("a verifier");
    let key = PrivateKeyDer::from_pem_file(files.path(&format!("{name}.key"))).expect("a key");
    let config = ServerConfig::builder_with_provider(provider).with_protocol_versions(versions).expect("versions");
    let config = config.with_client_cert_verifier(verifier).with_single_cert(chain(name), key).expect("a pair");
    Shown(TlsAcceptor::from(Arc::new(config)))
}

async fn accept(listener: TcpListener, server: SocketAddr, acceptor: Arc<Mutex<Shown>>) {
    // They end with this task.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { continue };
                let Shown(acceptor) = lock(&acceptor).clone();
                connections.spawn(async move {
                    let Ok(mut client) = acceptor.accept(client).await else { return };
                    let Ok(mut server) = TcpStream::connect(server).await else { return };
                    // Whichever side ends, the other one hears of it.
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}
