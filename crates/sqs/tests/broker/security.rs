//! Encrypted connections, and credentials that change.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use polymq_core::{Connection, ErrorKind, Message, Settings};
use polymq_sqs::SqsConnection;
use polymq_testkit::{Certificates, TlsFront, TlsServer};

use crate::{
    harness::front,
    support::{address, bus, next, subscribe, text, unique, url_of},
};

pub async fn j4_connections_are_encrypted_and_certificates_checked() {
    let files = Certificates::make();
    let front = TlsFront::before(address(), &files).await;
    let port = front.address().port();
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
    for (server, word) in
        [(files.serve("expired", &[]), "Expired"), (files.serve("server", TlsServer::TLS_1_1), "ProtocolVersion")]
    {
        refused(trusting("localhost", server.port()), word).await;
    }

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
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("credentials").display().to_string();
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

/// What AWS answers to a signature that is not right: it repeats what was signed, the session's token among it.
const NOT_OURS: &str = "The request signature we calculated does not match the signature you provided.\\n\\nThe Canonical \
    String for this request should have been\\n'POST\\n/\\n\\nx-amz-security-token:hush-hush\\n'";

/// Every error in an error.
fn whole(error: &(dyn std::error::Error + 'static)) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(|error| format!("{error} {error:?}\n")).collect()
}

/// A wrong secret lets nobody in, and what AWS says of it is told without what was signed.
pub async fn a_wrong_signature_is_refused_and_tells_no_secret() {
    for code in ["InvalidSignatureException", "SignatureDoesNotMatch"] {
        let at = front(address(), move |request| Some(request.refused(403, code, NOT_OURS)));
        let settings = Settings::from_url(&format!("sqs://key:wrong@{at}")).expect("a URL");
        let error = SqsConnection::connect(&settings).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
        assert!(error.to_string().contains("does not match the signature you provided"), "{error}");
        assert!(!whole(&error).contains("hush-hush"), "{}", whole(&error));
    }
    // Said of one poll, it ends no consumer: the credentials may be new by the next.
    let refusals = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&refusals);
    let at = front(address(), move |request| {
        let refused = request.action() == "ReceiveMessage" && count.fetch_add(1, Ordering::SeqCst) == 0;
        refused.then(|| request.refused(403, "InvalidSignatureException", NOT_OURS))
    });
    let bus = bus(&url_of(at)).await;
    let queue = bus.queue(unique("signed"));
    let mut subscription = subscribe(&queue).await;
    queue.send_message(Message::new("after")).await.expect("sent");
    let delivery = next(&mut subscription).await;
    assert_eq!(text(&delivery), "after");
    delivery.ack().await.expect("ack");
    assert!(refusals.load(Ordering::SeqCst) > 1);
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
    // An endpoint is shown in errors.
    let settings = Settings::from_url("sqs://?endpoint=http://key:hush@127.0.0.1:4566").expect("a URL");
    let error = SqsConnection::connect(&settings).await.expect_err("with a login");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    assert!(error.to_string().contains("credentials stand in an endpoint"), "{error}");
    assert!(!format!("{error:?}").contains("hush"), "{error:?}");
    // Allowed by name, and on this machine.
    let local = Settings::from_url(&format!("sqs://key:hush@{}", address())).expect("a URL");
    SqsConnection::connect(&local).await.expect("this machine").close().await.expect("close");
}
