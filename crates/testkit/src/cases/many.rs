//! B3: of many messages each arrives once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq_core::{Channel, ErrorKind, Message, MessageId};
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    Case, Cx, Ledger, PATIENCE,
    case::run,
    cx::lock,
    drive::{bodies, in_order, prefetch, publish, quiet, refused, subscribe, subscribe_with, take_acked, text},
};

pub(super) const CASES: &[Case] = &[
    Case::new("B3_strict_multiset", run!(strict_multiset)),
    Case::new("B3_stream_of_messages", run!(stream_of_messages)),
    Case::new("B3_results_of_a_batch", run!(results_of_a_batch)),
    Case::new("B3_one_id_each", run!(one_id_each)),
];

/// 10 000 messages, or as many as the harness says that the broker bears, are sent by 20 tasks that share a window of 128:
/// each is answered, no more are unanswered at a time, each arrives once (mission row B8). They are taken on the way, so that
/// only a few hundred wait: emulators go through all of them for each request.
pub async fn stream_of_messages(cx: Cx) {
    const SENDERS: usize = 20;
    const WINDOW: usize = 128;
    const WAITING: usize = 250;
    let count = cx.harness().backlog().min(10_000);
    let bus = cx.bus().await;
    let queue = cx.queue(&bus).with_window(WINDOW, polymq_core::WhenFull::Wait);
    let mut subscription = subscribe_with(&queue, prefetch(1000)).await;
    let room = Arc::new(Semaphore::new(WAITING));
    let senders: Vec<_> = (0..SENDERS)
        .map(|sender| {
            let (queue, room) = (queue.clone(), Arc::clone(&room));
            tokio::spawn(async move {
                let mut answers = Vec::with_capacity(count / SENDERS + 1);
                for body in bodies(count).skip(sender).step_by(SENDERS) {
                    room.acquire().await.expect("never closed").forget();
                    answers.push(queue.enqueue(Message::new(body)).await.expect("enqueue"));
                    assert!(queue.in_flight() <= WINDOW, "{} are unanswered", queue.in_flight());
                }
                answers
            })
        })
        .collect();
    let sending = async {
        let mut answers = Vec::with_capacity(count);
        for sender in senders {
            answers.extend(sender.await.expect("a sender"));
        }
        queue.flush().await.expect("flush");
        for answer in answers {
            answer.await.expect("accepted");
        }
    };
    let mut ledger = Ledger::sent(bodies(count));
    let taking = async {
        let mut seen = 0;
        while seen < count {
            let batch = subscription.receive(500, PATIENCE).await.expect("receive");
            assert!(!batch.is_empty(), "{seen} of {count} arrived");
            seen += batch.len();
            room.add_permits(batch.len());
            for delivery in batch {
                ledger.see(text(&delivery));
                delivery.ack().await.expect("ack");
            }
        }
    };
    tokio::join!(sending, taking);
    quiet(&mut subscription).await;
    ledger.assert_exact();
}

/// Of 25 messages sent together, the one that is invalid is named, and the other 24 arrive (mission row B7).
pub async fn results_of_a_batch(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let message = |(n, body): (usize, String)| {
        let message = Message::new(body);
        if n == 13 { message.with_header("no\nheader", "x") } else { message }
    };
    let results = queue.send_all(bodies(25).enumerate().map(message)).await;
    assert_eq!(results.len(), 25, "one answer each");
    for (n, result) in results.into_iter().enumerate() {
        match (n, result) {
            (13, result) => drop(refused(result, &[ErrorKind::InvalidInput])),
            (n, result) => drop(result.unwrap_or_else(|error| panic!("message {n}: {error:?}"))),
        }
    }
    let mut subscription = subscribe(&queue).await;
    let expected: Vec<_> = bodies(25).filter(|body| body != "m-000013").collect();
    assert_eq!(in_order(&cx, take_acked(&mut subscription, 24).await), expected);
    quiet(&mut subscription).await;
}

