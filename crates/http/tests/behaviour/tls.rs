//! Encrypted connections in both directions, with certificates of an authority of our own, and everything that must not
//! become one: another authority, another host, an old version, no certificate where one is asked for.

#![cfg(feature = "tls")]

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use polymq_core::{Address, Connection, ConsumeOptions, Error, ErrorKind, Message, ProduceOptions, Result, Settings};
use polymq_http::HttpConnection;
use polymq_testkit::eventually;
use tokio::task::JoinHandle;

/// Certificates of an authority of our own: `server` and `client` for this machine, `elsewhere` for another host.
struct Certificates(PathBuf);

impl Certificates {
    fn make() -> Self {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let name = format!("polymq-http-tls-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::SeqCst));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).expect("a directory");
        let script = r#"set -e
            key="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
            openssl req -x509 $key -days 2 -subj /CN=authority -keyout ca.key -out ca.pem
            sign() {
                printf "subjectAltName=$2\nbasicConstraints=CA:FALSE\n" > extensions
                openssl req $key -subj /CN=$1 -keyout $1.key -out $1.csr
                openssl x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
                    -extfile extensions -out $1.pem
            }
            sign server DNS:localhost,IP:127.0.0.1
            sign client DNS:localhost
            sign elsewhere DNS:elsewhere.example"#;
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

/// A consumer that shows this certificate and acknowledges everything, until the connection is closed.
async fn listening(
    files: &Certificates,
    shown: &str,
    more: &[(&str, &str)],
) -> (HttpConnection, u16, JoinHandle<usize>) {
    let here = Settings::new()
        .with("listen", "127.0.0.1:0")
        .with("cert_file", files.path(&format!("{shown}.pem")))
        .with("key_file", files.path(&format!("{shown}.key")));
    let here = more.iter().fold(here, |settings, (key, value)| settings.with(*key, *value));
    let connection = HttpConnection::connect(&here).expect("valid settings");
    let queue = Address::queue("orders");
    let mut consumer = connection.consumer(&queue, &ConsumeOptions::default()).await.expect("it listens");
    let port = connection.local_address().await.expect("an address").port();
    let settler = consumer.settler();
    let acknowledging = tokio::spawn(async move {
        let (mut received, mut count) = (Vec::new(), 0);
        while consumer.receive(1, &mut received).await.is_ok() {
            for incoming in received.drain(..) {
                settler.ack(incoming.token).await.expect("ack");
                count += 1;
            }
        }
        count
    });
    (connection, port, acknowledging)
}

async fn send(settings: Settings) -> Result<()> {
    let connection = HttpConnection::connect(&settings)?;
    let options = ProduceOptions { timeout: Duration::from_secs(30), ..ProduceOptions::default() };
    let producer = connection.producer(&Address::queue("orders"), &options).await?;
    producer.send(Message::new("x").with_id("1")).await.map(drop)
}

fn at(scheme: &str, port: u16) -> Settings {
    Settings::from_url(&format!("{scheme}://localhost:{port}?connect_timeout=60s")).expect("a URL")
}

/// Nothing was sent: the connection was not made.
fn refused(result: Result<()>) -> Error {
    let error = result.expect_err("this must not be sent");
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error:?}");
    error
}

#[tokio::test]
async fn j4_connections_are_encrypted_and_certificates_checked_both_ways() {
    let files = Certificates::make();
    let asking = [("client_ca_file", files.path("ca.pem"))];
    let asking = asking.each_ref().map(|(key, value)| (*key, value.as_str()));
    let (connection, port, acknowledging) = listening(&files, "server", &asking).await;
    let trusting = || at("https", port).with("ca_file", files.path("ca.pem"));
    let known = || trusting().with("cert_file", files.path("client.pem")).with("key_file", files.path("client.key"));
    for http2 in ["auto", "only", "off"] {
        send(known().with("http2", http2)).await.unwrap_or_else(|error| panic!("http2={http2}: {error}"));
    }
    // Who shows no certificate learns it with the first bytes that it reads.
    let error = send(trusting()).await.expect_err("a certificate is asked for");
    assert!(matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::UnknownOutcome), "{error:?}");
    send(at("http", port)).await.expect_err("without TLS");
    connection.close().await.expect("close");
    assert_eq!(acknowledging.await.expect("the consumer ends with its connection"), 3, "and nothing else came in");
}

#[tokio::test]
async fn j4_both_sides_agree_on_http2_where_they_can() {
    let files = Certificates::make();
    let (connection, port, _acknowledging) = listening(&files, "server", &[]).await;
    for (http2, version) in
        [("auto", http::Version::HTTP_2), ("only", http::Version::HTTP_2), ("off", http::Version::HTTP_11)]
    {
        let settings = at("https", port).with("ca_file", files.path("ca.pem")).with("http2", http2);
        let client = HttpConnection::connect(&settings).expect("valid settings").native().expect("open");
        let request = http::Request::post(format!("https://localhost:{port}/orders")).body("x".into());
        let answer = client.request(request.expect("a request")).await.expect("sent");
        assert_eq!((answer.status().as_u16(), answer.version()), (204, version), "http2={http2}");
    }
    connection.close().await.expect("close");
}

#[tokio::test]
async fn j4_another_authority_is_refused() {
    let files = Certificates::make();
    let (connection, port, acknowledging) = listening(&files, "server", &[]).await;
    // Nobody whom the system knows has signed the server's certificate, and neither has this other authority.
    let error = refused(send(at("https", port)).await);
    assert!(error.to_string().contains("certificate"), "{error}");
    let others = Certificates::make();
    let error = refused(send(at("https", port).with("ca_file", others.path("ca.pem"))).await);
    assert!(error.to_string().contains("certificate"), "{error}");
    connection.close().await.expect("close");
    assert_eq!(acknowledging.await.expect("no panic"), 0);
}

#[tokio::test]
async fn j4_another_host_is_refused() {
    let files = Certificates::make();
    let (connection, port, acknowledging) = listening(&files, "elsewhere", &[]).await;
    let error = refused(send(at("https", port).with("ca_file", files.path("ca.pem"))).await);
    assert!(error.to_string().contains("certificate"), "{error}");
    connection.close().await.expect("close");
    assert_eq!(acknowledging.await.expect("no panic"), 0);
}

/// A server of OpenSSL's that speaks this version alone, and answers each connection with a page.
struct OpenSsl(Child, SocketAddr);

impl OpenSsl {
    async fn start(files: &Certificates, version: &str) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], polymq_testkit::free_port()));
        let process = Command::new("openssl")
            .args(["s_server", "-www", "-cert", &files.path("server.pem"), "-key", &files.path("server.key")])
            .args(["-accept", &address.to_string(), version, "-cipher", "ALL:@SECLEVEL=0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("this test needs the openssl command");
        eventually(Duration::from_secs(30), || async {
            tokio::net::TcpStream::connect(address).await.map(drop).map_err(|error| error.to_string())
        })
        .await;
        Self(process, address)
    }
}

