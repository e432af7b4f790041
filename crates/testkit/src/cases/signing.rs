//! X5: signed messages. What was changed, sent elsewhere or again, or signed by somebody else, reaches no handler; what is
//! good does, before and after keys are rotated, and however often it is tried.

use std::time::Duration;

use polymq_core::{Attempt, Bus, Channel, ConsumerFactory, Failure, Message, State, dead_letter};
use polymq_signing::{PublicKeys, SIGNATURE, Signer, SigningKey, Verifier};

use crate::{
    Case, Cx,
    case::run,
    drive::{Log, closes, counted, dead_letters, next, quiet, retry_every, start, subscribe},
};

pub(super) const CASES: &[Case] = &[
    Case::new("X5_changed_messages", run!(changed_messages)).when(
        "no deduplication",
        |c| !c.deduplication,
        run!(repetitions_are_dropped),
    ),
    Case::new("X5_replayed_messages", run!(replayed_messages)).when(
        "no deduplication",
        |c| !c.deduplication,
        run!(repetitions_are_dropped),
    ),
    Case::new("X5_keys_are_rotated", run!(keys_are_rotated)),
];

fn key(id: &str) -> SigningKey {
    SigningKey::generate(id.to_owned()).expect("a key").0
}

fn known(keys: &[&SigningKey]) -> PublicKeys {
    keys.iter().fold(PublicKeys::new(), |known, key| known.with(key.id(), key.public()).expect("a public key"))
}

async fn signing(cx: &Cx, key: &SigningKey) -> Bus {
    cx.builder().layer(Signer::new(key.clone())).connect().await.expect("connect")
}

async fn verifying(cx: &Cx, keys: &[&SigningKey]) -> Bus {
    cx.builder().layer(Verifier::new(known(keys))).connect().await.expect("connect")
}

fn rich(body: &str) -> Message {
    Message::new(body.to_owned())
        .with_content_type("text/plain")
        .with_kind("order")
        .with_version(2)
        .with_key("key-1")
        .with_correlation_id("saga-1")
        .with_header("tenant", "acme é")
        .with_header("amount", "7")
}

async fn note_down(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
    log.add(&message, attempt.0);
    if &message.payload()[..] == b"good" && attempt.0 == 1 { Err(Failure::new("not yet")) } else { Ok(()) }
}

/// A signed message as it travels.
async fn on_the_wire(cx: &Cx, key: &SigningKey, queue: &Channel) -> Message {
    let bus = signing(cx, key).await;
    let queue = bus.channel(queue.address().clone());
    queue.send_message(rich("good")).await.expect("send");
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    let message = delivery.message().clone();
    delivery.ack().await.expect("ack");
    subscription.close().await.expect("close");
    closes(&bus).await;
    message
}

/// Handles what is there; gives what reached the handler, and why the others did not, by body.
async fn handled(bus: &Bus, queue: &Channel, good: u64, bad: usize) -> (Log, Vec<String>) {
    let queue = bus.channel(queue.address().clone());
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(bus);
    let route = consumers.state(log.clone()).route(queue.address().name(), note_down);
    route.policy(retry_every(Duration::from_millis(100), 3));
    let running = start(consumers).await;
    counted(&running, queue.address().name(), "handled", good).await;
    counted(&running, queue.address().name(), "dead_lettered", bad as u64).await;
    running.stop().await.expect("stop");
    let mut letters = dead_letters(bus, &queue).await;
    let mut reasons = Vec::new();
    for _ in 0..bad {
        let letter = next(&mut letters).await;
        reasons.push(letter.message().system_headers().get(dead_letter::REASON).unwrap_or_default().to_owned());
        letter.ack().await.expect("ack");
    }
    quiet(&mut letters).await;
    quiet(&mut subscribe(&queue).await).await;
    reasons.sort();
    (log, reasons)
}