/// 5000 messages of 50 senders reach 50 consumers: each once, none twice, none foreign. Fewer of all three where the harness says
/// that the broker does not bear so many.
pub async fn strict_multiset(cx: Cx) {
    const EACH: usize = 100;
    let many = cx.harness().at_once();
    let names = |sender: usize| bodies(EACH).map(move |body| format!("{sender}/{body}"));
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut consumers = Vec::new();
    for _ in 0..many {
        consumers.push(subscribe_with(&queue, prefetch(50)).await);
    }
    let senders: Vec<_> = (0..many)
        .map(|sender| {
            let queue = queue.clone();
            tokio::spawn(async move { publish(&queue, names(sender)).await })
        })
        .collect();
    let seen = Arc::new(Mutex::new(Ledger::sent((0..many).flat_map(names))));
    let takers: Vec<_> = consumers
        .into_iter()
        .map(|mut consumer| {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                // Ends when nothing has come for a while after all was there: what comes twice comes then. Slow
                // brokers have pauses before.
                let began = Instant::now();
                loop {
                    let batch = consumer.receive(20, Duration::from_secs(2)).await.expect("receive");
                    if batch.is_empty() && (lock(&seen).is_complete() || began.elapsed() > PATIENCE * 4) {
                        return;
                    }
                    for delivery in batch {
                        lock(&seen).see(text(&delivery));
                        delivery.ack().await.expect("ack");
                    }
                }
            })
        })
        .collect();
    for task in senders.into_iter().chain(takers) {
        task.await.expect("a sender or consumer");
    }
    let seen = lock(&seen);
    cx.note(format_args!("{many} senders and consumers, duplicate ratio {:.4}", seen.duplicate_ratio()));
    seen.assert_exact();
}

/// However messages are sent, alone, together or without waiting, and by however many tasks: each has an id of its own, which its
/// sender is told and its consumer sees.
pub async fn one_id_each(cx: Cx) {
    const ROUNDS: usize = 4;
    const OF_A_ROUND: usize = 5;
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe_with(&queue, prefetch(50)).await;
    let many = cx.harness().at_once();
    let senders: Vec<_> =
        (0..many).map(|sender| tokio::spawn(send_in_every_way(queue.clone(), sender, ROUNDS))).collect();
    let mut seen = HashMap::new();
    while seen.len() < many * ROUNDS * OF_A_ROUND {
        let batch = subscription.receive(100, PATIENCE).await.expect("receive");
        assert!(!batch.is_empty(), "{} bodies have come", seen.len());
        for delivery in batch {
            let id = delivery.message().id().cloned().expect("every message has an id");
            let before = seen.insert(text(&delivery), id.clone());
            assert!(
                before.as_ref().is_none_or(|before| *before == id),
                "a redelivery has another id: {before:?}, {id}"
            );
            delivery.ack().await.expect("ack");
        }
    }
    let mut owners = HashMap::new();
    for (body, id) in &seen {
        if let Some(other) = owners.insert(id, body) {
            panic!("{other} and {body} have one id, {id}");
        }
    }
    for sender in senders {
        for (body, id) in sender.await.expect("a sender") {
            assert_eq!(seen.get(&body), Some(&id), "the id that the sender of {body} was told");
        }
    }
}

/// Three messages together, one alone and one without waiting, and what each sender was told.
async fn send_in_every_way(queue: Channel, sender: usize, rounds: usize) -> Vec<(String, MessageId)> {
    let mut told = Vec::new();
    for round in 0..rounds {
        let body = |n: usize| format!("{sender}/{round}/{n}");
        let mut receipts = queue.send_all((0..3).map(|n| Message::new(body(n)))).await;
        receipts.push(queue.send_message(Message::new(body(3))).await);
        receipts.push(queue.enqueue(Message::new(body(4))).await.expect("enqueue").await);
        let receipts = receipts.into_iter().map(|receipt| receipt.expect("accepted"));
        told.extend(receipts.enumerate().map(|(n, receipt)| (body(n), receipt.id)));
    }
    told
}
