use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use polymq_amqp::AmqpConnection;
use polymq_core::{Address, Connection, ErrorKind, Settings};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};

use super::harness::*;

/// Certificates of an authority of our own.
struct Certificates(PathBuf);

impl Certificates {
    fn make() -> Self {
        let dir = std::env::temp_dir().join(unique("polymq-amqp-tls"));
        std::fs::create_dir_all(&dir).expect("a directory");
        let script = r#"set -e
            key="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
            openssl req -x509 $key -days 2 -subj /CN=authority -keyout ca.key -out ca.pem
            printf 'subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n' > extensions
            for name in server client; do
                openssl req $key -subj /CN=$name -keyout $name.key -out $name.csr
                openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                    -extfile extensions -out $name.pem
            done"#;
        let made = Command::new("sh").args(["-c", script]).current_dir(&dir).output().expect("a shell");
        assert!(
            made.status.success(),
            "this test needs the openssl command: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        Self(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }

    fn chain(&self, name: &str) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_file_iter(Path::new(&self.path(name))).expect("readable").flatten().collect()
    }

    /// TLS in front of the broker, which asks for a certificate of this authority.
    async fn terminate(&self, target: u16) -> u16 {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.chain("ca.pem"));
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
        let verifier = verifier.allow_unauthenticated().build().expect("a verifier");
        let key = PrivateKeyDer::from_pem_file(self.path("server.key")).expect("a key");
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("TLS");
        let config =
            config.with_client_cert_verifier(verifier).with_single_cert(self.chain("server.pem"), key).expect("valid");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut client) = acceptor.accept(socket).await else { return };
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        port
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub async fn connections_are_encrypted_and_certificates_checked() {
    let certificates = Certificates::make();
    let port = certificates.terminate(shared().port).await;
    let settings =
        Settings::from_url(&format!("amqps://guest:guest@localhost:{port}?connect_timeout=60s")).expect("a URL");
    let error = AmqpConnection::connect(&settings).await.expect_err("an unknown authority");
    assert_eq!(error.kind(), ErrorKind::Disconnected);
    assert!(error.to_string().contains("certificate"), "{error}");

    let trusting = settings.clone().with("ca_file", certificates.path("ca.pem"));
    let connection = AmqpConnection::connect(&trusting).await.expect("encrypted");
    let queue = Address::queue(unique("encrypted"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    let large = "x".repeat(1 << 20);
    for _ in 0..5 {
        send(&*producer, message(&large)).await.expect("sent");
    }
    for incoming in receive(&mut *consumer, 5).await {
        assert_eq!(text(&incoming), large);
        consumer.settler().ack(incoming.token).await.expect("acknowledged");
    }
    connection.close().await.expect("closed");

    let known = trusting.clone().with("cert_file", certificates.path("client.pem"));
    let known = known.with("key_file", certificates.path("client.key"));
    AmqpConnection::connect(&known).await.expect("with a certificate").ping().await.expect("an answer");
    for (key, value) in [("ca_file", "/nowhere.pem".to_owned()), ("ca_file", certificates.path("server.key"))] {
        let error =
            AmqpConnection::connect(&settings.clone().with(key, value)).await.expect_err("no certificate there");
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains(key), "{error}");
    }
    // Clear text to a port that expects TLS, and the other way round, end soon.
    let plain = Settings::from_url(&format!("amqp://localhost:{port}?connect_timeout=2s")).expect("a URL");
    assert_eq!(AmqpConnection::connect(&plain).await.expect_err("no TLS").kind(), ErrorKind::Disconnected);
    let wrong = format!("amqps://localhost:{}?connect_timeout=2s", shared().port);
    let wrong = Settings::from_url(&wrong).expect("a URL");
    assert_eq!(AmqpConnection::connect(&wrong).await.expect_err("no TLS there").kind(), ErrorKind::Disconnected);
}
