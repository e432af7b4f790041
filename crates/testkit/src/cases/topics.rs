//! T1 to T6: topics, groups, replies; D1 to D3: what a backend may do beside delivering.

use std::time::Duration;

use polymq_core::{
    Bus, Channel, ConsumeOptions, ConsumerFactory, Context, ErrorKind, Message, Start, Stats, Subscription, Support,
};
use tokio::time::Instant;

use crate::{
    Case, Cx, Ledger, PATIENCE,
    case::run,
    drive::{
        bodies, closes, in_order, next, publish, quiet, refused, start, subscribe, subscribe_with, take, take_acked,
        text,
    },
    eventually,
};

pub(super) const CASES: &[Case] = &[
    Case::new("T1_topic_reaches_everyone", run!(topic_reaches_everyone)).when(
        "topics",
        |c| c.topics,
        run!(super::names::topics_refused),
    ),
    Case::new("T1_attributes_reach_topics", run!(attributes_reach_topics)).when(
        "topics",
        |c| c.topics,
        run!(super::names::topics_refused),
    ),
    Case::new("T2_group_shares", run!(group_shares)).when("groups", |c| c.groups, run!(groups_refused)),
    Case::new("T3_group_misses_nothing", run!(group_misses_nothing)).when(
        "groups",
        |c| c.groups && !c.at_most_once_topics,
        run!(group_misses_what_it_is_away_for),
    ),
    Case::new("T4_start", run!(start_earliest)).when("replay", |c| c.replay, run!(replay_refused)),
    Case::new("T5_wildcards", run!(wildcards)).when("wildcards", |c| c.wildcards.is_some(), run!(no_wildcards)),
    Case::new("T6_reply", run!(reply)).when("request_reply", |c| c.request_reply, run!(replies_refused)),
    Case::new("D1_delayed_send", run!(delayed_send)).when(
        "delayed_send",
        |c| c.delayed_send.support.is_available(),
        run!(delayed_send_refused),
    ),
    Case::new("D2_stats", run!(stats)).when("stats", |c| c.stats, run!(stats_refused)),
    Case::new("D3_purge", run!(purge)).when("purge", |c| c.purge, run!(purge_refused)),
];

fn group(name: &str) -> ConsumeOptions {
    ConsumeOptions { group: Some(name.to_owned()), ..ConsumeOptions::default() }
}

async fn join(topic: &Channel, name: &str) -> Subscription {
    subscribe_with(topic, group(name)).await
}

/// A topic's messages reach every group and every subscription without a group; a queue's reach one consumer.
pub async fn topic_reaches_everyone(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&["one"]));
    let mut everyone = vec![subscribe(&topic).await, subscribe(&topic).await];
    if cx.capabilities().groups {
        everyone.push(join(&topic, "one").await);
    }
    publish(&topic, bodies(30)).await;
    for subscription in &mut everyone {
        assert_eq!(in_order(&cx, take_acked(subscription, 30).await), bodies(30).collect::<Vec<_>>());
        quiet(subscription).await;
    }
    let queue = cx.queue(&bus);
    let (mut one, mut two) = (subscribe(&queue).await, subscribe(&queue).await);
    publish(&queue, bodies(30)).await;
    let mut ledger = Ledger::sent(bodies(30));
    shared(&mut [&mut one, &mut two], &mut ledger, 30).await;
    ledger.assert_exact();
}

/// What travels with a message to a queue travels with it to a topic too: to every subscription and group the same
/// id, kind, version, content type, key and headers (mission row E4).
pub async fn attributes_reach_topics(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&["one"]));
    let queue = cx.queue(&bus);
    let mut everyone = vec![subscribe(&topic).await, subscribe(&queue).await];
    if cx.capabilities().groups {
        everyone.push(join(&topic, "one").await);
    }
    let sent = Message::new("body")
        .with_id("order-7")
        .with_content_type("application/vnd.msgpack")
        .with_kind("order.created")
        .with_version(3)
        .with_key("customer-7")
        .with_correlation_id("saga-1")
        .with_header("tenant", "acme");
    for channel in [&topic, &queue] {
        channel.send_message(sent.clone()).await.expect("send");
    }
    for subscription in &mut everyone {
        let delivery = next(subscription).await;
        let got = delivery.message();
        assert_eq!((got.id(), got.payload()), (sent.id(), sent.payload()));
        assert_eq!((got.kind(), got.version()), (sent.kind(), sent.version()), "kind and version");
        assert_eq!((got.content_type(), got.key()), (sent.content_type(), sent.key()), "content type and key");
        assert_eq!((got.correlation_id(), got.headers()), (sent.correlation_id(), sent.headers()));
        delivery.ack().await.expect("ack");
        quiet(subscription).await;
    }
}

