//! X2: the context of a trace and the correlation id stay with a message, whatever happens to it on its way.

use std::{sync::Arc, time::Duration};

use polymq_core::{
    Answer, Attempt, Batch, Bus, ConsumerFactory, Context, Environment, Failure, FailurePolicy, HandlerPair, Message,
    RetryMode, State, replay_dead_letters,
};

use crate::{
    Case, Cx, PATIENCE,
    case::run,
    cx::lock,
    drive::{counted, dead_letters, next, quiet, retry_every, start, subscribe},
};

pub(super) const CASES: &[Case] = &[
    Case::new("X2_context_survives_retries", run!(retries)),
    Case::new("X2_context_survives_dead_letters", run!(letters)),
    Case::new("X2_context_survives_batches", run!(batches)),
    Case::new("X2_context_survives_a_bridge", run!(bridge)),
    Case::new("X2_context_reaches_replies", run!(replies)).when(
        "request_reply",
        |c| c.request_reply,
        run!(super::requests::refused_by_capability),
    ),
];

const SHORT: Duration = Duration::from_millis(100);

/// The headers of W3C Trace Context and Baggage.
const HEADERS: [&str; 3] = ["traceparent", "tracestate", "baggage"];

/// A message in a trace of its own.
fn traced(n: usize) -> Message {
    Message::new(format!("m-{n}"))
        .with_content_type("text/plain")
        .with_correlation_id(format!("saga-{n}"))
        .with_header("traceparent", format!("00-4bf92f3577b34da6a3ce929d0e0e{n:04x}-00f067aa0ba902b7-01"))
        .with_header("tracestate", format!("vendor=t61rcWkgMzE,other={n}"))
        .with_header("baggage", format!("user=é{n};ttl=5"))
}

#[track_caller]
fn assert_context(got: &Message, sent: &Message, when: &str) {
    assert_eq!(got.correlation_id(), sent.correlation_id(), "the correlation id {when}");
    for name in HEADERS {
        assert_eq!(got.headers().get(name), sent.headers().get(name), "{name} {when}");
    }
}

/// Whole messages that handlers have seen, with the number of the attempt.
#[derive(Debug, Clone, Default)]
struct Seen(Arc<std::sync::Mutex<Vec<(Message, u32)>>>);

impl Seen {
    fn add(&self, message: Message, attempt: u32) {
        lock(&self.0).push((message, attempt));
    }

    fn all(&self) -> Vec<(Message, u32)> {
        lock(&self.0).clone()
    }
}

async fn fails_twice(message: Message, attempt: Attempt, seen: State<Seen>) -> Result<(), Failure> {
    seen.add(message, attempt.0);
    let calls = seen.all().len();
    if calls <= 2 { Err(Failure::new("not yet")) } else { Ok(()) }
}

/// Every attempt sees the context, whether the message came from the broker again or was tried again in place.
pub async fn retries(cx: Cx) {
    let bus = cx.bus().await;
    for mode in [RetryMode::Redeliver, RetryMode::InPlace] {
        let queue = cx.queue(&bus);
        let seen = Seen::default();
        let mut consumers = ConsumerFactory::new(&bus);
        let route = consumers.state(seen.clone()).route(queue.address().name(), fails_twice);
        route.policy(FailurePolicy { mode, ..retry_every(SHORT, 5) });
        if consumers.check().is_err() {
            assert!(!cx.capabilities().delayed_retry.support.is_available(), "refused although it is declared");
            continue;
        }
        let running = start(consumers).await;
        let sent = traced(1);
        queue.send_message(sent.clone()).await.expect("send");
        counted(&running, queue.address().name(), "handled", 1).await;
        running.stop().await.expect("stop");
        assert_eq!(seen.all().len(), 3, "three attempts");
        for (number, (message, _)) in seen.all().into_iter().enumerate() {
            assert_context(&message, &sent, &format!("at attempt {} ({mode:?})", number + 1));
        }
    }
}

