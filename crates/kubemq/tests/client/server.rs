//! What the client makes of servers that are not like ours: one in this process that answers some calls in its own way.

use std::{
    fs::File,
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{FutureExt, future::BoxFuture};
use http_body_util::{BodyExt, Full};
use polymq_broker::Broker;
use polymq_core::{Error, ErrorKind};
use polymq_kubemq::{Corrupted, InProcess, KubeMq, KubeMqConfig, Pattern};
use polymq_kubemq_proto::{
    AckAllQueueMessagesResponse, PingResult, QueueMessage, QueueMessageAttributes, QueuesInfoResponse,
    ReceiveQueueMessagesResponse, Response,
};
use polymq_testkit::eventually;
use prost::Message as _;

use crate::{PATIENCE, SECOND, bodies, fill, waiting};

/// A server of this version, in whose queues these messages are.
fn server(version: &'static str, messages: Vec<QueueMessage>) -> InProcess {
    Arc::new(move |request: http::Request<tonic::body::Body>| {
        let answer = match request.uri().path().rsplit('/').next() {
            Some("Ping") => {
                PingResult { host: "stub".into(), version: version.into(), ..PingResult::default() }.encode_to_vec()
            }
            Some("QueuesInfo") => QueuesInfoResponse::default().encode_to_vec(),
            Some("ReceiveQueueMessages") => {
                let messages = messages.clone();
                ReceiveQueueMessagesResponse { messages, ..ReceiveQueueMessagesResponse::default() }.encode_to_vec()
            }
            other => panic!("a call that no test makes: {other:?}"),
        };
        encoded(&answer)
    })
}

/// The answer of a call.
pub(crate) fn answer(answer: &impl prost::Message) -> BoxFuture<'static, http::Response<tonic::body::Body>> {
    encoded(&answer.encode_to_vec())
}

fn encoded(answer: &[u8]) -> BoxFuture<'static, http::Response<tonic::body::Body>> {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(answer.len()).expect("small"));
    frame.put_slice(answer);
    let body = tonic::body::Body::new(Full::<Bytes>::new(frame.freeze()));
    let response = http::Response::builder().header("content-type", "application/grpc").header("grpc-status", "0");
    std::future::ready(response.body(body).expect("a response")).boxed()
}

async fn connect(version: &'static str, messages: Vec<QueueMessage>) -> KubeMq {
    KubeMq::in_process(KubeMqConfig::default(), server(version, messages)).await.expect("connect")
}

fn message(id: &str, body: &'static str, md5: &str) -> QueueMessage {
    QueueMessage {
        message_id: id.into(),
        channel: "q".into(),
        body: body.into(),
        attributes: Some(QueueMessageAttributes { md5_of_body: md5.into(), ..QueueMessageAttributes::default() }),
        ..QueueMessage::default()
    }
}

/// Mission row G12: a body that is not what its MD5 says is found, and no message is lost by that.
#[tokio::test]
async fn a_corrupted_body_is_detected() {
    let md5_of_abc = "900150983cd24fb0d6963f7d28e17f72";
    let good =
        vec![message("1", "abc", md5_of_abc), message("2", "abc", &md5_of_abc.to_uppercase()), message("3", "abd", "")];
    let client = connect("2.4.0", good.clone()).await;
    assert_eq!(client.receive("q", 3, SECOND).await.expect("received"), good);
    let mut bad = good.clone();
    bad.push(message("4", "abd", md5_of_abc));
    let client = connect("2.4.0", bad.clone()).await;
    let error = client.receive("q", 4, SECOND).await.expect_err("corrupted");
    assert!(error.kind() == ErrorKind::Decode && error.to_string().contains("\"4\""), "{error}");
    assert_eq!(found(&error), (bad, vec![3]));

    // What is held goes back: from a poll in its place, from a transaction behind the others, counted.
    let spoils = Arc::new(AtomicBool::new(true));
    let client = KubeMq::in_process(KubeMqConfig::default(), spoiling(md5_of_abc, &spoils)).await.expect("connect");
    fill(&client, "q", ["abc", "xyz"].map(str::to_owned)).await;
    let error = client.poll("q", 2, SECOND).await.expect_err("corrupted");
    assert_eq!((error.kind(), seen(&error)), (ErrorKind::Decode, (vec!["abc".to_owned(), "xyz".to_owned()], vec![0])));
    are_back(&client, &spoils, &[("abc", 1), ("xyz", 1)]).await;
    let error = client.transaction("q", 30 * SECOND, SECOND).await.expect_err("corrupted");
    assert_eq!((error.kind(), seen(&error)), (ErrorKind::Decode, (vec!["abc".to_owned()], vec![0])));
    are_back(&client, &spoils, &[("xyz", 1), ("abc", 2)]).await;
    let held = client.transaction("q", 30 * SECOND, SECOND).await.expect("asked").expect("a message");
    assert_eq!(&*held.message().body, b"xyz", "a good one is held as ever");
    held.ack().await.expect("acknowledged");
}

