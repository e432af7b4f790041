//! A1 to A16: what exists, is made, bound, listed, filtered and looked into, under which names; and that each operation ends.

use std::time::Duration;

use polymq_core::{
    Address, Attempt, BusBuilder, ConsumeOptions, ConsumerFactory, DeadLetters, ErrorKind, Failure, FailurePolicy,
    Message, Result, RetryMode, State, StepState, Topology, dead_letter,
};
use tokio::time::Instant;

use crate::{
    Case, Cx, PATIENCE, Proxy,
    case::run,
    drive::{
        Log, bodies, closes, in_order, publish, quiet, refused, retry_every, start, subscribe, subscribe_with,
        take_acked,
    },
    eventually,
};

pub(super) const CASES: &[Case] = &[
    Case::new("A1_declaring_is_harmless", run!(declaring_is_harmless)),
    Case::new("A1_looking_creates_nothing", run!(looking_creates_nothing)).when(
        "lookup",
        |c| c.lookup,
        run!(looking_refused),
    ),
    Case::new("A2_not_allowed_is_not_missing", run!(not_allowed_is_not_missing))
        .when("lookup", |c| c.lookup, run!(looking_refused))
        .broker(),
    Case::new("A3_bindings_add_up", run!(bindings_add_up)).when("bindings", |c| c.bindings, run!(bindings_refused)),
    Case::new("A4_kinds_are_filtered", run!(kinds_are_filtered)).when(
        "filter",
        |c| c.filter.is_available(),
        run!(filter_refused),
    ),
    Case::new("A5_dead_letter_after_so_many", run!(dead_letter_after_so_many)),
    Case::new("A8_topology_is_planned_and_made", run!(topology_is_planned_and_made)).when(
        "lookup",
        |c| c.lookup,
        run!(plan_refused),
    ),
    Case::new("A9_prefixes_separate", run!(prefixes_separate)),
    Case::new("A10_channels_are_listed", run!(channels_are_listed)).when("list", |c| c.list, run!(list_refused)),
    Case::new("A11_bad_names_are_refused", run!(bad_names_are_refused)),
    Case::new("A15_peeking_takes_nothing", run!(peeking_takes_nothing)).when("peek", |c| c.peek, run!(peek_refused)),
    Case::new("A16_silence_ends_every_operation", run!(silence_ends_every_operation)).broker(),
];

fn existing() -> ConsumeOptions {
    ConsumeOptions { declare: false, ..ConsumeOptions::default() }
}

fn group(name: &str) -> ConsumeOptions {
    ConsumeOptions { group: Some(name.to_owned()), ..ConsumeOptions::default() }
}

/// Declaring a channel that exists changes nothing about it, and deleting one that does not is no error (mission row H1).
pub async fn declaring_is_harmless(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    queue.declare(ConsumeOptions::default()).await.expect("made");
    publish(&queue, ["kept".to_owned()]).await;
    queue.declare(ConsumeOptions::default()).await.expect("harmless");
    let mut subscription = subscribe_with(&queue, existing()).await;
    queue.declare(ConsumeOptions::default()).await.expect("harmless, while it is consumed");
    assert_eq!(take_acked(&mut subscription, 1).await, ["kept"]);
    quiet(&mut subscription).await;
    subscription.close().await.expect("close");
    queue.delete(None).await.expect("deleted");
    queue.delete(None).await.expect("harmless");
    refused(queue.subscribe(existing()).await, &[ErrorKind::NotFound]);
}

/// Whether a group is something that the broker keeps, and that can be missing.
fn has_kept_groups(cx: &Cx) -> bool {
    cx.capabilities().groups && !cx.capabilities().at_most_once_topics
}

