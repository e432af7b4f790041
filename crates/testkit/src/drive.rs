//! What the cases have in common: sending, taking, and looking that nothing comes.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq_core::{
    Backoff, Bus, Channel, ConsumeOptions, ConsumerFactory, ConsumerRunner, Delivery, Error, ErrorKind, FailurePolicy,
    Message, MessageId, Order, Running, Subscription,
};
use tokio::time::Instant;

use crate::{Cx, PATIENCE, QUIET, cx::lock, eventually};

/// `count` bodies that tell messages apart.
pub(crate) fn bodies(count: usize) -> impl Iterator<Item = String> + Clone {
    (0..count).map(|n| format!("m-{n:06}"))
}

/// Sends these bodies in order; every one must be accepted.
pub(crate) async fn publish(channel: &Channel, bodies: impl IntoIterator<Item = String>) {
    let results = channel.send_all(bodies.into_iter().map(Message::new)).await;
    for result in results {
        result.expect("the broker accepts the message");
    }
}

/// Has the broker make one more queue, before it is killed. RabbitMQ 3.10 writes what it declares in order, but was seen to
/// forget the last one, with all that it had confirmed, when it was killed a tenth of a second later.
pub(crate) async fn is_written_down(cx: &Cx, bus: &Bus) {
    publish(&cx.queue(bus), ["last".to_owned()]).await;
}

pub(crate) async fn subscribe(channel: &Channel) -> Subscription {
    subscribe_with(channel, ConsumeOptions::default()).await
}

pub(crate) async fn subscribe_with(channel: &Channel, options: ConsumeOptions) -> Subscription {
    channel.subscribe(options).await.expect("subscribe")
}

pub(crate) fn prefetch(messages: usize) -> ConsumeOptions {
    ConsumeOptions { prefetch: messages, ..ConsumeOptions::default() }
}

pub(crate) fn text(delivery: &Delivery) -> String {
    String::from_utf8_lossy(delivery.message().payload()).into_owned()
}

/// The next message, which must come.
pub(crate) async fn next(subscription: &mut Subscription) -> Delivery {
    match tokio::time::timeout(PATIENCE, subscription.next()).await {
        Ok(delivery) => delivery.expect("receive"),
        Err(_) => panic!("no message within {PATIENCE:?}"),
    }
}

/// The next `count` messages, unsettled; waits for as long as there are more and more.
pub(crate) async fn take(subscription: &mut Subscription, count: usize) -> Vec<Delivery> {
    let mut taken = Vec::with_capacity(count);
    while taken.len() < count {
        let more = subscription.receive(count - taken.len(), PATIENCE).await.expect("receive");
        assert!(!more.is_empty(), "{} of {count} messages, and no more within {PATIENCE:?}", taken.len());
        taken.extend(more);
    }
    taken
}

/// What a queue of its own makes of a message.
pub(crate) async fn round_trip(cx: &Cx, message: Message) -> Delivery {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    queue.send_message(message).await.expect("send");
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    quiet(&mut subscription).await;
    delivery
}

/// The bodies of the next `count` messages, acknowledged.
pub(crate) async fn take_acked(subscription: &mut Subscription, count: usize) -> Vec<String> {
    let mut seen = Vec::with_capacity(count);
    for delivery in take(subscription, count).await {
        seen.push(text(&delivery));
        delivery.ack().await.expect("ack");
    }
    seen
}

/// Nothing more comes.
pub(crate) async fn quiet(subscription: &mut Subscription) {
    let more = subscription.receive(10, QUIET).await.expect("receive");
    let more: Vec<_> = more.iter().map(|delivery| (text(delivery), delivery.attempt())).collect();
    assert!(more.is_empty(), "these came although nothing may come: {more:?}");
}

/// The dead letters of a queue.
pub(crate) async fn dead_letters(bus: &Bus, channel: &Channel) -> Subscription {
    subscribe(&bus.channel(channel.address().dead_letters(None))).await
}

/// What came without a key, in its order where the backend promises one; sorted where it does not.
pub(crate) fn in_order(cx: &Cx, mut seen: Vec<String>) -> Vec<String> {
    if matches!(cx.capabilities().order, Order::None | Order::PerKey) {
        seen.sort();
    }
    seen
}

/// The error of something that must fail with one of these kinds.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, Error>, kinds: &[ErrorKind]) -> Error {
    let error = result.expect_err("this must be refused");
    assert!(kinds.contains(&error.kind()), "{error:?} is none of {kinds:?}");
    error
}

/// Retries after exactly this long.
pub(crate) fn retry_every(delay: Duration, max_attempts: u32) -> FailurePolicy {
    FailurePolicy { max_attempts, backoff: Backoff::fixed(delay), ..FailurePolicy::default() }
}

pub(crate) async fn start(consumers: ConsumerFactory) -> Running {
    ConsumerRunner::new(consumers).start().await.expect("start")
}

