//! Tokens that are renewed in their file (mission row J5), one of which expires while it is used (suite F12).

use std::{
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use polymq_broker::{Broker, TokenAlgorithm};
use polymq_core::{ConsumeOptions, ErrorKind, HealthState, Message, Settings};
use polymq_kubemq::{KubeMq, Pattern};
use polymq_testkit::{Proxy, eventually};
use tokio::time::timeout;

use crate::{PATIENCE, bus_of, next, take};

/// By how much the clocks of brokers and of those who sign may differ.
const LEEWAY: u64 = 30;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// A JSON web token that is good until then (RFC 7519, RFC 7515).
fn token(key: &Path, expires: u64) -> String {
    let part = |json: String| BASE64_URL_SAFE_NO_PAD.encode(json);
    let claims = format!(r#"{{"ClientID":"tested","exp":{expires}}}"#);
    let signed = format!("{}.{}", part(r#"{"alg":"HS256","typ":"JWT"}"#.into()), part(claims));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &std::fs::read(key).expect("the key"));
    let signature = BASE64_URL_SAFE_NO_PAD.encode(ring::hmac::sign(&key, signed.as_bytes()));
    format!("{signed}.{signature}")
}

/// The next call of every connection carries the token that is in the file by then; one with a token that has expired is told
/// so, looks for another, and goes on when there is one. What is open stays open.
#[tokio::test(flavor = "multi_thread")]
async fn j5_a_token_that_expires_is_renewed_by_its_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let (key, file) = (folder.path().join("key"), folder.path().join("token"));
    std::fs::write(&key, "a secret of the test").expect("the key");
    let write = |token: &str| std::fs::write(&file, format!("{token}\n")).expect("the token");
    let broker = Broker::builder().listen("127.0.0.1:0").token_key(TokenAlgorithm::HS256, &key);
    let broker = broker.start().await.expect("a broker");
    let proxy = Proxy::start(broker.address()).await.expect("a proxy");
    let url = format!("kubemq://{}?token_file={}", proxy.address(), file.display());
    let until = now() + 30;
    let short = token(&key, until - LEEWAY);
    write(&short);
    let (bus, client) = (bus_of(&url).await, KubeMq::connect(&Settings::from_url(&url).expect("a URL")).await);
    let client = client.expect("connect");
    let queue = bus.queue("tokens").with_timeout(PATIENCE);
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("a consumer");
    queue.send_message(Message::new("before")).await.expect("sent");
    let before = next(&mut subscription).await;
    before.ack().await.expect("acknowledged");

    eventually(2 * PATIENCE, || async { if now() > until { Ok(()) } else { Err("it has not expired yet") } }).await;
    // One with a new token and one that still has the old: the latter is told, and says why it is down.
    write(&token(&key, now() + 3600));
    client.list_channels(Pattern::Queues, "").await.expect("the next call has the new one");
    write(&short);
    let error = client.list_channels(Pattern::Queues, "").await.expect_err("expired");
    assert!(error.kind() == ErrorKind::Unauthenticated && error.to_string().contains("token is expired"), "{error}");
    assert!(!error.to_string().contains(&short) && !format!("{error:?}").contains(&short), "{error}");
    proxy.reset_all();
    eventually(PATIENCE, || async {
        let health = bus.health();
        let is_told = health.state == HealthState::Down && health.to_string().contains("token is expired");
        if is_told { Ok(()) } else { Err(health.to_string()) }
    })
    .await;

    let sending = tokio::spawn(async move { queue.send_message(Message::new("after")).await.map(drop) });
    write(&token(&key, now() + 3600));
    timeout(PATIENCE, sending).await.expect("in time").expect("the sender").expect("sent in the end");
    let after = next(&mut subscription).await;
    assert_eq!(&after.message().payload()[..], b"after");
    after.ack().await.expect("acknowledged");
    eventually(PATIENCE, || async {
        client.list_channels(Pattern::Queues, "").await.map(drop).map_err(|error| error.to_string())
    })
    .await;
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// What rules allow is enough for what they allow: a program that only sends, and one whose name a rule knows and no token tells.
#[tokio::test(flavor = "multi_thread")]
async fn rights_of_a_rule_are_enough() {
    let folder = tempfile::tempdir().expect("a folder");
    let rules = folder.path().join("rules.toml");
    let text = "[[rule]]\nclient = 'shop'\nchannel = 'orders'\nallow = ['write']\n[[rule]]\nclient = 'billing-.*'\nallow = ['read', 'write']\n";
    std::fs::write(&rules, text).expect("the rules");
    let broker = Broker::builder().listen("127.0.0.1:0").rules(&rules).start().await.expect("a broker");
    let bus = async |client: &str| bus_of(&format!("kubemq://{}?client_id={client}", broker.address())).await;
    let (shop, billing) = (bus("shop").await, bus("billing-1").await);
    let orders = shop.queue("orders");
    for body in ["one", "two"] {
        orders.send_message(Message::new(body)).await.expect("sent");
    }
    let error = orders.peek(None, 1).await.expect_err("it may not be read");
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    let error = shop.queue("bills").send_message(Message::new("x")).await.expect_err("not allowed");
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");

    let mut subscription = billing.queue("orders").subscribe(ConsumeOptions::default()).await.expect("a consumer");
    assert_eq!(take(&mut subscription, 2).await, ["one", "two"]);
    billing.queue("bills").send_message(Message::new("x")).await.expect("sent");
    let topic = billing.topic("prices");
    let mut alone = topic.subscribe(ConsumeOptions::default()).await.expect("a consumer");
    topic.send_message(Message::new("1")).await.expect("sent");
    assert_eq!(take(&mut alone, 1).await, ["1"]);
    shop.close().await.expect("closed");
    billing.close().await.expect("closed");
    broker.stop().await;
}
