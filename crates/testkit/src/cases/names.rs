//! B4: what is sent arrives where it was sent, whatever the names are.

use polymq_core::{Address, ConsumeOptions, ErrorKind, Message};

use crate::{
    Case, Cx, Ledger,
    case::run,
    drive::{bodies, publish, quiet, refused, subscribe, take, take_acked, text},
};

pub(super) const CASES: &[Case] = &[
    Case::new("B4_isolation", run!(isolation)),
    Case::new("B4_many_queues_at_once", run!(many_queues_at_once)),
    Case::new("B4_queue_and_topic_of_one_name", run!(queue_and_topic)).when(
        "topics, kinds_apart",
        |c| c.topics && c.kinds_apart,
        run!(queue_and_topic_refused),
    ),
    Case::new("B4_awkward_names", run!(awkward_names)),
    Case::new("B4_prefix_collisions", run!(prefix_collisions)),
    Case::new("B4_isolation_of_topics", run!(isolation_of_topics)).when("topics", |c| c.topics, run!(topics_refused)),
    Case::new("B4_names_of_topics", run!(names_of_topics)).when("topics", |c| c.topics, run!(topics_refused)),
];

/// Two queues do not mix.
pub async fn isolation(cx: Cx) {
    let bus = cx.bus().await;
    let (one, two) = (cx.queue(&bus), cx.queue(&bus));
    let (mut from_one, mut from_two) = (subscribe(&one).await, subscribe(&two).await);
    // By turns, so that two names of one queue cannot look like two queues.
    for body in bodies(20) {
        publish(&one, [format!("one/{body}")]).await;
        publish(&two, [format!("two/{body}")]).await;
    }
    let (seen_two, seen_one) = (take_acked(&mut from_two, 20).await, take_acked(&mut from_one, 20).await);
    assert!(seen_one.iter().all(|body| body.starts_with("one/")), "{seen_one:?}");
    assert!(seen_two.iter().all(|body| body.starts_with("two/")), "{seen_two:?}");
    quiet(&mut from_one).await;
    quiet(&mut from_two).await;
}

/// Twenty queues that are filled and read at the same time: each has its hundred messages, once, and nothing of another.
pub async fn many_queues_at_once(cx: Cx) {
    const QUEUES: usize = 20;
    const EACH: usize = 100;
    let bus = cx.bus().await;
    let users: Vec<_> = (0..QUEUES)
        .map(|n| {
            let queue = cx.queue(&bus);
            tokio::spawn(async move {
                let names = bodies(EACH).map(move |body| format!("{n}/{body}"));
                let mut subscription = subscribe(&queue).await;
                publish(&queue, names.clone()).await;
                let mut ledger = Ledger::sent(names);
                take_acked(&mut subscription, EACH).await.into_iter().for_each(|body| ledger.see(body));
                quiet(&mut subscription).await;
                ledger.assert_exact();
            })
        })
        .collect();
    for user in users {
        user.await.expect("a user of a queue");
    }
}

/// A queue and a topic of one name do not mix.
pub async fn queue_and_topic(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let topic = bus.topic(queue.address().name());
    cx.clean_up(topic.address().clone(), None);
    let (mut from_queue, mut from_topic) = (subscribe(&queue).await, subscribe(&topic).await);
    publish(&topic, ["to the topic".to_owned()]).await;
    publish(&queue, ["to the queue".to_owned()]).await;
    assert_eq!(take_acked(&mut from_queue, 1).await, ["to the queue"]);
    assert_eq!(take_acked(&mut from_topic, 1).await, ["to the topic"]);
    quiet(&mut from_topic).await;
    quiet(&mut from_queue).await;
}

/// Without topics, one is refused; where the two would mix, the second of them is.
pub async fn queue_and_topic_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["to the queue".to_owned()]).await;
    let topic = bus.topic(queue.address().name());
    let expected = [if cx.capabilities().topics { ErrorKind::Conflict } else { ErrorKind::Unsupported }];
    refused(topic.subscribe(ConsumeOptions::default()).await, &expected);
}

/// Without topics, one is refused.
pub async fn topics_refused(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&[]));
    refused(topic.subscribe(ConsumeOptions::default()).await, &[ErrorKind::Unsupported]);
}

