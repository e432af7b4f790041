//! Topology, prefixes, filters, bindings, looking into channels, and handlers one message at a time.

use std::time::Duration;

use crate::common::{Log, Order, bus, order};
use polymq_core::{
    Address, Bus, ConsumeOptions, ConsumerFactory, ConsumerRunner, DeadLetters, Environment, ErrorKind, FailurePolicy,
    Kinds, Message, RetryMode, State, StepState, Topology,
};

const SOON: Duration = Duration::from_secs(5);
const QUIET: Duration = Duration::from_millis(20);

async fn logs(order: Order, log: State<Log>) {
    log.add(order.id.to_string());
}

/// D18: a step handles exactly one message; the next waits until it is its turn.
#[tokio::test(start_paused = true)]
async fn d18_a_step_handles_exactly_one_message() {
    let bus = bus("d18").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("orders", logs);
    consumers.route("returns", logs);
    let mut stepper = ConsumerRunner::new(consumers).stepper().await.expect("subscribes");
    for id in 1..=3 {
        bus.queue("orders").send(&order(id)).await.expect("sent");
    }
    for id in 1..=3_usize {
        assert_eq!(log.entries().len(), id - 1, "nothing runs between the steps");
        assert!(stepper.step(SOON).await.expect("a message"));
        assert_eq!(log.entries().len(), id);
        tokio::time::sleep(SOON).await;
    }
    assert!(!stepper.step(QUIET).await.expect("no message"));
    bus.queue("returns").send(&order(9)).await.expect("sent");
    assert!(stepper.step(SOON).await.expect("of the other queue"));
    assert_eq!(log.entries(), ["1", "2", "3", "9"]);
    bus.queue("orders").send(&order(4)).await.expect("sent");
    stepper.close().await.expect("closed");
    assert_eq!(bus.queue("orders").stats(None).await.expect("counts").ready, 1, "what was not handled is back");
    crate::common::assert_empty(&bus, "returns").await;
}

/// D18: a step settles by the failure policy; a retry is a step of its own.
#[tokio::test(start_paused = true)]
async fn d18_a_retry_is_a_step_of_its_own() {
    let bus = bus("d18-retry").await;
    let mut consumers = ConsumerFactory::new(&bus);
    let policy = FailurePolicy { max_attempts: 2, ..FailurePolicy::default() };
    consumers.route("orders", async |_: Order| Err::<(), _>(polymq_core::Failure::new("no"))).policy(policy);
    let mut stepper = ConsumerRunner::new(consumers).stepper().await.expect("subscribes");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    assert!(stepper.step(SOON).await.expect("the first attempt"));
    assert_eq!(bus.queue("orders").stats(None).await.expect("counts").ready, 1);
    assert!(stepper.step(Duration::from_secs(600)).await.expect("the second"));
    assert!(!stepper.step(QUIET).await.expect("no third"));
    assert_eq!(bus.queue("orders.dlq").stats(None).await.expect("counts").ready, 1);
}

/// A pause ends the loop of steps with an error, and the next step goes on: nobody else could resume it.
#[tokio::test(start_paused = true)]
async fn a_step_that_pauses_says_so() {
    async fn fails(order: Order, attempt: polymq_core::Attempt, log: State<Log>) -> Result<(), polymq_core::Failure> {
        log.add(format!("{} {}", order.id, attempt.0));
        Err(polymq_core::Failure::new("the database is down"))
    }
    for mode in [RetryMode::Redeliver, RetryMode::InPlace] {
        let bus = bus(&format!("step-paused-{mode:?}")).await;
        let mut consumers = ConsumerFactory::new(&bus);
        let policy = FailurePolicy { pause_after_failures: Some(2), max_attempts: 4, mode, ..FailurePolicy::default() };
        let log = Log::default();
        consumers.state(log.clone()).route("orders", fails).policy(policy);
        let mut stepper = ConsumerRunner::new(consumers).stepper().await.expect("subscribes");
        bus.queue("orders").send(&order(1)).await.expect("sent");
        for paused_at in [2, 4] {
            let error = loop {
                match tokio::time::timeout(2 * SOON, stepper.step(SOON)).await.expect("a step ends") {
                    Ok(came) => assert!(came && log.entries().len() < paused_at, "a step did nothing"),
                    Err(error) => break error,
                }
            };
            assert_eq!((error.kind(), error.channel()), (ErrorKind::Handler, Some("orders")), "{error}");
            assert_eq!(log.entries().len(), paused_at);
        }
        assert_eq!(log.entries(), ["1 1", "1 2", "1 3", "1 4"], "{mode:?}");
        assert!(!stepper.step(QUIET).await.expect("no fifth"));
        assert_eq!(bus.queue("orders.dlq").stats(None).await.expect("counts").ready, 1);
        stepper.close().await.expect("closed");
    }
}