/// Takes from all of them until `count` messages were seen, then looks that no more come; how many each has got.
async fn shared(subscriptions: &mut [&mut Subscription], ledger: &mut Ledger, count: usize) -> Vec<usize> {
    let mut got = vec![0; subscriptions.len()];
    let deadline = Instant::now() + PATIENCE;
    while got.iter().sum::<usize>() < count && Instant::now() < deadline {
        for (got, subscription) in got.iter_mut().zip(subscriptions.iter_mut()) {
            for delivery in subscription.receive(5, Duration::from_millis(50)).await.expect("receive") {
                *got += 1;
                ledger.see(text(&delivery));
                delivery.ack().await.expect("ack");
            }
        }
    }
    for subscription in subscriptions {
        quiet(subscription).await;
    }
    got
}

/// Two groups each get every message; two members of one group split them.
pub async fn group_shares(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&["billing", "audit"]));
    // Fewer than there are for each, so that the faster one cannot fetch them all.
    let few = || ConsumeOptions { prefetch: 20, ..group("billing") };
    let (mut first, mut second) = (subscribe_with(&topic, few()).await, subscribe_with(&topic, few()).await);
    let mut audit = join(&topic, "audit").await;
    publish(&topic, bodies(60)).await;
    assert_eq!(in_order(&cx, take_acked(&mut audit, 60).await), bodies(60).collect::<Vec<_>>());
    quiet(&mut audit).await;
    let mut ledger = Ledger::sent(bodies(60));
    let got = shared(&mut [&mut first, &mut second], &mut ledger, 60).await;
    ledger.assert_exact();
    assert!(got.iter().all(|count| *count > 0), "one member got nothing: {got:?}");
}

/// Without groups, one is refused.
pub async fn groups_refused(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&["one"]));
    refused(topic.subscribe(group("one")).await, &[ErrorKind::Unsupported]);
}

/// A group that exists keeps what is sent while none of its members is there, on another connection too.
pub async fn group_misses_nothing(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&["billing"]));
    let mut member = join(&topic, "billing").await;
    publish(&topic, ["seen".to_owned()]).await;
    assert_eq!(take_acked(&mut member, 1).await, ["seen"]);
    member.close().await.expect("close");
    publish(&topic, bodies(10)).await;
    closes(&bus).await;
    let bus = cx.bus().await;
    let mut member = join(&bus.topic(topic.address().name()), "billing").await;
    assert_eq!(in_order(&cx, take_acked(&mut member, 10).await), bodies(10).collect::<Vec<_>>());
    quiet(&mut member).await;
}

/// Where topics are at most once, that is what a group gets: nothing of what was sent while it was away, and it goes on. Without
/// groups, one is refused.
pub async fn group_misses_what_it_is_away_for(cx: Cx) {
    if !cx.capabilities().groups {
        return groups_refused(cx).await;
    }
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&["billing"]));
    let mut everything = subscribe(&topic).await;
    let mut member = join(&topic, "billing").await;
    publish(&topic, ["seen".to_owned()]).await;
    assert_eq!(take_acked(&mut member, 1).await, ["seen"]);
    member.close().await.expect("close");
    publish(&topic, ["missed".to_owned()]).await;
    // Whoever was there has it, so it is on nobody's way any more.
    assert_eq!(take_acked(&mut everything, 2).await, ["seen", "missed"]);
    let mut member = join(&topic, "billing").await;
    publish(&topic, ["seen again".to_owned()]).await;
    assert_eq!(take_acked(&mut member, 1).await, ["seen again"]);
    quiet(&mut member).await;
}

/// A new group begins with what is sent from now on, or, where it asks for it, with the oldest message.
pub async fn start_earliest(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&["old", "new"]));
    publish(&topic, bodies(5)).await;
    let mut new = join(&topic, "new").await;
    quiet(&mut new).await;
    let mut old = subscribe_with(&topic, ConsumeOptions { start: Start::Earliest, ..group("old") }).await;
    assert_eq!(in_order(&cx, take_acked(&mut old, 5).await), bodies(5).collect::<Vec<_>>());
}