/// Looking for what does not exist says so and creates nothing, and getting it is an error (mission row H1).
pub async fn looking_creates_nothing(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    for _ in 0..2 {
        assert!(!queue.exists(None).await.expect("looks"), "there is no such queue");
    }
    refused(queue.subscribe(existing()).await, &[ErrorKind::NotFound]);
    refused(queue.existing().send_message(Message::new("x")).await, &[ErrorKind::NotFound, ErrorKind::Unroutable]);
    assert!(!queue.exists(None).await.expect("looks"), "getting it has made it");
    queue.declare(ConsumeOptions::default()).await.expect("made");
    assert!(queue.exists(None).await.expect("looks"));
    assert!(bus.channel(queue.address().dead_letters(None)).exists(None).await.expect("looks"), "its dead letters too");
    let mut subscription = subscribe(&queue).await;
    assert!(queue.exists(None).await.expect("looks, while it is consumed"));
    // Closed and not dropped: what a consumer has asked for and nobody waits for may come after the deletion, and make it anew.
    subscription.close().await.expect("closed");
    queue.delete(None).await.expect("deleted");
    assert!(!queue.exists(None).await.expect("looks"), "it was deleted");
    if !has_kept_groups(&cx) {
        return;
    }
    let topic = bus.topic(cx.topic_name(&["one", "two"]));
    assert!(!topic.exists(Some("one")).await.expect("looks"), "there is no such group");
    topic.declare(group("one")).await.expect("made");
    let found = (topic.exists(Some("one")).await.expect("looks"), topic.exists(Some("two")).await.expect("looks"));
    assert_eq!(found, (true, false));
}

/// Where nobody can look without creating, looking is `Unsupported`.
pub async fn looking_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    refused(queue.exists(None).await, &[ErrorKind::Unsupported]);
}

/// Who may not look gets an error, not a "no", and nothing is made on the strength of it (mission row H2).
pub async fn not_allowed_is_not_missing(cx: Cx) {
    let wrong = cx.harness().wrong_password().expect("a backend with a broker must bring a URL with a wrong password");
    refused(cx.builder_to(wrong).with("connect_timeout", "50s").connect().await, &[ErrorKind::Unauthenticated]);
    let denied = cx.harness().denied().expect("a backend with a broker must bring a user without permission");
    if !denied.consumers_are_told {
        cx.note("this broker does not tell who may not look");
        return;
    }
    let bus = cx.builder_to(denied.url).with("connect_timeout", "50s").connect().await.expect("this user may connect");
    let forbidden = bus.channel(denied.address.clone());
    let topology = Topology::new().channel(denied.address.clone(), ConsumeOptions::default());
    let everybody = cx.bus().await;
    let exists = async || everybody.channel(denied.address.clone()).exists(None).await.expect("looks");
    let before = exists().await;
    if cx.harness().anybody_may_look() {
        assert_eq!(forbidden.exists(None).await.expect("this broker tells everybody"), before);
        // What exists needs not be made.
        if before {
            return;
        }
    } else {
        refused(forbidden.exists(None).await, &[ErrorKind::PermissionDenied]);
        refused(topology.plan(&bus).await, &[ErrorKind::PermissionDenied]);
    }
    refused(topology.apply(&bus).await, &[ErrorKind::PermissionDenied]);
    assert_eq!(exists().await, before, "it was made by somebody who may not");
}