/// H8: everything that the handlers need is made by one call, and nothing by the second.
#[tokio::test]
async fn h8_a_factory_makes_every_missing_channel_once() {
    let bus = bus("h8").await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |_: Order| {});
    consumers.route("events", async |_: Order| {}).group("audit");
    consumers.route("events", async |_: Order| {}).group("billing");
    let plan = consumers.topology().expect("consistent").plan(&bus).await.expect("looks");
    assert_eq!(plan.missing().count(), 6, "{plan}");
    assert!(bus.list().await.expect("lists").is_empty(), "a plan changes nothing");
    assert_eq!(consumers.declare().await.expect("makes"), plan);
    let again = consumers.declare().await.expect("looks");
    assert_eq!((again.missing().count(), again.steps.len()), (0, 6), "{again}");
    let listed: Vec<_> = bus.list().await.expect("lists").into_iter().map(|one| (one.address, one.group)).collect();
    let none = |address: Address| (address, None);
    let group = |group: &str| (Address::topic("events"), Some(group.to_owned()));
    assert_eq!(
        listed,
        [
            none(Address::queue("events.audit.dlq")),
            none(Address::queue("events.billing.dlq")),
            none(Address::queue("orders")),
            none(Address::queue("orders.dlq")),
            none(Address::topic("events")),
            group("audit"),
            group("billing"),
        ]
    );
}

/// H8 where the channel is there and its dead-letter queue is not: the first message that fails would find that out.
#[tokio::test]
async fn h8_a_missing_dead_letter_queue_is_seen_and_made() {
    let bus = bus("h8-letters").await;
    let declare = async |letters: &str| {
        let mut consumers = ConsumerFactory::new(&bus);
        let dead_letters = DeadLetters::To(Address::queue(letters));
        let policy = FailurePolicy { dead_letters, ..FailurePolicy::default() };
        consumers.route("orders", async |_: Order| {}).policy(policy.clone());
        consumers.route("refunds", async |_: Order| {}).policy(policy);
        consumers.declare().await.expect("makes").to_string()
    };
    let first = declare("failed").await;
    assert_eq!(first, "missing: queue orders\nmissing: queue failed\nmissing: queue refunds\n");
    let second = declare("parking").await;
    assert_eq!(second, "present: queue orders\nmissing: queue parking\npresent: queue refunds\n");
    assert!(bus.queue("parking").exists(None).await.expect("looks"));

    // By name only, as on the command line.
    bus.queue("orders.dlq").delete(None).await.expect("deleted");
    let topology = Topology::new().queue("orders").queue("orders.dlq").group("events", "audit").topic("prices");
    let plan = topology.apply(&bus).await.expect("makes").to_string();
    let made = ["queue orders.dlq", "topic prices", "group audit of topic events", "queue events.audit.dlq"];
    let expected: Vec<_> = made.iter().map(|made| format!("missing: {made}")).collect();
    assert_eq!(plan.lines().filter(|line| line.starts_with("missing")).count(), 4, "{plan}");
    assert!(expected.iter().all(|line| plan.contains(line.as_str())), "{plan}");
    assert_eq!(topology.apply(&bus).await.expect("looks").missing().count(), 0);
}

/// What must exist already is made by somebody else, and so are its dead letters: no step says that they were made.
#[tokio::test]
async fn h8_dead_letters_of_an_existing_channel_are_not_made() {
    let bus = bus("h8-existing").await;
    bus.queue("orders").declare(ConsumeOptions::default()).await.expect("declared");
    bus.queue("orders.dlq").delete(None).await.expect("deleted");
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |_: Order| {}).existing();
    assert_eq!(consumers.declare().await.expect("looks").to_string(), "present: queue orders\n");
    assert!(!bus.queue("orders.dlq").exists(None).await.expect("looks"));
}