/// A dead letter has the context of its message, and so has what is replayed from it.
pub async fn letters(cx: Cx) {
    async fn fail(_: Message) -> Result<(), Failure> {
        Err(Failure::permanent("bad"))
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route(queue.address().name(), fail);
    let running = start(consumers).await;
    let sent = traced(2);
    for _ in 0..2 {
        queue.send_message(sent.clone()).await.expect("send");
    }
    counted(&running, queue.address().name(), "dead_lettered", 2).await;
    running.stop().await.expect("stop");
    let mut letters = dead_letters(&bus, &queue).await;
    let letter = next(&mut letters).await;
    assert_context(letter.message(), &sent, "in the dead letter");
    letter.ack().await.expect("ack");
    letters.close().await.expect("close");
    let replayed = replay_dead_letters(&bus, queue.address(), 1, PATIENCE).await.expect("replay");
    assert_eq!(replayed, 1);
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    assert_context(delivery.message(), &sent, "after the replay");
    delivery.ack().await.expect("ack");
}

/// Messages that are sent together and handled together keep each its own.
pub async fn batches(cx: Cx) {
    const COUNT: usize = 25;
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let seen = Seen::default();
    let of_handler = seen.clone();
    let handler = move |batch: Batch<Context>| {
        let seen = of_handler.clone();
        async move { batch.iter().for_each(|one| seen.add(one.message().clone(), one.attempt())) }
    };
    for result in queue.send_all((0..COUNT).map(traced)).await {
        result.expect("sent");
    }
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route_batch(queue.address().name(), 10, handler);
    let running = start(consumers).await;
    counted(&running, queue.address().name(), "handled", COUNT as u64).await;
    running.stop().await.expect("stop");
    let all = seen.all();
    assert_eq!(all.len(), COUNT);
    for n in 0..COUNT {
        let sent = traced(n);
        let (got, _) = all.iter().find(|(got, _)| got.payload() == sent.payload()).expect("each was handled");
        assert_context(got, &sent, "in a batch");
    }
}

/// What is moved to another backend, and from there, has its context there.
pub async fn bridge(cx: Cx) {
    let bus = cx.bus().await;
    let memory = Bus::builder().environment(Environment::default());
    let memory = memory.url(format!("memory://bridge-{:016x}", fastrand::u64(..))).connect().await.expect("memory");
    for (number, (from, to)) in [(&bus, &memory), (&memory, &bus)].into_iter().enumerate() {
        let name = cx.name();
        let sent = traced(number);
        from.queue(name.as_str()).send_message(sent.clone()).await.expect("send");
        let pair = HandlerPair::new(name.as_str(), from, to);
        let running = pair.bridge().await.expect("a bridge").start().await.expect("start");
        let mut subscription = subscribe(&to.queue(name.as_str())).await;
        let delivery = next(&mut subscription).await;
        assert_context(delivery.message(), &sent, if number == 0 { "from here" } else { "to here" });
        delivery.ack().await.expect("ack");
        quiet(&mut subscription).await;
        running.stop().await.expect("stop");
    }
}

/// The reply to a request belongs to the trace of the request, unless the handler's own layers say otherwise.
pub async fn replies(cx: Cx) {
    async fn echo(text: String) -> Answer<String> {
        Answer(text)
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route(queue.address().name(), echo).concurrency(4);
    let running = start(consumers).await;
    for n in 0..5 {
        let sent = traced(n);
        let request = queue.message(&format!("text {n}")).expect("encode").with_headers(sent.headers().clone());
        let reply = queue.request_message(request).await.expect("a reply");
        assert_eq!(reply.decode::<String>().expect("text"), format!("text {n}"));
        for name in &HEADERS[..2] {
            assert_eq!(reply.message().headers().get(name), sent.headers().get(name), "{name} of the reply");
        }
    }
    running.stop().await.expect("stop");
}
