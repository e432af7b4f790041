//! Encrypted connections, and credentials that change.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq_core::{Connection, ErrorKind, Message, Settings};
use polymq_sqs::SqsConnection;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

use crate::{
    harness::front,
    support::{address, bus, next, subscribe, text, unique},
};

/// Certificates of an authority of our own, and other files of one test.
struct Files(PathBuf);

impl Files {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(unique("polymq-sqs"));
        std::fs::create_dir_all(&dir).expect("a directory");
        Self(dir)
    }

    fn certificates() -> Self {
        let files = Self::new();
        let script = r#"set -e
            key="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
            openssl req -x509 $key -days 2 -subj /CN=authority -keyout ca.key -out ca.pem
            printf 'subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n' > extensions
            openssl req $key -subj /CN=server -keyout server.key -out server.csr
            openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                -extfile extensions -out server.pem"#;
        let made = Command::new("sh").args(["-c", script]).current_dir(&files.0).output().expect("a shell");
        let problem = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "this test needs the openssl command: {problem}");
        files
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }

    /// TLS in front of the emulator.
    async fn terminate(&self) -> u16 {
        let chain = CertificateDer::pem_file_iter(Path::new(&self.path("server.pem"))).expect("readable").flatten();
        let key = PrivateKeyDer::from_pem_file(self.path("server.key")).expect("a key");
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let config = config.with_safe_default_protocol_versions().expect("TLS").with_no_client_auth();
        let acceptor = TlsAcceptor::from(Arc::new(config.with_single_cert(chain.collect(), key).expect("valid")));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    let Ok(mut client) = acceptor.accept(socket).await else { return };
                    let Ok(mut server) = TcpStream::connect(address()).await else { return };
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                });
            }
        });
        port
    }

    /// A server that speaks this version of TLS and no other.
    fn old_server(&self, version: &str) -> (Child, u16) {
        let port = polymq_testkit::free_port();
        let [cert, key] = ["server.pem", "server.key"].map(|name| self.path(name));
        let child = Command::new("openssl")
            .args(["s_server", "-quiet", "-accept", &port.to_string(), "-cert", &cert, "-key", &key, version])
            .args(["-cipher", "ALL:@SECLEVEL=0"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        (child.expect("openssl"), port)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        // Files of a test that has its result.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub async fn j4_connections_are_encrypted_and_certificates_checked() {
    let files = Files::certificates();
    let port = files.terminate().await;
    let settings = |host: &str, port: u16| {
        let url = format!("sqss://test:test@{host}:{port}?connect_timeout=60s&poll_wait=1s");
        Settings::from_url(&url).expect("a URL")
    };
    let trusting = |host: &str, port| settings(host, port).with("ca_file", files.path("ca.pem"));
    let refused = async |settings: Settings, word: &str| {
        let error = SqsConnection::connect(&settings).await.expect_err(word);
        assert_eq!(error.kind(), ErrorKind::Disconnected, "{error}");
        assert!(format!("{error:?}").contains(word), "{word}: {error:?}");
    };
    refused(settings("localhost", port), "UnknownIssuer").await;
    // The certificate is for the name, not for the address.
    refused(trusting("127.0.0.1", port), "NotValidForName").await;
    let (mut old, old_port) = files.old_server("-tls1_1");
    polymq_testkit::eventually(Duration::from_secs(60), || async move {
        TcpStream::connect(("127.0.0.1", old_port)).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
    refused(trusting("localhost", old_port), "ProtocolVersion").await;
    old.kill().expect("it is ours");
    old.wait().expect("it is ours");

    let ca = files.path("ca.pem");
    let bus = bus(&format!("sqss://test:test@localhost:{port}?connect_timeout=60s&poll_wait=1s&ca_file={ca}")).await;
    let queue = bus.queue(unique("encrypted"));
    queue.send_message(Message::new("encrypted")).await.expect("sent");
    let delivery = next(&mut subscribe(&queue).await).await;
    assert_eq!(text(&delivery), "encrypted");
    delivery.ack().await.expect("ack");
    for file in ["/nowhere.pem".to_owned(), files.path("server.key")] {
        let error = SqsConnection::connect(&settings("localhost", port).with("ca_file", file)).await;
        let error = error.expect_err("no certificate there");
        assert!(error.kind() == ErrorKind::Config && error.to_string().contains("ca_file"), "{error}");
    }
}

/// When the credentials in the file change, and SQS takes the old ones no more, everything goes on with the new ones: sends,
/// polls, acknowledgements, topics, declarations, without an error and without a restart.
pub async fn j5_rotated_credentials_reach_every_connection() {
    let files = Files::new();
    let path = files.path("credentials");
    let write = |key: &str| {
        let text = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n");
        std::fs::write(&path, text).expect("written");
    };
    let valid = Arc::new(Mutex::new("first".to_owned()));
    let known = Arc::clone(&valid);
    let at = front(address(), move |request| {
        let good = format!("Credential={}/", known.lock().expect("a lock"));
        let refused = || request.refused(403, "ExpiredToken", "The security token included in the request is expired");
        (!request.head.contains(&good)).then(refused)
    });
    write("first");
    let url = format!("sqs://?endpoint=http://{at}&region=us-east-1&credentials_file={path}");
    let bus = bus(&format!("{url}&poll_wait=1s&connect_timeout=60s")).await;
    let (queue, other) = (bus.queue(unique("rotated")), bus.queue(unique("rotated")));
    let topic = bus.topic(unique("rotated"));
    let mut subscription = subscribe(&queue).await;
    let mut group = topic.subscribe(crate::support::with(Some("one"), [])).await.expect("a group");
    queue.send_message(Message::new("before")).await.expect("sent");
    other.send_message(Message::new("before")).await.expect("sent");
    let held = next(&mut subscription).await;
    for key in ["second", "third"] {
        write(key);
        key.clone_into(&mut valid.lock().expect("a lock"));
        let (sent, kept) = tokio::join!(queue.send_message(Message::new(key)), other.send_message(Message::new(key)));
        sent.and(kept).expect("sent");
        topic.send_message(Message::new(key)).await.expect("sent");
        bus.queue(unique("rotated")).declare(polymq_core::ConsumeOptions::default()).await.expect("declared");
        for subscription in [&mut subscription, &mut group] {
            let delivery = next(subscription).await;
            assert_eq!(text(&delivery), key);
            delivery.ack().await.expect("ack");
        }
    }
    held.ack().await.expect("what was held is still ours");
    // Where nothing new is found, the error says so, in time.
    "fourth".clone_into(&mut valid.lock().expect("a lock"));
    let late = queue.with_timeout(Duration::from_secs(20)).send_message(Message::new("never")).await;
    let error = late.expect_err("nobody knows these credentials");
    assert!(error.to_string().contains("expired") || error.kind() == ErrorKind::Timeout, "{error:?}");
    let settings = Settings::from_url(&format!("sqs://first:secret@{at}")).expect("a URL");
    let error = SqsConnection::connect(&settings).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
    drop(bus);
}

pub async fn j6_credentials_are_not_sent_in_clear_to_another_machine() {
    // Refused before anything is connected: there is no such machine.
    let began = std::time::Instant::now();
    for url in [
        "sqs://key:hush@sqs.example.org",
        "sqs://?endpoint=http://192.0.2.1:4566&access_key_id=key&secret_access_key=hush",
    ] {
        let settings = Settings::from_url(url).expect("a URL");
        let error = SqsConnection::connect(&settings).await.expect_err("in clear");
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains("clear text") && !format!("{error:?}").contains("hush"), "{error:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(30));
    // Allowed by name, and on this machine.
    let local = Settings::from_url(&format!("sqs://key:hush@{}", address())).expect("a URL");
    SqsConnection::connect(&local).await.expect("this machine").close().await.expect("close");
}