/// A dead-letter queue with options of its own is made with these, not with those of the queue that it is for.
#[tokio::test]
async fn h8_a_dead_letter_queue_in_the_topology_is_made_for_itself() {
    let bus = bus("h8-own").await;
    bus.queue("orders").declare(ConsumeOptions::default()).await.expect("declared");
    bus.queue("orders.dlq").delete(None).await.expect("deleted");
    // Refused by this backend when it is declared with it, which it need not be.
    let extra = vec![("queue_type".to_owned(), "classic".to_owned())];
    let orders = ConsumeOptions { extra, ..ConsumeOptions::default() };
    let topology = Topology::new().channel(Address::queue("orders"), orders).queue("orders.dlq");
    let made = topology.apply(&bus).await.expect("makes").to_string();
    assert_eq!(made, "missing: queue orders.dlq\npresent: queue orders\n");
    assert!(bus.queue("orders.dlq").exists(None).await.expect("looks"));
}

/// What is for the dead letters of others is made before them, or it would get their options; whatever names each other is made all
/// the same.
#[tokio::test]
async fn h8_dead_letter_queues_are_made_before_their_channels() {
    let bus = bus("h8-order").await;
    let to =
        |letters: &str| ConsumeOptions { dead_letters: Some(Address::queue(letters)), ..ConsumeOptions::default() };
    let topology = Topology::new()
        .queue("a")
        .queue("a.dlq")
        .channel(Address::queue("b"), to("c"))
        .channel(Address::queue("c"), to("d"))
        .queue("d.dlq")
        .channel(Address::queue("d"), to("d.dlq"))
        .channel(Address::queue("x"), to("y"))
        .channel(Address::queue("y"), to("x"));
    let made = topology.apply(&bus).await.expect("makes").to_string();
    let names: Vec<_> = made.lines().map(|line| line.trim_start_matches("missing: queue ")).collect();
    assert_eq!(names, ["a.dlq", "a", "d.dlq", "d", "c", "b", "y", "x"]);
    assert_eq!(topology.apply(&bus).await.expect("looks").missing().count(), 0);
}

/// Looking at dead letters, or sending them back, makes no queue; nor has a dead-letter queue one of its own.
#[tokio::test(start_paused = true)]
async fn dead_letters_are_looked_at_without_making_queues() {
    let bus = bus("letters-looked-at").await;
    let source = Address::queue("ordres");
    let missing = polymq_core::replay_dead_letters(&bus, &source, 10, QUIET).await.expect_err("no such queue");
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
    assert!(bus.list().await.expect("lists").is_empty(), "nothing was made");
    let mut letters = bus.queue("orders.dlq").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    letters.close().await.expect("closed");
    bus.queue("refunds.dlq").declare(ConsumeOptions::default()).await.expect("declared");
    let listed: Vec<_> = bus.list().await.expect("lists").iter().map(|one| one.address.name().to_owned()).collect();
    assert_eq!(listed, ["orders.dlq", "refunds.dlq"]);
}

#[test]
fn a_topology_is_read_from_a_file() {
    let read = Topology::from_toml(
        "[queues.inbox]\ntopics = [\"events\"]\n[topics.events]\ngroups = [\"audit\"]\npartitions = 12\n",
    );
    let extra = vec![("partitions".to_owned(), "12".to_owned())];
    let events = ConsumeOptions { extra, ..ConsumeOptions::default() };
    let audit = ConsumeOptions { group: Some("audit".to_owned()), ..events.clone() };
    let expected = Topology::new()
        .queue("inbox")
        .channel(Address::topic("events"), events)
        .channel(Address::topic("events"), audit)
        .bind("inbox", "events");
    assert_eq!(read.expect("a topology"), expected);
    for (text, part) in [("[queue.a]\n", "unknown field `queue`"), ("[queues.a]\ntopics = 1\n", "topics"), ("x", "=")] {
        let error = Topology::from_toml(text).expect_err("not a topology");
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(part), "{error}");
    }
    let error = Topology::from_file("/nowhere/topology.toml").expect_err("no file");
    assert!(error.to_string().contains("/nowhere/topology.toml"), "{error}");
}

async fn with_prefix(space: &str, prefix: &str) -> Bus {
    let builder = Bus::builder().url(format!("memory://{space}")).environment(Environment::default());
    builder.prefix(prefix).connect().await.expect("connects")
}