/// The messages in an error's source, and which are bad.
fn found(error: &Error) -> (Vec<QueueMessage>, Vec<usize>) {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<Corrupted>());
    let source = source.unwrap_or_else(|| panic!("no messages in {error:?}"));
    (source.messages.clone(), source.bad.clone())
}

fn seen(error: &Error) -> (Vec<String>, Vec<usize>) {
    let (messages, bad) = found(error);
    (bodies(&messages), bad)
}

/// A broker that tells another MD5 than this one, while it is told to.
fn spoiling(md5: &'static str, spoils: &Arc<AtomicBool>) -> InProcess {
    let broker = Broker::builder().in_process().expect("a broker");
    let spoils = Arc::clone(spoils);
    Arc::new(move |request| {
        let (answering, spoils) = (broker.call(request), Arc::clone(&spoils));
        let spoiled = move |data: Bytes| {
            let at = data.windows(md5.len()).position(|part| part == md5.as_bytes());
            match at.filter(|_| spoils.load(SeqCst)) {
                Some(at) => Bytes::from([&data[..at], &[b'0'; 32], &data[at + md5.len()..]].concat()),
                None => data,
            }
        };
        let spoiling = async move {
            let answer = answering.await;
            answer.map(|body| tonic::body::Body::new(body.map_frame(move |frame| frame.map_data(&spoiled))))
        };
        spoiling.boxed()
    })
}

/// All of these are there again: their bodies, and which delivery the next one is.
async fn are_back(client: &KubeMq, spoils: &AtomicBool, expected: &[(&str, i32)]) {
    spoils.store(false, SeqCst);
    let wanted: Vec<_> = expected.iter().map(|(body, _)| (*body).to_owned()).collect();
    let wait = async || {
        eventually(PATIENCE, || async {
            let there = bodies(&waiting(client, "q").await);
            if there == wanted { Ok(()) } else { Err(format!("{there:?}")) }
        })
        .await;
    };
    wait().await;
    let poll = client.poll("q", 2, SECOND).await.expect("not spoiled");
    let count = |message: &QueueMessage| message.attributes.as_ref().map_or(0, |attributes| attributes.receive_count);
    let counts: Vec<_> = poll.messages().iter().map(count).collect();
    assert_eq!(counts, expected.iter().map(|(_, count)| *count).collect::<Vec<_>>());
    drop(poll);
    wait().await;
    spoils.store(true, SeqCst);
}

/// Mission row G26: a version for which this client was not made is warned of, once; others are not.
#[tokio::test]
async fn an_unknown_version_warns() {
    for (version, expected) in [("2.4.0", 0), ("2.99", 0), ("3.0.0", 1), ("unknown", 1), ("", 1)] {
        let log = tempfile::NamedTempFile::new().expect("a file");
        let writer: Arc<File> = Arc::new(log.reopen().expect("a file"));
        let subscriber = tracing_subscriber::fmt().with_writer(writer).with_ansi(false).finish();
        let client = {
            let _guard = tracing::subscriber::set_default(subscriber);
            let client = connect(version, Vec::new()).await;
            assert_eq!(client.ping().await.expect("ping").version, version);
            client
        };
        drop(client);
        let mut text = String::new();
        log.reopen().and_then(|mut file| file.read_to_string(&mut text)).expect("a log");
        assert_eq!(text.matches("this server's version is not 2.x").count(), expected, "{version}: {text}");
    }
}

/// Emptying and deleting may take as long as there is much to remove, and nobody else's calls end with them.
#[tokio::test(start_paused = true)]
async fn a_server_may_take_its_time_to_empty_and_to_delete() {
    const LONG: Duration = Duration::from_secs(600);
    let server: InProcess = Arc::new(|request: http::Request<tonic::body::Body>| {
        let (wait, answer) = match request.uri().path().rsplit('/').next() {
            Some("Ping") => {
                (Duration::ZERO, PingResult { version: "2.4.0".into(), ..PingResult::default() }.encode_to_vec())
            }
            Some("QueuesInfo") => (Duration::ZERO, QueuesInfoResponse::default().encode_to_vec()),
            Some("AckAllQueueMessages") => {
                let answer = AckAllQueueMessagesResponse { affected_messages: 7, ..Default::default() };
                (LONG, answer.encode_to_vec())
            }
            Some("SendRequest") => (LONG, Response { executed: true, ..Response::default() }.encode_to_vec()),
            other => panic!("a call that no test makes: {other:?}"),
        };
        async move {
            tokio::time::sleep(wait).await;
            encoded(&answer).await
        }
        .boxed()
    });
    let client = KubeMq::in_process(KubeMqConfig::default(), server).await.expect("connect");
    assert_eq!(client.ack_all("q").await.expect("emptied"), 7);
    client.delete_channel(Pattern::Queues, "q").await.expect("deleted");
    client.delete_channel(Pattern::EventsStore, "q").await.expect("deleted");
    let error = client.create_channel(Pattern::Queues, "q").await.expect_err("that is quick, or there is no answer");
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error}");
}