impl Drop for OpenSsl {
    fn drop(&mut self) {
        // It runs until it is ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn j4_old_versions_of_tls_are_refused_by_senders() {
    let files = Certificates::make();
    for (version, least, accepted) in [
        ("-tls1_2", "1.2", true),
        ("-tls1_3", "1.3", true),
        ("-tls1_2", "1.3", false),
        ("-tls1_1", "1.2", false),
        ("-tls1", "1.2", false),
    ] {
        let server = OpenSsl::start(&files, version).await;
        let settings = at("https", server.1.port()).with("ca_file", files.path("ca.pem")).with("method", "GET");
        let settings = settings.with("tls_min", least);
        let sent = send(settings).await;
        if accepted {
            sent.expect("the page is the answer");
        } else {
            refused(sent);
        }
    }
}

#[tokio::test]
async fn j4_old_versions_of_tls_are_refused_by_consumers() {
    let files = Certificates::make();
    let (connection, usual, _acknowledging) = listening(&files, "server", &[]).await;
    let (strict_connection, strict, _acknowledging) = listening(&files, "server", &[("tls_min", "1.3")]).await;
    for (version, port, accepted) in [
        ("-tls1_3", usual, true),
        ("-tls1_2", usual, true),
        ("-tls1_1", usual, false),
        ("-tls1", usual, false),
        ("-tls1_3", strict, true),
        ("-tls1_2", strict, false),
    ] {
        let mut client = Command::new("openssl");
        client.args(["s_client", "-connect", &format!("127.0.0.1:{port}"), "-CAfile", &files.path("ca.pem"), version]);
        let client = client.args(["-brief", "-cipher", "ALL:@SECLEVEL=0"]).stdin(Stdio::null());
        let output = tokio::process::Command::from(std::mem::replace(client, Command::new("true")))
            .output()
            .await
            .expect("this test needs the openssl command");
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), accepted, "{version}: {printed}");
        assert_eq!(printed.contains("CONNECTION ESTABLISHED"), accepted, "{version}: {printed}");
    }
    strict_connection.close().await.expect("close");
    connection.close().await.expect("close");
}
