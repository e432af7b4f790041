//! Encrypted connections in both directions, with certificates of an authority of our own.

#![cfg(feature = "tls")]
#![allow(missing_docs)]

use std::{path::PathBuf, process::Command, time::Duration};

use polymq_core::{Address, Connection, ConsumeOptions, Error, Message, ProduceOptions, Result, Settings};
use polymq_http::HttpConnection;

/// Certificates of an authority of our own.
struct Certificates(PathBuf);

impl Certificates {
    fn make() -> Self {
        let dir = std::env::temp_dir().join(format!("polymq-http-tls-{}", std::process::id()));
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
        let problem = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "this test needs the openssl command: {problem}");
        Self(dir)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        // Files of a test that has its result.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn send(settings: Settings) -> Result<()> {
    let connection = HttpConnection::connect(&settings)?;
    let options = ProduceOptions { timeout: Duration::from_secs(10), ..ProduceOptions::default() };
    let producer = connection.producer(&Address::queue("orders"), &options).await?;
    producer.send(Message::new("x").with_id("1")).await.map(drop)
}

#[tokio::test]
async fn connections_are_encrypted_and_certificates_checked_both_ways() {
    let files = Certificates::make();
    let here = Settings::new()
        .with("listen", "127.0.0.1:0")
        .with("cert_file", files.path("server.pem"))
        .with("key_file", files.path("server.key"))
        .with("client_ca_file", files.path("ca.pem"));
    let listening = HttpConnection::connect(&here).expect("valid settings");
    let mut consumer = listening.consumer(&Address::queue("orders"), &ConsumeOptions::default()).await.expect("listen");
    let port = listening.local_address().await.expect("it listens").port();
    let settler = consumer.settler();
    let acknowledging = tokio::spawn(async move {
        let mut received = Vec::new();
        while consumer.receive(1, &mut received).await.is_ok() {
            for incoming in received.drain(..) {
                settler.ack(incoming.token).await.expect("ack");
            }
        }
    });

    let url = |scheme: &str| Settings::from_url(&format!("{scheme}://localhost:{port}")).expect("a URL");
    let trusting = || url("https").with("ca_file", files.path("ca.pem"));
    let known = || trusting().with("cert_file", files.path("client.pem")).with("key_file", files.path("client.key"));
    for http2 in ["auto", "only", "off"] {
        send(known().with("http2", http2)).await.unwrap_or_else(|error| panic!("http2={http2}: {error}"));
    }
    let refused = |result: Result<()>| -> Error { result.expect_err("this must not be sent") };
    // Nobody whom the system knows has signed the server's certificate.
    let unknown = refused(send(url("https")).await);
    assert!(unknown.to_string().contains("certificate"), "{unknown}");
    refused(send(trusting()).await);
    refused(send(url("http")).await);

    listening.close().await.expect("close");
    acknowledging.await.expect("the consumer ends with its connection");
}
