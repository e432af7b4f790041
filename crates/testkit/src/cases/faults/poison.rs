//! F19: a flood of messages that cannot be decoded.

use std::collections::BTreeSet;

use polymq_core::{ConsumerFactory, Message, State};
use tokio::time::Instant;

use super::{scenario::leaves_no_task, states::States};
use crate::{
    Case, Cx, Figures, Ledger, PATIENCE,
    case::run,
    drive::{Log, closes, counted_within, dead_letters, start, text},
};

pub(in crate::cases) const CASES: &[Case] = &[Case::new("F19_poison_flood", run!(poison_flood))];

async fn count(number: u64, log: State<Log>) {
    log.add(&Message::new(number.to_string()), 1);
}

/// One of ten messages cannot be decoded: every good one is handled once, every bad one is a dead letter once, and
/// nothing is tried twice.
pub async fn poison_flood(cx: Cx) {
    const COUNT: usize = 2000;
    let is_bad = |number: &usize| number % 10 == 3;
    let body = move |number: usize| if is_bad(&number) { format!("bad {number}") } else { number.to_string() };
    let states = States::default();
    let bus = states.watched(cx.steady(cx.builder())).connect().await.expect("connect");
    let queue = cx.queue(&bus);
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), count).concurrency(8).prefetch(50);
    let running = start(consumers).await;
    let began = Instant::now();
    let messages = (0..COUNT).map(|number| Message::new(body(number)).with_content_type("application/json"));
    for sent in queue.send_all(messages).await {
        sent.expect("accepted");
    }
    for (what, count) in [("dead_lettered", COUNT / 10), ("handled", COUNT - COUNT / 10)] {
        counted_within(PATIENCE * 4, &running, queue.address().name(), what, count as u64).await;
    }
    let took = began.elapsed();
    let mut ledger = Ledger::sent((0..COUNT).filter(|number| !is_bad(number)).map(body));
    log.bodies().into_iter().for_each(|body| ledger.see(body));
    ledger.assert_exact();
    let mut letters = dead_letters(&bus, &queue).await;
    let mut bad = BTreeSet::new();
    while bad.len() < COUNT / 10 {
        let letter = crate::drive::next(&mut letters).await;
        assert!(bad.insert(text(&letter)), "{} twice", text(&letter));
        letter.ack().await.expect("ack");
    }
    crate::drive::quiet(&mut letters).await;
    assert_eq!(bad, (0..COUNT).filter(is_bad).map(body).collect());
    assert_eq!(states.downs(), 0, "bad messages are no lost connection: {states}");
    cx.note(format_args!("{COUNT} messages, {} of them bad, in {took:?}", bad.len()));
    let handled = log.len() + bad.len();
    cx.record(Figures { accepted: COUNT, handled, health: states.to_string(), ..Figures::default() });
    running.stop().await.expect("stop");
    closes(&bus).await;
    leaves_no_task().await;
}