/// A queue gets the messages of every topic that it was bound to: a later binding leaves the earlier ones (mission row H3).
pub async fn bindings_add_up(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let (one, two) = (bus.topic(cx.topic_name(&[])), bus.topic(cx.topic_name(&[])));
    queue.bind(&one).await.expect("bound");
    publish(&one, ["one".to_owned()]).await;
    queue.bind(&two).await.expect("bound too");
    queue.bind(&two).await.expect("twice is once");
    publish(&one, ["one again".to_owned()]).await;
    publish(&two, ["two".to_owned()]).await;
    publish(&queue, ["directly".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    let mut seen = take_acked(&mut subscription, 4).await;
    seen.sort();
    assert_eq!(seen, ["directly", "one", "one again", "two"]);
    queue.unbind(&one).await.expect("unbound");
    queue.unbind(&one).await.expect("harmless");
    publish(&one, ["to nobody".to_owned()]).await;
    publish(&two, ["still bound".to_owned()]).await;
    assert_eq!(take_acked(&mut subscription, 1).await, ["still bound"]);
    quiet(&mut subscription).await;
    queue.unbind(&two).await.expect("unbound");
}

/// Where queues cannot be bound, binding is `Unsupported` and nothing is delivered.
pub async fn bindings_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let topic = bus.topic(cx.topic_name(&[]));
    refused(queue.bind(&topic).await, &[ErrorKind::Unsupported]);
    refused(queue.unbind(&topic).await, &[ErrorKind::Unsupported]);
    let topology = Topology::new().bind(queue.address().name(), topic.address().name());
    refused(topology.apply(&bus).await, &[ErrorKind::Unsupported]);
}

/// Three groups, two of them with a filter: each gets exactly the kinds that it asked for (mission rows C12 and H4).
pub async fn kinds_are_filtered(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&["created", "both", "all"]));
    let only = |name: &str, kinds: &[&str]| ConsumeOptions {
        kinds: kinds.iter().map(|kind| (*kind).to_owned()).collect(),
        ..group(name)
    };
    let mut created = subscribe_with(&topic, only("created", &["order.created"])).await;
    let mut both = subscribe_with(&topic, only("both", &["order.created", "order.paid"])).await;
    let mut all = subscribe_with(&topic, only("all", &[])).await;
    let kinds = [Some("order.created"), Some("order.paid"), Some("order.lost"), None, Some("order.created")];
    for (body, kind) in bodies(kinds.len()).zip(kinds) {
        let message = Message::new(body);
        let message = if let Some(kind) = kind { message.with_kind(kind) } else { message };
        topic.send_message(message).await.expect("sent");
    }
    let all_bodies: Vec<String> = bodies(kinds.len()).collect();
    let of = |wanted: &[usize]| wanted.iter().map(|at| all_bodies[*at].clone()).collect::<Vec<_>>();
    assert_eq!(in_order(&cx, take_acked(&mut all, 5).await), all_bodies);
    assert_eq!(in_order(&cx, take_acked(&mut created, 2).await), of(&[0, 4]));
    assert_eq!(in_order(&cx, take_acked(&mut both, 3).await), of(&[0, 1, 4]));
    for subscription in [&mut created, &mut both, &mut all] {
        quiet(subscription).await;
        subscription.close().await.expect("close");
    }
    // What was filtered out does not wait for anybody.
    let mut created = subscribe_with(&topic, only("created", &["order.created"])).await;
    quiet(&mut created).await;
    let queue = cx.queue(&bus);
    refused(
        queue.subscribe(ConsumeOptions { kinds: vec!["a".into()], ..ConsumeOptions::default() }).await,
        &[ErrorKind::InvalidInput],
    );
}

/// Where nobody can filter, asking for it is `Unsupported`.
pub async fn filter_refused(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&["one"]));
    let options = ConsumeOptions { kinds: vec!["order.created".into()], ..group("one") };
    refused(topic.subscribe(options).await, &[ErrorKind::Unsupported]);
}

/// After as many failures as the policy allows, the message is in the dead-letter queue that was chosen, with their number;
/// a channel that would be its own dead-letter queue is refused (mission row H5).
pub async fn dead_letter_after_so_many(cx: Cx) {
    async fn fails(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        log.add(&message, attempt.0);
        Err(Failure::new("as the test wants"))
    }
    let bus = cx.bus().await;
    let (queue, graveyard) = (cx.queue(&bus), cx.queue(&bus));
    let log = Log::default();
    let policy = FailurePolicy {
        dead_letters: DeadLetters::To(graveyard.address().clone()),
        mode: RetryMode::InPlace,
        ..retry_every(Duration::from_millis(10), 2)
    };
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route(queue.address().name(), fails).policy(policy.clone());
    let running = start(consumers).await;
    publish(&queue, ["fails".to_owned()]).await;
    let mut letters = subscribe(&graveyard).await;
    let letter = crate::drive::next(&mut letters).await;
    let known = |name| letter.message().system_headers().get(name).map(str::to_owned);
    assert_eq!((log.len(), known(dead_letter::ATTEMPTS).as_deref()), (2, Some("2")));
    letter.ack().await.expect("ack");
    quiet(&mut letters).await;
    running.stop().await.expect("stop");

    let own = DeadLetters::To(queue.address().clone());
    let mut looping = ConsumerFactory::new(&bus);
    looping.route(queue.address().name(), async |_: Message| {}).policy(FailurePolicy { dead_letters: own, ..policy });
    refused(looping.check(), &[ErrorKind::Config]);
    let options = ConsumeOptions { dead_letters: Some(queue.address().clone()), ..ConsumeOptions::default() };
    refused(queue.subscribe(options.clone()).await, &[ErrorKind::Config]);
    refused(queue.declare(options).await, &[ErrorKind::Config]);
}

