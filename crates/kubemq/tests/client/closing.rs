//! Who comes too late when a connection closes, and what ends with a consumer.

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll};

use futures_util::FutureExt;
use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, Settings};
use polymq_kubemq::{InProcess, KubeMqConfig, KubeMqConnection, Topics};
use polymq_kubemq_proto::PingResult;
use tokio::{sync::mpsc, time::timeout};

use crate::{SECOND, server::answer, start};

/// Nobody is added to those who are closed.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_begins_to_consume_while_the_connection_closes() {
    let (broker, _) = start().await;
    let settings = Settings::from_url(&format!("kubemq://{}", broker.address())).expect("a URL");
    let group = ConsumeOptions { group: Some("audit".into()), ..ConsumeOptions::default() };
    let late = [
        (Address::queue("late"), ConsumeOptions::default()),
        (Address::topic("late"), group),
        (Address::topic("late"), ConsumeOptions::default()),
    ];
    for (address, options) in late {
        let connection = KubeMqConnection::connect(&settings).await.expect("connect");
        let early =
            connection.consumer(&Address::queue("early"), &ConsumeOptions::default()).await.expect("a consumer");
        let mut closing = pin!(connection.close());
        let waits = poll_fn(|context| Poll::Ready(closing.as_mut().poll(context).is_pending())).await;
        assert!(waits, "there is something to wait for");
        let made = connection.consumer(&address, &options).await.map(drop);
        assert_eq!(made.expect_err("it closes").kind(), ErrorKind::Closed, "{address}");
        closing.await.expect("closed");
        drop(early);
    }
    broker.stop().await;
}

/// A reader that is given up while the server is silent leaves no subscription to come behind.
#[tokio::test]
async fn a_reader_that_is_given_up_subscribes_no_more() {
    let (asked, mut asking) = mpsc::unbounded_channel();
    // Polymq's own brokers confirm a subscription, so it is waited for.
    let silent: InProcess = Arc::new(move |request| {
        let about = PingResult { host: "stub".into(), version: "2.0-polymq".into(), ..PingResult::default() };
        match request.uri().path().rsplit('/').next() {
            Some("Ping") => return answer(&about),
            Some("SubscribeToEvents") => {}
            // Nothing: that is an answer to any other call.
            _ => return answer(&PingResult::default()),
        }
        let (open, over) = mpsc::unbounded_channel::<()>();
        asked.send(over).expect("the test waits");
        async move {
            let _until_it_is_dropped = open;
            std::future::pending().await
        }
        .boxed()
    });
    let config = KubeMqConfig {
        topics: Topics::Events,
        // Only then would it be given up by itself.
        request_timeout: 3000 * SECOND,
        connect_timeout: 3000 * SECOND,
        ..KubeMqConfig::default()
    };
    let connection = KubeMqConnection::in_process("stub", config, silent).await.expect("connect");
    let (topic, options) = (Address::topic("news"), ConsumeOptions::default());
    let mut over = {
        let mut subscribing = pin!(connection.consumer(&topic, &options));
        tokio::select! {
            made = &mut subscribing => panic!("nobody has confirmed it: {:?}", made.map(drop)),
            asked = timeout(30 * SECOND, asking.recv()) => asked.expect("it subscribes").expect("a call"),
        }
    };
    assert_eq!(timeout(30 * SECOND, over.recv()).await.expect("it is given up"), None);
}
