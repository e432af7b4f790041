//! Which handler a message reaches.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use crate::common::{Log, Order, assert_empty, bus, dead_letter, order};
use polymq_core::{
    Address, Attempt, Bus, ConsumeOptions, ConsumerFactory, ConsumerRunner, DeadLetters, Environment, ErrorKind,
    Failure, FailurePolicy, Fate, IntoOutcome, Kinds, Message, Outcome, Route, Running, Start, State,
    dead_letter::{REASON, SOURCE},
    serializers::Accept,
};
use serde::{Deserialize, Serialize};

const SECOND: Duration = Duration::from_secs(1);

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

/// What each handler does with an attempt.
type Part = fn(u32) -> Outcome;

/// Two handlers of one queue, whose calls are logged by name and number.
async fn two(space: &str, first: Part, second: Part) -> (Bus, Log, Running) {
    let (bus, log) = (bus(space).await, Log::default());
    let part = |name: &'static str, part: Part| {
        let (log, calls) = (log.clone(), Arc::new(AtomicU32::new(0)));
        move || {
            let call = calls.fetch_add(1, Ordering::SeqCst) + 1;
            log.add(format!("{name} {call}"));
            std::future::ready(part(call))
        }
    };
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", part("first", first)).also("second", part("second", second));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    (bus, log, running)
}