/// H9: names carry the prefix on both sides, dead letters, lists and requests too; an empty prefix is none.
#[tokio::test(start_paused = true)]
async fn h9_a_prefix_separates_environments() {
    let (plain, dev, test) = (bus("h9").await, with_prefix("h9", "dev").await, with_prefix("h9", "test.").await);
    for bus in [&plain, &dev, &test] {
        let mut consumers = ConsumerFactory::new(bus);
        consumers.route("orders", async |_: u64| {});
        let topology = consumers.topology().expect("consistent");
        topology.apply(bus).await.expect("made");
    }
    let names =
        |listed: Vec<polymq_core::Listed>| listed.iter().map(|one| one.address.name().to_owned()).collect::<Vec<_>>();
    assert_eq!(
        names(plain.list().await.expect("lists")),
        ["dev.orders", "dev.orders.dlq", "orders", "orders.dlq", "test.orders", "test.orders.dlq"]
    );
    assert_eq!(names(dev.list().await.expect("lists")), ["orders", "orders.dlq"]);
    dev.queue("orders").send(&7_u64).await.expect("sent");
    let ready = async |bus: &Bus, name: &str| bus.queue(name).stats(None).await.expect("counts").ready;
    assert_eq!(
        (ready(&plain, "dev.orders").await, ready(&plain, "orders").await, ready(&test, "orders").await),
        (1, 0, 0)
    );
    let mut subscription = dev.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let delivery = subscription.next().await.expect("its own");
    assert_eq!(delivery.channel(), "orders");
    delivery.reject("for the test").await.expect("a dead letter");
    assert_eq!(ready(&plain, "dev.orders.dlq").await, 1);
    let source = Address::queue("orders");
    let replayed = polymq_core::replay_dead_letters(&dev, &source, 10, QUIET).await.expect("replayed");
    assert_eq!((replayed, ready(&dev, "orders.dlq").await), (1, 0));
    subscription.next().await.expect("back").ack().await.expect("acked");
    subscription.close().await.expect("closed");

    // Replies cross: the name of a reply queue is the same for both sides.
    let mut consumers = ConsumerFactory::new(&plain);
    consumers.route("dev.orders", async |n: u64| polymq_core::Answer(n * 2));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let reply: u64 = dev.request("orders", &21_u64).await.expect("answered").decode().expect("a number");
    assert_eq!(reply, 42);
    running.stop().await.expect("stops");
    dev.close().await.expect("closed");
    assert!(plain.list().await.expect("lists").iter().all(|one| !one.address.name().contains("reply")));

    let empty = with_prefix("h9-empty", "").await;
    empty.queue("orders").send(&1_u64).await.expect("sent");
    assert_eq!(names(bus("h9-empty").await.list().await.expect("lists")), ["orders"], "no leading dot");
    let variables = Environment::from_iter([("POLYMQ_PREFIX", "stage"), ("POLYMQ_URL", "memory://h9-variable")]);
    let chosen = Bus::builder().environment(variables).connect().await.expect("connects");
    chosen.queue("orders").send(&1_u64).await.expect("sent");
    assert_eq!(names(bus("h9-variable").await.list().await.expect("lists")), ["stage.orders"]);
    assert_eq!(dev.queue("bad\nname").send(&1).await.expect_err("refused").kind(), ErrorKind::InvalidInput);
}

/// H5: where dead letters would come back to where they are from is refused, by whoever asks for it.
#[tokio::test]
async fn h5_a_channel_is_not_its_own_dead_letter_queue() {
    let bus = bus("h5").await;
    let own = || ConsumeOptions { dead_letters: Some(Address::queue("orders")), ..ConsumeOptions::default() };
    let queue = bus.queue("orders");
    let mut errors = vec![
        queue.declare(own()).await.expect_err("declared"),
        queue.subscribe(own()).await.map(drop).expect_err("subscribed"),
    ];
    let mut consumers = ConsumerFactory::new(&bus);
    let dead_letters = DeadLetters::To(Address::queue("orders"));
    consumers.route("orders", async |_: Order| {}).policy(FailurePolicy { dead_letters, ..FailurePolicy::default() });
    errors.push(consumers.check().expect_err("routed"));
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains("dead letters would loop"), "{error}");
    }
    assert!(!queue.exists(None).await.expect("looks"), "nothing was made");
}