/// A plan says what is missing and changes nothing; applying makes it, and making it again makes nothing (mission rows
/// H8 and H12).
pub async fn topology_is_planned_and_made(cx: Cx) {
    let bus = cx.bus().await;
    let (one, two) = (cx.queue(&bus), cx.queue(&bus));
    let mut topology = Topology::new().queue(one.address().name()).queue(two.address().name());
    let mut count = 2;
    if has_kept_groups(&cx) {
        topology = topology.group(cx.topic_name(&["audit"]), "audit");
        count += 1;
    }
    one.declare(ConsumeOptions::default()).await.expect("made before");
    let plan = topology.plan(&bus).await.expect("looks");
    // Each has a queue for its dead letters.
    assert_eq!((plan.steps.len(), plan.missing().count()), (2 * count, 2 * (count - 1)), "{plan}");
    assert_eq!(topology.plan(&bus).await.expect("looks"), plan, "planning has changed something");
    assert!(!two.exists(None).await.expect("looks"));
    let applied = topology.apply(&bus).await.expect("makes");
    assert_eq!(applied, plan);
    assert!(two.exists(None).await.expect("looks"));
    let again = topology.apply(&bus).await.expect("makes nothing");
    assert!(again.steps.iter().all(|step| step.state == StepState::Present), "{again}");
    publish(&two.existing(), ["usable".to_owned()]).await;
    assert_eq!(take_acked(&mut subscribe_with(&two, existing()).await, 1).await, ["usable"]);
}

/// Where nobody can look without creating, a plan is `Unsupported` and makes nothing.
pub async fn plan_refused(cx: Cx) {
    let bus = cx.bus().await;
    let topology = Topology::new().queue(cx.name());
    refused(topology.plan(&bus).await, &[ErrorKind::Unsupported]);
    refused(topology.apply(&bus).await, &[ErrorKind::Unsupported]);
}

/// Two environments on one broker do not see each other; an empty prefix is none, and leaves no separator (mission row H9).
pub async fn prefixes_separate(cx: Cx) {
    let with = async |prefix: &str| {
        let builder: BusBuilder = cx.builder();
        builder.prefix(prefix).connect().await.expect("connect")
    };
    let (plain, empty) = (cx.bus().await, with("").await);
    let name = cx.name();
    let separator = cx.capabilities().wildcards.map_or(".", |wildcards| wildcards.separator);
    let full = |prefix: &str| format!("{prefix}{separator}{name}");
    for prefix in ["dev", "test"] {
        cx.clean_up(Address::queue(full(prefix)), None);
    }
    let (dev, test) = (with("dev").await, with("test").await);
    let mut subscriptions = Vec::new();
    for (bus, body) in [(&plain, "plain"), (&dev, "dev"), (&test, "test")] {
        let queue = bus.queue(name.as_str());
        subscriptions.push((body, subscribe(&queue).await));
        publish(&queue, [body.to_owned()]).await;
    }
    publish(&empty.queue(name.as_str()), ["plain".to_owned()]).await;
    publish(&plain.queue(full("dev")), ["dev".to_owned()]).await;
    for (body, mut subscription) in subscriptions {
        let count = if body == "test" { 1 } else { 2 };
        assert_eq!(take_acked(&mut subscription, count).await, vec![body; count]);
        quiet(&mut subscription).await;
        subscription.close().await.expect("close");
    }
    for bus in [dev, test, empty] {
        closes(&bus).await;
    }
}