fn fails_once(call: u32) -> Outcome {
    if call == 1 { Outcome::retry("not yet") } else { Outcome::Ack }
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_drops_the_message_does_not_drop_it_for_the_other() {
    let (bus, log, running) = two("also-drop", |_| Outcome::drop("of no use"), fails_once).await;
    bus.queue("orders").send(&order(1)).await.expect("sent");
    assert_eq!(log.wait(3).await, ["first 1", "second 1", "second 2"]);
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.failed, stats.retried, stats.handled, stats.dropped), (1, 1, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_rejects_does_not_end_the_attempts_of_the_other() {
    let (bus, log, running) = two("also-reject", |_| Outcome::reject("bad customer"), fails_once).await;
    bus.queue("orders").send(&order(1)).await.expect("sent");
    assert_eq!(log.wait(4).await, ["first 1", "second 1", "first 2", "second 2"]);
    let letter = dead_letter(&bus, "orders").await;
    assert_eq!(letter.message().system_headers().get(REASON), Some("bad customer"));
    letter.ack().await.expect("acked");
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn a_body_that_several_cannot_decode_has_the_fate_of_such_bodies() {
    let bus = bus("also-undecodable").await;
    let mut consumers = ConsumerFactory::new(&bus);
    let policy = FailurePolicy { undecodable: Fate::Drop, pause_after_failures: Some(1), ..FailurePolicy::default() };
    let route = consumers.route("orders", async |_: Order| {}).also("second", async |_: Order| {});
    route.policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let broken = Message::new("{").with_content_type("application/json");
    bus.queue("orders").send_message(broken).await.expect("sent");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    while running.stats("orders").expect("known").handled == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.undecodable, stats.dropped, stats.failed, stats.dead_lettered), (1, 1, 0, 0), "{stats:?}");
    assert!(!stats.paused, "a body is no failure of a handler");
    running.stop().await.expect("stops");
}

#[tokio::test]
async fn handlers_that_see_each_message_have_names_of_their_own() {
    let bus = bus("also-names").await;
    for (name, other) in [("audit", "audit"), ("a,b", "a;b"), ("", "x")] {
        let mut consumers = ConsumerFactory::new(&bus);
        let route = consumers.route("orders", async |_: Order| {}).also(name, async |_: Order| {});
        route.also(other, async |_: Order| {});
        let error = consumers.check().expect_err("what has succeeded is known by its name");
        assert_eq!(error.kind(), ErrorKind::Conflict);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_waits_for_the_other_handler() {
    let (bus, log, running) = two("also-answer", |_| polymq_core::Answer(7).into_outcome(), fails_once).await;
    let reply = bus.request("orders", &order(1)).await.expect("answered");
    assert_eq!(reply.decode::<u64>().expect("decodes"), 7);
    assert_eq!(log.entries(), ["first 1", "second 1", "first 2", "second 2"]);
    running.stop().await.expect("stops");
}

#[tokio::test]
async fn a_state_that_nobody_gave_is_refused_at_start() {
    let bus = typed_bus("states").await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("events", created);
    let error = ConsumerRunner::new(consumers).start().await.expect_err("no handler could ever be called");
    assert_eq!(error.kind(), ErrorKind::Config);
    let text = error.to_string();
    assert!(
        text.contains("behaviour::dispatch::created of queue events needs a state of type behaviour::common::Log"),
        "{text}"
    );
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
    assert!(text.contains("behaviour::dispatch::created") && text.contains("closure"), "{text}");
    assert!(text.contains("order.created version 1 of queue events"), "{text}");

    let refused = ConsumerRunner::new(consumers).start().await.expect_err("at start too");
    assert_eq!((refused.kind(), refused.to_string()), (ErrorKind::Conflict, text));

    let mut kinds = Kinds::new();
    kinds.bind::<Created>("same", None).expect("free");
    assert_eq!(kinds.bind::<Cancelled>("same", None).expect_err("taken").kind(), ErrorKind::Conflict);
}

#[tokio::test(start_paused = true)]
async fn each_handler_of_a_channel_has_its_own_time_out() {
    let bus = typed_bus("time-outs").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    async fn slow(event: Cancelled, log: State<Log>) {
        tokio::time::sleep(90 * SECOND).await;
        log.add(format!("cancelled {}", event.id));
    }
    let once = FailurePolicy { max_attempts: 1, ..FailurePolicy::default() };
    consumers.route("events", async |_: Created| std::future::pending::<()>().await).timeout(SECOND).policy(once);
    consumers.route("events", async |_: CreatedV2| std::future::pending::<()>().await).timeout(60 * SECOND);
    consumers.route("events", slow);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let began = tokio::time::Instant::now();
    let took = async |limit: u32| {
        dead_letter(&bus, "events").await.ack().await.expect("acked");
        let took = began.elapsed();
        assert!(took >= limit * SECOND && took < (limit + 1) * SECOND, "{took:?} of {limit} s");
    };
    bus.queue("events").send(&Created { id: 1 }).await.expect("sent");
    took(1).await;
    bus.queue("events").send(&CreatedV2 { id: 2, customer: "acme".into() }).await.expect("sent");
    took(61).await;
    bus.queue("events").send(&Cancelled { id: 3, why: "late".into() }).await.expect("sent");
    assert_eq!(log.wait(1).await, ["cancelled 3"], "without a time-out it takes as long as it takes");
    let stats = running.stats("events").expect("known");
    assert_eq!((stats.timed_out, stats.handled), (2, 1));
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn what_any_handler_of_a_channel_asks_for_holds() {
    let bus = typed_bus("asks").await;
    let with_second = |ask: fn(&mut Route)| {
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.state(Log::default());
        consumers.route("events", async |_: Created| tokio::time::sleep(60 * SECOND).await);
        ask(consumers.route("events", cancelled));
        ConsumerRunner::new(consumers)
    };
    // The memory backend refuses both, so they have reached it.
    let refused = with_second(|route| {
        route.with("colour", "red");
    })
    .start()
    .await
    .expect_err("unknown");
    assert!(refused.to_string().contains("unknown option \"colour\""), "{refused}");
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Log::default());
    consumers.route("news", created).group("g");
    consumers.route("news", cancelled).group("g").start(Start::Earliest);
    assert_eq!(consumers.check().expect_err("no replay").kind(), ErrorKind::Unsupported);

    let running = with_second(|route| {
        route.prefetch(1);
    })
    .start()
    .await
    .expect("starts");
    for id in 0..5 {
        bus.queue("events").send(&Created { id }).await.expect("sent");
    }
    tokio::time::sleep(SECOND).await;
    let stats = bus.queue("events").stats(None).await.expect("counts");
    assert_eq!((stats.ready, stats.unsettled), (4, Some(1)), "a prefetch of one");
    running.force();
    running.stop().await.expect("stops");
}

#[tokio::test]
async fn handlers_of_one_channel_that_contradict_each_other_are_refused() {
    type Ask = fn(&mut Route);
    let bus = typed_bus("contradictions").await;
    let check = |first: Ask, second: Ask| {
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.state(Log::default());
        first(consumers.route("events", created));
        second(consumers.route("events", cancelled));
        consumers.check()
    };
    let contradictions: [(&str, Ask, Ask); 6] = [
        (
            "prefetches",
            |route| {
                route.prefetch(10);
            },
            |route| {
                route.prefetch(50);
            },
        ),
        (
            "prefetches in bytes",
            |route| {
                route.prefetch_bytes(10);
            },
            |route| {
                route.prefetch_bytes(50);
            },
        ),
        (
            "leases",
            |route| {
                route.lease(SECOND, SECOND);
            },
            |route| {
                route.lease(SECOND, 2 * SECOND);
            },
        ),
        (
            "places to start at",
            |route| {
                route.start(Start::New);
            },
            |route| {
                route.start(Start::Earliest);
            },
        ),
        (
            "content types",
            |route| {
                route.accept(Accept::any());
            },
            |route| {
                route.accept(Accept::only(["application/json"]));
            },
        ),
        (
            "values of \"qos\"",
            |route| {
                route.with("qos", "0");
            },
            |route| {
                route.with("qos", "1");
            },
        ),
    ];
    for (what, one, other) in contradictions {
        let error = check(one, other).expect_err("a contradiction");
        assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
        let sentence = format!("the handlers of queue events ask for different {what}; they share one subscription");
        assert!(error.to_string().contains(&sentence), "{error}");
        check(one, one).expect("said twice");
        check(one, |_| ()).expect("said by the first");
        check(|_| (), one).expect("said by the second");
    }
}

#[tokio::test]
async fn a_name_too_long_for_its_dead_letters_is_refused_at_start() {
    let bus = bus("too-long").await;
    let long = "q".repeat(198);
    let refused = |route: fn(&mut ConsumerFactory)| {
        let mut consumers = ConsumerFactory::new(&bus);
        route(&mut consumers);
        let error = consumers.check().expect_err("refused");
        assert_eq!((error.kind(), error.operation()), (ErrorKind::InvalidInput, Some("start")), "{error}");
        error.to_string()
    };
    let text = refused(|consumers| {
        consumers.route("q".repeat(198), async |_: Order| {});
    });
    let dead = "q".repeat(198) + ".dlq";
    assert!(text.contains(&format!("dead letters cannot be kept in {dead:?}: ")), "{text}");
    assert!(text.contains("is longer than 200 bytes; shorten the names"), "{text}");
    refused(|consumers| {
        consumers.route("t".repeat(100), async |_: Order| {}).group("g".repeat(96));
    });
    let error = bus.queue(long.as_str()).subscribe(ConsumeOptions::default()).await.expect_err("refused");
    assert_eq!((error.kind(), error.channel()), (ErrorKind::InvalidInput, Some(&*long)), "{error}");

    let elsewhere = FailurePolicy { dead_letters: DeadLetters::To(Address::queue("dead")), ..FailurePolicy::default() };
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route(long.clone(), async |_: Order| {}).policy(elsewhere);
    consumers.check().expect("its dead letters have a place");
    bus.queue(long).send(&order(1)).await.expect("sending needs none");
}

/// The time-out is that of each handler: when one hangs, the success of the other is not lost with it.
#[tokio::test(start_paused = true)]
async fn a_handler_that_hangs_does_not_have_the_other_called_again() {
    let (bus, log) = (bus("also-hangs").await, Log::default());
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    let hangs_once = async |attempt: Attempt, log: State<Log>| {
        log.add(format!("second {}", attempt.0));
        if attempt.0 == 1 {
            std::future::pending::<()>().await;
        }
    };
    let route = consumers.route("orders", async |log: State<Log>| log.add("first")).also("second", hangs_once);
    route.timeout(Duration::from_secs(5));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    assert_eq!(log.wait(3).await, ["first", "second 1", "second 2"]);
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.timed_out, stats.handled), (1, 1), "{stats:?}");
}
