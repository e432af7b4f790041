//! Which handler a message reaches.
#![allow(missing_docs)]

mod common;

use common::{Log, Order, assert_empty, bus, dead_letter, order};
use polymq_core::{
    Bus, ConsumerFactory, ConsumerRunner, Environment, ErrorKind, Failure, Kinds, Message, State,
    dead_letter::{REASON, SOURCE},
};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
struct Created {
    id: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Cancelled {
    id: u64,
    why: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct CreatedV2 {
    id: u64,
    customer: String,
}

async fn typed_bus(space: &str) -> Bus {
    let mut kinds = Kinds::new();
    kinds.bind::<Created>("order.created", 1).expect("free");
    kinds.bind::<CreatedV2>("order.created", 2).expect("free");
    kinds.bind::<Cancelled>("order.cancelled", None).expect("free");
    let builder = Bus::builder().url(format!("memory://{space}")).environment(Environment::default());
    builder.kinds(kinds).connect().await.expect("connects")
}

async fn created(event: Created, log: State<Log>) {
    log.add(format!("created {}", event.id));
}

async fn created_v2(event: CreatedV2, log: State<Log>) {
    log.add(format!("created v2 {} for {}", event.id, event.customer));
}

async fn cancelled(event: Cancelled, log: State<Log>) {
    log.add(format!("cancelled {} because {}", event.id, event.why));
}

#[tokio::test(start_paused = true)]
async fn d2_each_route_gets_only_its_queue() {
    let bus = bus("d2").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("a", async |order: Order, log: State<Log>| log.add(format!("a {}", order.id)));
    consumers.route("b", async |order: Order, log: State<Log>| log.add(format!("b {}", order.id)));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("a").send(&order(1)).await.expect("sent");
    bus.queue("b").send(&order(2)).await.expect("sent");
    let mut entries = log.wait(2).await;
    entries.sort();
    assert_eq!(entries, ["a 1", "b 2"]);
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn d8_d9_kinds_and_versions_reach_their_functions() {
    let bus = typed_bus("d8").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("events", created);
    consumers.route("events", created_v2);
    consumers.route("events", cancelled);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let events = bus.queue("events");
    events.send(&Created { id: 1 }).await.expect("sent");
    events.send(&Cancelled { id: 1, why: "late".into() }).await.expect("sent");
    events.send(&CreatedV2 { id: 2, customer: "acme".into() }).await.expect("sent");
    assert_eq!(log.wait(3).await, ["created 1", "cancelled 1 because late", "created v2 2 for acme"]);

    let third = events.message(&Created { id: 3 }).expect("encodes").with_version(3);
    events.send_message(third).await.expect("sent");
    let letter = dead_letter(&bus, "events").await;
    let headers = letter.message().system_headers();
    assert_eq!(headers.get(REASON), Some("no handler for the kind order.created version 3"));
    assert_eq!(headers.get(SOURCE), Some("queue events"));
    letter.ack().await.expect("acked");
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn c16_what_nobody_handles_is_dead_lettered_and_counted() {
    let bus = typed_bus("c16").await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Log::default());
    consumers.route("events", created);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let events = bus.queue("events");
    events.send_message(Message::new("{}").with_content_type("application/json")).await.expect("sent");
    let letter = dead_letter(&bus, "events").await;
    let reason = letter.message().system_headers().get(REASON).map(str::to_owned);
    assert_eq!(reason.as_deref(), Some("no handler for a message without a kind"));
    letter.ack().await.expect("acked");
    let stats = running.stats("events").expect("known");
    assert_eq!((stats.unwanted, stats.handled, stats.dead_lettered), (1, 0, 1));
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn d10_only_the_handler_that_failed_is_called_again() {
    let bus = bus("d10").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    async fn first(order: Order, log: State<Log>) {
        log.add(format!("first {}", order.id));
    }
    async fn second(order: Order, log: State<Log>) -> Result<(), Failure> {
        log.add(format!("second {}", order.id));
        if log.entries().len() < 3 { Err(Failure::new("not yet")) } else { Ok(()) }
    }
    consumers.route("orders", first).also("second", second);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    assert_eq!(log.wait(3).await, ["first 1", "second 1", "second 1"]);
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test]
async fn a_state_that_nobody_gave_is_refused_at_start() {
    let bus = typed_bus("states").await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("events", created);
    let error = ConsumerRunner::new(consumers).start().await.expect_err("no handler could ever be called");
    assert_eq!(error.kind(), ErrorKind::Config);
    let text = error.to_string();
    assert!(text.contains("dispatch::created of queue events needs a state of type dispatch::common::Log"), "{text}");
    assert!(text.ends_with("call ConsumerFactory::state before the runner starts"), "{text}");

    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Log::default());
    consumers.route("events", created).also("again", async |_: State<u64>| {});
    let text = consumers.check().expect_err("the second one's").to_string();
    assert!(text.contains("a state of type u64"), "{text}");
}

#[tokio::test]
async fn d11_two_handlers_of_one_queue_and_kind_are_refused_by_name() {
    let bus = typed_bus("d11").await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Log::default());
    consumers.route("events", created);
    consumers.route("events", async |_: Created| {});
    let error = consumers.check().expect_err("a conflict");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let text = error.to_string();
    assert!(text.contains("dispatch::created") && text.contains("closure"), "{text}");
    assert!(text.contains("order.created version 1 of queue events"), "{text}");

    let refused = ConsumerRunner::new(consumers).start().await.expect_err("at start too");
    assert_eq!((refused.kind(), refused.to_string()), (ErrorKind::Conflict, text));

    let mut kinds = Kinds::new();
    kinds.bind::<Created>("same", None).expect("free");
    assert_eq!(kinds.bind::<Cancelled>("same", None).expect_err("taken").kind(), ErrorKind::Conflict);
}