/// The list has what exists, with its counts where the backend counts, and not what was deleted (mission row H10).
pub async fn channels_are_listed(cx: Cx) {
    let bus = cx.bus().await;
    let (queue, gone) = (cx.queue(&bus), cx.queue(&bus));
    publish(&queue, bodies(3)).await;
    publish(&gone, bodies(1)).await;
    gone.delete(None).await.expect("deleted");
    let counts = cx.capabilities().stats;
    eventually(PATIENCE, || async {
        let listed = bus.list().await.map_err(|error| error.to_string())?;
        let named = |address: &Address| listed.iter().find(|one| one.address.name() == address.name());
        match named(queue.address()) {
            None => Err(format!("{queue:?} is not among {} channels", listed.len())),
            Some(found) if counts && found.stats.map(|stats| stats.ready) != Some(3) => Err(format!("{found:?}")),
            Some(_) if named(gone.address()).is_some() => Err("what was deleted is listed".to_owned()),
            Some(_) => Ok(()),
        }
    })
    .await;
}

/// Where channels cannot be listed, asking is `Unsupported`.
pub async fn list_refused(cx: Cx) {
    let bus = cx.bus().await;
    refused(bus.list().await, &[ErrorKind::Unsupported]);
}

/// Names that no backend takes, and those that this broker cannot carry, are refused with the reason by every operation,
/// before anything reaches the broker; ordinary names are not (mission row H11).
pub async fn bad_names_are_refused(cx: Cx) {
    let bus = cx.bus().await;
    let long = "n".repeat(201);
    let common = [("", "empty"), (&*long, "longer than 200"), (" a", "white space"), ("a\u{7}b", "control character")];
    let common = common.map(|(name, reason)| (Address::queue(name), reason));
    for (address, reason) in common.into_iter().chain(cx.harness().bad_names()) {
        let channel = bus.channel(address.clone());
        let told = [
            channel.declare(ConsumeOptions::default()).await.expect_err("declared"),
            channel.send_message(Message::new("x")).await.expect_err("sent"),
            channel.subscribe(ConsumeOptions::default()).await.map(drop).expect_err("subscribed"),
            channel.exists(None).await.expect_err("looked"),
            channel.delete(None).await.expect_err("deleted"),
        ];
        for error in told {
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{address:?}: {error:?}");
            assert!(error.to_string().contains(reason), "{address:?} is not refused for {reason:?}: {error}");
        }
    }
    let name = cx.name();
    for ordinary in [name.clone(), format!("{name}_b"), format!("{name}.c")] {
        cx.clean_up(Address::queue(ordinary.as_str()), None);
        bus.queue(ordinary).declare(ConsumeOptions::default()).await.expect("an ordinary name");
    }
}

/// Peeking twice and then receiving gives the same message three times (mission row C21).
pub async fn peeking_takes_nothing(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    refused(queue.peek(None, 1).await, &[ErrorKind::NotFound]);
    publish(&queue, bodies(3)).await;
    for _ in 0..2 {
        let seen = queue.peek(None, 2).await.expect("peeks");
        let seen: Vec<_> = seen.iter().map(|message| String::from_utf8_lossy(message.payload()).into_owned()).collect();
        assert_eq!(seen, bodies(2).collect::<Vec<_>>());
    }
    let mut subscription = subscribe(&queue).await;
    let first = crate::drive::next(&mut subscription).await;
    assert_eq!(
        (crate::drive::text(&first), first.attempt()),
        (bodies(1).collect::<String>(), 1),
        "peeking is no attempt"
    );
    first.ack().await.expect("ack");
    assert_eq!(take_acked(&mut subscription, 2).await, bodies(3).skip(1).collect::<Vec<_>>());
    subscription.close().await.expect("close");
    assert!(queue.peek(None, 5).await.expect("peeks").is_empty());
}

/// Where nobody can look at messages without taking them, peeking is `Unsupported` and takes nothing.
pub async fn peek_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(1)).await;
    refused(queue.peek(None, 1).await, &[ErrorKind::Unsupported]);
    assert_eq!(take_acked(&mut subscribe(&queue).await, 1).await.len(), 1);
}

/// The time that each operation is given in the case with a silent broker.
const GIVEN: Duration = Duration::from_secs(2);
/// Beyond that: a busy machine, and closing, which has a bound of its own.
const GRACE: Duration = Duration::from_secs(45);