/// Where nothing is kept for later, asking for earlier messages is refused, and a new group begins with new ones.
pub async fn replay_refused(cx: Cx) {
    let bus = cx.bus().await;
    if !cx.capabilities().topics {
        return super::names::topics_refused(cx).await;
    }
    let topic = bus.topic(cx.topic_name(&[]));
    refused(
        topic.subscribe(ConsumeOptions { start: Start::Earliest, ..ConsumeOptions::default() }).await,
        &[ErrorKind::Unsupported],
    );
    // Somebody must be there, or the message is lost by right.
    let mut before = subscribe(&topic).await;
    publish(&topic, ["earlier".to_owned()]).await;
    // A send that nobody confirms may be on its way for longer than it takes to subscribe.
    assert_eq!(take_acked(&mut before, 1).await, ["earlier"]);
    let mut late = subscribe(&topic).await;
    publish(&topic, ["later".to_owned()]).await;
    assert_eq!(take_acked(&mut late, 1).await, ["later"]);
    quiet(&mut late).await;
    assert_eq!(take_acked(&mut before, 1).await, ["later"]);
}

/// Wildcards in a topic's name match whole levels, and the delivery has the name that was sent to.
pub async fn wildcards(cx: Cx) {
    let wild = cx.capabilities().wildcards.expect("declared");
    let bus = cx.bus().await;
    let (base, s) = (cx.topic_name(&[]), wild.separator);
    let name = |levels: &[&str]| [&[base.as_str()], levels].concat().join(s);
    let mut one = subscribe(&bus.topic(name(&[wild.one, "created"]))).await;
    let mut many = subscribe(&bus.topic(name(&[wild.many]))).await;
    let sent = [&["eu", "created"][..], &["eu", "deleted"], &["us", "created"], &["eu", "x", "created"], &["eu"]];
    for levels in sent {
        let topic = bus.topic(name(levels));
        cx.clean_up(topic.address().clone(), None);
        publish(&topic, [levels.join("/")]).await;
    }
    let all: Vec<String> = sent.iter().map(|levels| levels.join("/")).collect();
    let created = vec!["eu/created".to_owned(), "us/created".to_owned()];
    for (subscription, mut expected) in [(&mut one, created), (&mut many, all)] {
        let mut seen = Vec::new();
        for delivery in take(subscription, expected.len()).await {
            let body = text(&delivery);
            assert_eq!(delivery.channel(), name(&body.split('/').collect::<Vec<_>>()), "the concrete name");
            seen.push(body);
            delivery.ack().await.expect("ack");
        }
        seen.sort();
        expected.sort();
        assert_eq!(seen, expected);
        quiet(subscription).await;
    }
}

/// Without wildcards, every character of a topic's name stands for itself.
pub async fn no_wildcards(cx: Cx) {
    if !cx.capabilities().topics {
        return super::names::topics_refused(cx).await;
    }
    let bus = cx.bus().await;
    let base = cx.topic_name(&[]);
    for wild in [".*", ".#", ".>", "/+", "/#"] {
        let topic = bus.topic(format!("{base}{wild}"));
        cx.clean_up(topic.address().clone(), None);
        let mut subscription = match topic.subscribe(ConsumeOptions::default()).await {
            Ok(subscription) => subscription,
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported), "{error:?}");
                continue;
            }
        };
        let other = bus.topic(format!("{base}{}a", &wild[..1]));
        cx.clean_up(other.address().clone(), None);
        publish(&other, ["elsewhere".to_owned()]).await;
        quiet(&mut subscription).await;
    }
}

async fn answer(n: u64, context: Context) -> polymq_core::Result<()> {
    context.reply(&(n * 2)).await
}

fn replies(bus: &Bus, queue: &Channel) -> ConsumerFactory {
    let mut consumers = ConsumerFactory::new(bus);
    consumers.route(queue.address().name(), answer);
    consumers
}