/// Body, headers, attributes and destination cannot be changed, a signature cannot be taken off or be somebody else's;
/// the good message between them is handled, at its second attempt.
pub async fn changed_messages(cx: Cx) {
    let (ours, theirs) = (key("ours"), key("theirs"));
    let bare = cx.bus().await;
    let (queue, elsewhere) = (cx.queue(&bare), cx.queue(&bare));
    let good = on_the_wire(&cx, &ours, &queue).await;
    let of_elsewhere = on_the_wire(&cx, &ours, &elsewhere).await;
    let by_them = on_the_wire(&cx, &theirs, &queue).await;
    let mut unsigned = good.headers().clone();
    unsigned.remove(SIGNATURE);
    let changed = [
        good.clone().with_payload("gooD"),
        good.clone().with_header("amount", "8"),
        good.clone().with_header("more", "1"),
        good.clone().with_key("key-2"),
        good.clone().with_kind("refund"),
        good.clone().with_version(3),
        good.clone().with_content_type("application/json"),
        good.clone().with_correlation_id("saga-2"),
        good.clone().with_id("another"),
        good.clone().with_time(good.time().expect("a time") + Duration::from_secs(1)),
        of_elsewhere,
    ];
    let others =
        [good.clone().with_headers(unsigned), by_them, good.clone().with_header(SIGNATURE, "ed25519.ours.AAAA")];
    let bad = changed.len() + others.len();
    for message in changed.into_iter().chain([good]).chain(others) {
        queue.send_message(message).await.expect("send");
    }
    let bus = verifying(&cx, &[&ours]).await;
    let (log, reasons) = handled(&bus, &queue, 1, bad).await;
    assert_eq!(log.bodies(), ["good", "good"], "the good one, twice tried, and nothing else");
    let count = |text: &str| reasons.iter().filter(|reason| reason.contains(text)).count();
    assert_eq!(count("its signature is wrong"), 12, "{reasons:#?}");
    assert_eq!((count("it is not signed"), count("unknown key \"theirs\"")), (1, 1), "{reasons:#?}");
}

/// Where the broker itself drops repetitions, a message that is sent again under its id does not come again.
pub async fn repetitions_are_dropped(cx: Cx) {
    let bare = cx.bus().await;
    let queue = cx.queue(&bare);
    let good = on_the_wire(&cx, &key("ours"), &queue).await;
    queue.send_message(good).await.expect("taken, and dropped");
    quiet(&mut subscribe(&queue).await).await;
}

/// What was handled is not handled again when somebody sends it again; what is too old is not handled at all.
pub async fn replayed_messages(cx: Cx) {
    let ours = key("ours");
    let bare = cx.bus().await;
    let queue = cx.queue(&bare);
    let good = on_the_wire(&cx, &ours, &queue).await;
    let bus = verifying(&cx, &[&ours]).await;
    queue.send_message(good.clone()).await.expect("send");
    let (log, _) = handled(&bus, &queue, 1, 0).await;
    assert_eq!(log.len(), 2, "a retry is no replay: {:?}", log.all());
    queue.send_message(good.clone()).await.expect("send");
    let (log, reasons) = handled(&bus, &queue, 0, 1).await;
    assert_eq!((log.len(), reasons.len()), (0, 1), "{:?}", log.all());
    assert!(reasons[0].contains("handled already"), "{reasons:?}");

    let strict = Verifier::new(known(&[&ours])).window(Duration::from_secs(1));
    let bus = cx.builder().layer(strict).connect().await.expect("connect");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    queue.send_message(good).await.expect("send");
    let (log, reasons) = handled(&bus, &queue, 0, 1).await;
    assert!(log.len() == 0 && reasons[0].contains("longer than 1s ago"), "{reasons:?} {:?}", log.all());
}

/// While keys are rotated, both are believed; afterwards, the old one is not.
pub async fn keys_are_rotated(cx: Cx) {
    let (old, new) = (key("old"), key("new"));
    let bare = cx.bus().await;
    let queue = cx.queue(&bare);
    for (known, good, bad) in [(vec![&old, &new], 2, 0), (vec![&new], 1, 1)] {
        for key in [&old, &new] {
            let sender = signing(&cx, key).await;
            sender.channel(queue.address().clone()).send_message(rich("order")).await.expect("send");
            closes(&sender).await;
        }
        let bus = verifying(&cx, &known).await;
        let (log, reasons) = handled(&bus, &queue, good, bad).await;
        assert_eq!(log.len() as u64, good, "{reasons:?}");
        assert!(reasons.iter().all(|reason| reason.contains("unknown key \"old\"")), "{reasons:?}");
        // What a consumer that is dropped was waiting for may be lent to it.
        closes(&bus).await;
    }
}