/// A broker that says nothing any more: each operation ends at its configured time with a typed error, and closing ends
/// too (mission row J21). When the broker speaks again, so does everything.
pub async fn silence_ends_every_operation(cx: Cx) {
    let proxy = Proxy::start(cx.broker().address()).await.expect("a proxy");
    let settings = cx.harness().time_outs();
    let with = |builder: BusBuilder| {
        settings.iter().fold(builder, |builder, key| builder.with(*key, format!("{}s", GIVEN.as_secs())))
    };
    let builder = || with(cx.builder_to(cx.harness().url(Some(proxy.address()))));
    // A busy machine may need more than that for what comes before.
    let connected = async || {
        let connect = || async { builder().connect().await.map_err(|error| error.to_string()) };
        eventually(cx.harness().recovery(), connect).await
    };
    let (bus, closing) = (connected().await, connected().await);
    let (used, other) = (cx.queue(&bus).with_timeout(GIVEN), cx.queue(&bus));
    for queue in [&used, &closing.queue(other.address().name())] {
        let send = || async { queue.send_message(Message::new("before")).await.map_err(|error| error.to_string()) };
        eventually(cx.harness().recovery(), send).await;
    }
    proxy.pause();
    let known = [
        ErrorKind::Timeout,
        ErrorKind::Disconnected,
        ErrorKind::UnknownOutcome,
        ErrorKind::Unsupported,
        ErrorKind::Busy,
    ];
    let ends = async |what: &str, operation: futures_util::future::BoxFuture<'_, Result<()>>| {
        let started = Instant::now();
        match tokio::time::timeout(GIVEN + GRACE, operation).await {
            Err(_) => panic!("{what} did not end within {:?}", GIVEN + GRACE),
            // Where there is no broker, some things need nobody.
            Ok(Ok(())) if cx.capabilities().direct => {}
            Ok(Ok(())) => panic!("{what} has succeeded, though the broker was silent"),
            Ok(Err(error)) => assert!(known.contains(&error.kind()), "{what}: {error:?}"),
        }
        (what.to_owned(), started.elapsed())
    };
    let fresh = [bus.queue(cx.name()), bus.queue(cx.name()), bus.queue(cx.name())];
    let outcomes = futures_util::future::join_all([
        ends("ping", Box::pin(bus.ping())),
        ends("send", Box::pin(async { used.send_message(Message::new("x")).await.map(drop) })),
        ends("request", Box::pin(async { used.request_message(Message::new("x")).await.map(drop) })),
        ends("declare", Box::pin(fresh[0].declare(ConsumeOptions::default()))),
        ends("subscribe", Box::pin(async { fresh[1].subscribe(ConsumeOptions::default()).await.map(drop) })),
        ends("exists", Box::pin(async { fresh[2].exists(None).await.map(drop) })),
        ends("stats", Box::pin(async { used.stats(None).await.map(drop) })),
        ends("purge", Box::pin(async { used.purge().await.map(drop) })),
        ends("peek", Box::pin(async { used.peek(None, 1).await.map(drop) })),
        ends("list", Box::pin(async { bus.list().await.map(drop) })),
        ends("delete", Box::pin(async { other.delete(None).await })),
    ])
    .await;
    let longest = outcomes.iter().max_by_key(|(_, took)| *took).expect("there are some");
    cx.note(format_args!(
        "the longest, {}, ended after {:.1} s of {} s",
        longest.0,
        longest.1.as_secs_f64(),
        GIVEN.as_secs()
    ));
    let close = tokio::time::timeout(GIVEN + GRACE + PATIENCE, closing.close()).await;
    // Whether it could say goodbye is not what matters.
    drop(close.expect("closing ends though the broker is silent"));
    let connecting = builder().connect();
    let error = tokio::time::timeout(GIVEN + GRACE, connecting).await.expect("connecting ends").expect_err("silence");
    assert!(known.contains(&error.kind()), "{error:?}");
    proxy.resume();
    eventually(cx.harness().recovery(), || async { bus.ping().await.map_err(|error| error.to_string()) }).await;
    let again = bus.queue(cx.name());
    eventually(cx.harness().recovery(), || async {
        again.send_message(Message::new("again")).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
}