/// A runner whose handlers were cancelled has stopped. A broker may be slower to let its consumer go than the runner waits, and
/// then the stop says so; with none, it must be done. Gives whether it was.
pub(crate) fn assert_stopped(cx: &Cx, stopped: Result<(), Error>) -> bool {
    if let Err(error) = &stopped {
        assert!(error.kind() == ErrorKind::Timeout && cx.harness().broker().is_some(), "{error:?}");
        cx.note(format_args!("the broker was slow to let a consumer go: {error}"));
    }
    stopped.is_ok()
}

/// What handlers have seen, in order; given to them as a state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<Seen>>>);

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    pub(crate) body: String,
    pub(crate) id: Option<MessageId>,
    pub(crate) attempt: u32,
    pub(crate) at: Instant,
}

impl Log {
    pub(crate) fn add(&self, message: &Message, attempt: u32) {
        let body = String::from_utf8_lossy(message.payload()).into_owned();
        lock(&self.0).push(Seen { body, id: message.id().cloned(), attempt, at: Instant::now() });
    }

    pub(crate) fn all(&self) -> Vec<Seen> {
        lock(&self.0).clone()
    }

    pub(crate) fn bodies(&self) -> Vec<String> {
        self.all().into_iter().map(|seen| seen.body).collect()
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.0).len()
    }

    /// Those of one body.
    pub(crate) fn of(&self, body: &str) -> Vec<Seen> {
        self.all().into_iter().filter(|seen| seen.body == body).collect()
    }

    /// Waits until there are `count`, for as long as there are more and more.
    pub(crate) async fn reaches(&self, count: usize) {
        let mut before = self.len();
        while before < count {
            before = eventually(PATIENCE * 2, || async {
                let seen = self.len();
                if seen > before { Ok(seen) } else { Err(format!("{seen} of {count} calls of the handler")) }
            })
            .await;
        }
    }
}

/// Waits until a counter of a subscription has this value or more.
pub(crate) async fn counted(running: &Running, name: &str, what: &str, at_least: u64) {
    counted_within(PATIENCE * 2, running, name, what, at_least).await;
}

pub(crate) async fn counted_within(within: Duration, running: &Running, name: &str, what: &str, at_least: u64) {
    eventually(within, || async {
        let stats = running.stats(name).expect("a running subscription");
        let value = match what {
            "handled" => stats.handled,
            "retried" => stats.retried,
            "dead_lettered" => stats.dead_lettered,
            "running" => stats.running,
            "dropped" => stats.dropped,
            _ => panic!("no counter {what}"),
        };
        if value >= at_least { Ok(()) } else { Err(format!("{what} is {value}, not {at_least}: {stats:?}")) }
    })
    .await;
}

/// What waits in a queue, taken over a fresh connection until nothing comes for a while. A short silence counts only when
/// so many different ones have come, and a message that says that the subscription is served: joining a group takes its time
/// on some brokers.
pub(crate) async fn rest(cx: &Cx, queue: &Channel, at_least: usize) -> Vec<String> {
    rest_until(cx, queue, |seen| seen.iter().collect::<HashSet<_>>().len() >= at_least).await
}

/// The same, where a short silence counts when these are enough.
pub(crate) async fn rest_until(cx: &Cx, queue: &Channel, enough: impl Fn(&[String]) -> bool) -> Vec<String> {
    const SERVED: &str = "the subscription is served";
    let bus = cx.bus().await;
    let channel = bus.channel(queue.address().clone());
    let mut subscription = subscribe(&channel).await;
    publish(&channel, [SERVED.to_owned()]).await;
    let (mut seen, mut served) = (Vec::new(), false);
    loop {
        let wait = if served && enough(&seen) { Duration::from_secs(2) } else { PATIENCE };
        let batch = subscription.receive(100, wait).await.expect("receive");
        if batch.is_empty() {
            break;
        }
        for delivery in batch {
            match text(&delivery) {
                body if body == SERVED => served = true,
                body => seen.push(body),
            }
            delivery.ack().await.expect("ack");
        }
    }
    assert!(served, "the subscription is served within {PATIENCE:?}");
    closes(&bus).await;
    seen
}

/// How long closing waits for answers.
pub(crate) const CLOSE_FOR: Duration = Duration::from_secs(5);

/// Closes, within its time. A broker that stands still for longer than closing waits is told of, and what it was not told in time,
/// such as an acknowledgement, may come again: gives whether it was told everything.
///
/// # Panics
/// When closing takes for ever, fails in another way, or gives up too soon.
pub async fn closes(bus: &Bus) -> bool {
    // The real clock: with a paused one there is no broker to wait for.
    let began = std::time::Instant::now();
    match tokio::time::timeout(PATIENCE, bus.close()).await.expect("closing is bounded") {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::Timeout && began.elapsed() >= CLOSE_FOR => false,
        Err(error) => panic!("close: {error:?}"),
    }
}

/// How often each occurs.
pub(crate) fn counts<T: Ord>(items: impl IntoIterator<Item = T>) -> BTreeMap<T, usize> {
    let mut counts = BTreeMap::new();
    items.into_iter().for_each(|item| *counts.entry(item).or_default() += 1);
    counts
}