/// Each name either carries messages of its own, or is refused alike by sending and by subscribing, before any I/O.
async fn names_are_apart(cx: &Cx, names: &[&str]) {
    let bus = cx.bus().await;
    let prefix = cx.name();
    let mut open = Vec::new();
    for name in names {
        let address = Address::queue(format!("{prefix}{name}"));
        cx.clean_up(address.clone(), None);
        let queue = bus.channel(address);
        let sent = queue.send_message(Message::new((*name).to_owned())).await;
        match sent {
            Ok(_) => open.push((*name, subscribe(&queue).await)),
            Err(error) => {
                let kinds = [ErrorKind::InvalidInput, ErrorKind::Unsupported];
                refused::<()>(Err(error), &kinds);
                refused(queue.subscribe(ConsumeOptions::default()).await, &kinds);
                cx.note(format_args!("the name {name:?} is refused"));
            }
        }
    }
    assert!(!open.is_empty(), "every name was refused");
    for (name, subscription) in &mut open {
        let deliveries = take(subscription, 1).await;
        assert_eq!(text(&deliveries[0]), *name, "the queue of this name");
        quiet(subscription).await;
        for delivery in deliveries {
            delivery.ack().await.expect("ack");
        }
    }
}

/// Awkward names work untouched or are refused with a typed error; two of them are never the same queue.
pub async fn awkward_names(cx: Cx) {
    let names = [
        "a b",
        "ä",
        "a\u{308}",
        "日本語",
        "🦀",
        "a'b\"c",
        "a`b;c",
        "%2e",
        "a=b&c",
        "a,b",
        "a:b",
        "a@b",
        "(a)",
        "[a]",
        "{a}",
        "a~b",
        "a|b",
        "a^b",
        "a!b",
        "$a",
        // Some brokers know letters and digits only.
        "plain",
    ];
    names_are_apart(&cx, &names).await;
    let bus = cx.bus().await;
    for name in ["", " ", "a\nb", "a\0b", &"n".repeat(201)] {
        refused(bus.queue(name).send_message(Message::new("x")).await, &[ErrorKind::InvalidInput]);
        refused(bus.queue(name).subscribe(ConsumeOptions::default()).await, &[ErrorKind::InvalidInput]);
    }
}

/// Names that a careless mapping would make equal are different queues.
pub async fn prefix_collisions(cx: Cx) {
    let names = [
        "", ".a.b", ".a_b", ".a-b", ".A.b", ".a.b.c", ".a", ".a.", "_a_b", "-a-b", "_a.b", "/a/b", ".a+b", ".a#b",
        ".a*b", ".a>b",
    ];
    names_are_apart(&cx, &names).await;
}

/// Two topics do not mix.
pub async fn isolation_of_topics(cx: Cx) {
    let bus = cx.bus().await;
    let (one, two) = (bus.topic(cx.topic_name(&[])), bus.topic(cx.topic_name(&[])));
    let (mut from_one, mut from_two) = (subscribe(&one).await, subscribe(&two).await);
    for body in bodies(20) {
        publish(&one, [format!("one/{body}")]).await;
        publish(&two, [format!("two/{body}")]).await;
    }
    let (seen_two, seen_one) = (take_acked(&mut from_two, 20).await, take_acked(&mut from_one, 20).await);
    assert!(seen_one.iter().all(|body| body.starts_with("one/")), "{seen_one:?}");
    assert!(seen_two.iter().all(|body| body.starts_with("two/")), "{seen_two:?}");
    quiet(&mut from_one).await;
    quiet(&mut from_two).await;
}

/// A topic's name, awkward or such that a careless mapping would make it equal to another, carries messages of its own, or is
/// refused by subscribing and by sending.
pub async fn names_of_topics(cx: Cx) {
    let names = [
        "",
        ".a.b",
        ".a_b",
        ".a-b",
        ".A.b",
        ".a",
        "_a_b",
        "-a-b",
        "/a/b",
        "plain",
        "ä",
        "a\u{308}",
        "日本語",
        "🦀",
        "a b",
        "a:b",
        "a@b",
        "%2e",
        "$a",
    ];
    let bus = cx.bus().await;
    let prefix = cx.topic_name(&[]);
    let (mut open, mut topics) = (Vec::new(), Vec::new());
    for name in names {
        let address = Address::topic(format!("{prefix}{name}"));
        cx.clean_up(address.clone(), None);
        let topic = bus.channel(address);
        match topic.subscribe(ConsumeOptions::default()).await {
            Ok(subscription) => {
                open.push((name, subscription));
                topics.push((name, topic));
            }
            Err(error) => {
                let kinds = [ErrorKind::InvalidInput, ErrorKind::Unsupported];
                refused::<()>(Err(error), &kinds);
                refused(topic.send_message(Message::new(name)).await, &kinds);
                cx.note(format_args!("the topic's name {name:?} is refused"));
            }
        }
    }
    assert!(open.len() > 3, "nearly every name was refused");
    // Everybody is there before the first message, so that whoever shares a topic gets two.
    for (name, topic) in &topics {
        publish(topic, [(*name).to_owned()]).await;
    }
    for (name, subscription) in &mut open {
        assert_eq!(take_acked(subscription, 1).await, [*name], "the topic of this name");
        quiet(subscription).await;
    }
}