/// H3 in memory, where it must hold that no message is lost while a bound queue is full.
#[tokio::test(start_paused = true)]
async fn h3_a_full_bound_queue_makes_the_topics_sender_wait() {
    let url = "memory://h3?capacity=2";
    let bus = Bus::builder().url(url).environment(Environment::default()).connect().await.expect("connects");
    let (queue, topic, other) = (bus.queue("inbox"), bus.topic("events"), bus.topic("prices"));
    queue.bind(&topic).await.expect("bound");
    queue.bind(&topic).await.expect("twice is once");
    queue.bind(&other).await.expect("bound too");
    topic.send(&1).await.expect("room");
    other.send(&2).await.expect("room");
    let late = tokio::spawn({
        let topic = topic.clone();
        async move { topic.send(&3).await }
    });
    tokio::time::sleep(SOON).await;
    assert!(!late.is_finished(), "the queue is full");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let mut seen = Vec::new();
    for _ in 0..3 {
        let delivery = subscription.next().await.expect("a message");
        seen.push(String::from_utf8_lossy(delivery.message().payload()).into_owned());
        delivery.ack().await.expect("acked");
    }
    assert_eq!(seen, ["1", "2", "3"]);
    late.await.expect("no panic").expect("sent when there was room");
    queue.unbind(&topic).await.expect("unbound");
    topic.send(&4).await.expect("to nobody");
    other.send(&5).await.expect("still bound");
    assert_eq!(subscription.next().await.expect("a message").message().payload(), "5");
    queue.delete(None).await.expect("deleted");
    other.send(&6).await.expect("to nobody");
    queue.declare(ConsumeOptions::default()).await.expect("made again");
    other.send(&7).await.expect("to nobody");
    assert_eq!(queue.stats(None).await.expect("counts").ready, 0, "a new queue has no binding of an old one");
    let wrong = bus.topic("events").bind(&bus.topic("prices")).await.expect_err("no queue");
    assert_eq!(wrong.kind(), ErrorKind::InvalidInput, "{wrong}");
}

/// C12 by handlers: the group gets what its handlers are for, and nothing else becomes a dead letter.
#[tokio::test(start_paused = true)]
async fn c12_a_group_takes_only_the_kinds_of_its_handlers() {
    let mut kinds = Kinds::new();
    kinds.bind::<Order>("order.created", None).expect("free");
    let builder = Bus::builder().url("memory://c12").environment(Environment::default());
    let bus = builder.kinds(kinds).connect().await.expect("connects");
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("events", logs).group("orders").only_own_kinds();
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let topic = bus.topic("events");
    topic
        .send_message(Message::new("{}").with_kind("order.paid").with_content_type("application/json"))
        .await
        .expect("sent");
    topic.send_message(Message::new("{}").with_content_type("application/json")).await.expect("sent");
    topic.send(&order(1)).await.expect("sent");
    assert_eq!(log.wait(1).await, ["1"]);
    running.stop().await.expect("stops");
    assert_eq!(bus.queue("events.orders.dlq").stats(None).await.expect("counts").ready, 0);
    assert_eq!(topic.stats(Some("orders")).await.expect("counts").ready, 0);

    let mut any = ConsumerFactory::new(&bus);
    any.route("events", async |_: Message| {}).group("orders").only_own_kinds();
    assert_eq!(any.check().expect_err("any kind").kind(), ErrorKind::Config);
    let filtered = ConsumeOptions { kinds: vec!["order.created".into()], ..ConsumeOptions::default() };
    let refused = bus.queue("orders").subscribe(filtered).await.expect_err("a queue");
    assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
}

#[tokio::test]
async fn a_binding_is_ensured_and_a_state_has_a_word() {
    let bus = bus("bindings").await;
    let topology = Topology::new().queue("inbox").topic("events").bind("inbox", "events");
    let plan = topology.plan(&bus).await.expect("looks");
    assert_eq!(
        plan.to_string(),
        "missing: queue inbox\nmissing: queue inbox.dlq\nmissing: topic events\nensured: binding of queue inbox to topic events\n"
    );
    topology.apply(&bus).await.expect("made");
    topology.apply(&bus).await.expect("harmless");
    bus.topic("events").send(&1).await.expect("sent");
    assert_eq!(bus.queue("inbox").stats(None).await.expect("counts").ready, 1);
    assert_eq!(topology.plan(&bus).await.expect("looks").steps[0].state, StepState::Present);
}