/// A handler's reply reaches the queue that the message names, with the request's correlation id.
pub async fn reply(cx: Cx) {
    let bus = cx.bus().await;
    let (requests, answers) = (cx.queue(&bus), cx.queue(&bus));
    let mut waiting = subscribe(&answers).await;
    let running = start(replies(&bus, &requests)).await;
    for n in 0..5_u64 {
        let request = requests.message(&n).expect("encode").with_reply_to(answers.address().name().to_owned());
        requests.send_message(request.with_correlation_id(format!("request {n}"))).await.expect("send");
    }
    for _ in 0..5 {
        let delivery = next(&mut waiting).await;
        let n: u64 = text(&delivery).parse().expect("a number");
        assert_eq!(delivery.message().correlation_id(), Some(format!("request {}", n / 2).as_str()));
        delivery.ack().await.expect("ack");
    }
    quiet(&mut waiting).await;
    running.stop().await.expect("stop");
}

/// Where a reply address cannot be carried, sending one is refused or it arrives all the same; it is never lost in silence.
pub async fn replies_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    match queue.send_message(Message::new("request").with_reply_to("replies")).await {
        Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}"),
        Ok(_) => {
            let delivery = next(&mut subscribe(&queue).await).await;
            assert_eq!(delivery.message().reply_to(), Some("replies"));
            delivery.ack().await.expect("ack");
        }
    }
}

/// A message for later comes not before its time and not long after, and lets others pass.
pub async fn delayed_send(cx: Cx) {
    const DELAY: Duration = Duration::from_secs(15);
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    let sent = Instant::now();
    queue.send_message(Message::new("late").deliver_in(DELAY)).await.expect("send");
    publish(&queue, ["now".to_owned()]).await;
    assert_eq!(take_acked(&mut subscription, 1).await, ["now"]);
    let delivery = next(&mut subscription).await;
    let after = sent.elapsed();
    assert_eq!((text(&delivery).as_str(), delivery.attempt()), ("late", 1));
    assert!(after >= DELAY, "came {:?} too early", DELAY - after);
    assert!(after < DELAY + Duration::from_secs(30), "came {:?} late", after - DELAY);
    delivery.ack().await.expect("ack");
    quiet(&mut subscription).await;
}

/// Where nothing can be sent for later, it is refused and nothing arrives.
pub async fn delayed_send_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    let late = Message::new("late").deliver_in(Duration::from_secs(1));
    refused(queue.send_message(late).await, &[ErrorKind::Unsupported]);
    for result in queue.send_all([Message::new("late").deliver_in(Duration::from_secs(1))]).await {
        refused(result, &[ErrorKind::Unsupported]);
    }
    quiet(&mut subscription).await;
    assert_eq!(cx.capabilities().delayed_send.support, Support::None);
}

/// What waits and who consumes is counted; a queue that is not there is `NotFound`.
pub async fn stats(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    refused(queue.stats(None).await, &[ErrorKind::NotFound]);
    publish(&queue, bodies(7)).await;
    let counts = async |expected: (u64, u64, u64)| {
        eventually(PATIENCE, || async {
            let stats: Stats = queue.stats(None).await.map_err(|error| error.to_string())?;
            let counted = (stats.ready, stats.unsettled.unwrap_or(expected.1), stats.consumers);
            if counted == expected { Ok(()) } else { Err(format!("{stats:?}, not {expected:?}")) }
        })
        .await;
    };
    counts((7, 0, 0)).await;
    let mut subscription = subscribe_with(&queue, crate::drive::prefetch(3)).await;
    let held = take(&mut subscription, 3).await;
    counts((4, 3, 1)).await;
    drop(held);
    subscription.close().await.expect("close");
    counts((7, 0, 0)).await;
}

/// Where nothing is counted, asking is `Unsupported`.
pub async fn stats_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(1)).await;
    refused(queue.stats(None).await, &[ErrorKind::Unsupported]);
}

/// A queue is emptied, which says how many messages are gone, and is used on.
pub async fn purge(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    refused(queue.purge().await, &[ErrorKind::NotFound]);
    publish(&queue, bodies(9)).await;
    assert_eq!(queue.purge().await.expect("purge"), 9);
    assert_eq!(queue.purge().await.expect("purge"), 0);
    let mut subscription = subscribe(&queue).await;
    quiet(&mut subscription).await;
    publish(&queue, ["after".to_owned()]).await;
    assert_eq!(take_acked(&mut subscription, 1).await, ["after"]);
}

/// Where a queue cannot be emptied, asking is `Unsupported` and nothing is gone.
pub async fn purge_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(2)).await;
    refused(queue.purge().await, &[ErrorKind::Unsupported]);
    assert_eq!(take_acked(&mut subscribe(&queue).await, 2).await.len(), 2);
}
