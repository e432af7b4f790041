//! F10, F11: the queue goes away, and consumers come and go, while the connection stays.

use polymq_core::{ConsumeOptions, ConsumerFactory, ErrorKind, Message, State};
use tokio::time::Instant;

use super::scenario::{Expect, Plan, Scenario};
use crate::{
    Case, Cx, Deletion, PATIENCE,
    case::run,
    drive::{Log, closes, publish, start},
    eventually,
};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("F10_queue_deleted_in_use", run!(queue_deleted_in_use))
        .with("queues that can be deleted", |harness| harness.deletes_in_use().map(drop))
        .broker(),
    Case::new("F11_member_joins_and_leaves", run!(member_joins_and_leaves))
        .with("consumers that share", |harness| harness.members().map(drop))
        .broker(),
];

async fn note(message: Message, log: State<Log>) {
    log.add(&message, 1);
}

/// Somebody deletes the queue under its consumer and its sender: it is declared again, and what is accepted from then on
/// is handled. Another queue on the connection goes on, and so does the connection, unless the harness says that a queue is a
/// connection there.
pub async fn queue_deleted_in_use(cx: Cx) {
    let plan = Plan::at(cx.harness().url(None)).patient(&cx);
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(20).await;
    let beside = cx.queue(&scenario.bus);
    let beside_log = Log::default();
    let mut consumers = ConsumerFactory::new(&scenario.bus);
    consumers.state(beside_log.clone()).route(beside.address().name(), note);
    let running = start(consumers).await;
    publish(&beside, ["before".to_owned()]).await;
    beside_log.reaches(1).await;

    let other = cx.bus().await;
    other.channel(scenario.queue.address().clone()).delete(None).await.expect("delete");
    closes(&other).await;
    let deleted = Instant::now();
    publish(&beside, ["after".to_owned()]).await;
    beside_log.reaches(2).await;
    // Until it is there again, senders may be told that it is not.
    let gone = [ErrorKind::NotFound, ErrorKind::Unroutable];
    eventually(cx.harness().recovery(), || async {
        scenario.queue.declare(ConsumeOptions::default()).await.map_err(|error| error.to_string())?;
        match scenario.perhaps(PATIENCE).await {
            Ok(()) => Ok(()),
            Err(error) => {
                assert!(gone.contains(&error.kind()) || error.retry() != polymq_core::Retry::Never, "{error:?}");
                Err(error.to_string())
            }
        }
    })
    .await;
    scenario.works_again(deleted).await;
    scenario.sends_and_handles(20).await;
    running.stop().await.expect("stop");
    assert_eq!(beside_log.bodies(), ["before", "after"]);
    let only = cx.harness().deletes_in_use() == Ok(&Deletion::OfChannel);
    scenario.ends(if only { Expect::Stays } else { Expect::IsUp }).await;
}

/// A second consumer joins under load, takes its share, and leaves under load: nothing is lost. (This is the half of
/// "leader change and rebalance" that one node can show: the share of each member moves twice.)
pub async fn member_joins_and_leaves(cx: Cx) {
    let mut plan = Plan::at(cx.harness().url(None)).patient(&cx);
    // Where members share a queue by its parts, there must be some.
    if cx.harness().backend().keys().iter().any(|key| key.name == "partitions") {
        plan.settings.push(("partitions".into(), "8".into()));
    }
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(20).await;
    let joined = Instant::now();
    let member = scenario.member().await;
    while member.handled.len() < 20 {
        assert!(joined.elapsed() < cx.harness().recovery(), "the second consumer gets nothing");
        scenario.send(50);
        scenario.all_accepted().await;
    }
    cx.note(format_args!("the second consumer has its share after {:?}", joined.elapsed()));
    // It leaves in the middle of its work: with messages in its hands.
    let held_up = member.is_held_up().await;
    scenario.send(cx.load(300));
    scenario.all_accepted().await;
    member.leaves(held_up).await;
    scenario.works_again(Instant::now()).await;
    scenario.ends(Expect::Stays).await;
}
