//! One connection that is used in several runtimes, of which only the one that made it stays.

use std::time::Duration;

use polymq_core::Address;
use tokio::{
    runtime::{Builder, Runtime},
    time::timeout,
};

use crate::{
    harness::{self, Broker, body},
    words::*,
};

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

#[test]
fn a_consumer_outlives_the_runtime_that_it_was_made_in() {
    let (main, short) = (runtime(), runtime());
    let broker = main.block_on(Broker::start());
    let bus = main.block_on(broker.connect());
    let queue = Address::queue("two-runtimes");
    let mut first = short.block_on(bus.consumer(&queue, &consume())).expect("consumer");
    drop(short);
    main.block_on(async {
        let options = consume();
        let second = bus.consumer(&queue, &options);
        let mut second = timeout(harness::PATIENCE, second).await.expect("in time").expect("consumer");
        second.close().await.expect("closed");
        send_many(&*bus, &queue, "m", 20).await;
        each_once(harness::take(&mut *first, 20).await.iter().map(body), "m", 20);
        bus.close().await.expect("closed");
    });
}

#[test]
fn a_retry_outlives_the_runtime_that_it_was_asked_in() {
    let (main, short) = (runtime(), runtime());
    let broker = main.block_on(Broker::start());
    let bus = main.block_on(broker.connect());
    // The retry of a group waits in this process.
    let topic = Address::topic("two-runtimes");
    let mut member = main.block_on(bus.consumer(&topic, &group("audit"))).expect("consumer");
    main.block_on(send_many(&*bus, &topic, "m", 2));
    let held = main.block_on(harness::hold(&mut *member, 2));
    let settler = member.settler();
    let retry = |n: usize| settler.retry(held[n].token, &held[n].message, 2, Duration::from_secs(1));
    short.block_on(async { retry(0).await }).expect("will happen");
    drop(short);
    // And one that is asked for in no runtime at all.
    let retried = retry(1);
    main.block_on(async {
        retried.await.expect("will happen");
        let again = harness::take(&mut *member, 2).await;
        each_once(again.iter().map(body), "m", 2);
        assert!(again.iter().all(|incoming| incoming.attempt() == 2));
        bus.close().await.expect("closed");
    });
}
