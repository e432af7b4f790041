//! A program that only sends, and what a signal does to it. One test: a signal reaches every one of this process.
#![allow(missing_docs)]
#![cfg(unix)]

mod common;

use std::{process::Command, time::Duration};

use common::{Log, Order, order};
use polymq_core::{Bus, ConsumerFactory, ConsumerRunner, ErrorKind, Failure, State, run_service};
use tokio::{sync::oneshot, time::timeout};

const LONG: Duration = Duration::from_secs(60);

fn terminate_us() {
    let id = std::process::id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().expect("runs").success());
}

/// Runs a main that tells of its bus when it has come far enough for a signal.
async fn signalled<Fut>(main: impl FnOnce(Bus, oneshot::Sender<Bus>) -> Fut + Send + 'static) -> Bus
where
    Fut: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let (ready, is_ready) = oneshot::channel();
    let service = tokio::spawn(run_service(move |bus| main(bus, ready)));
    let bus = is_ready.await.expect("main is called");
    terminate_us();
    timeout(LONG, service).await.expect("it ends").expect("no panic").expect("in order");
    let error = bus.queue("orders").send(&order(9)).await.expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    bus
}

#[tokio::test]
async fn a_signal_ends_a_program_without_consumers_in_order() {
    signalled(async |bus, ready| {
        bus.queue("orders").send(&order(1)).await?;
        drop(ready.send(bus));
        std::future::pending().await
    })
    .await;

    // One that runs a service itself goes on until that has drained, and a little longer.
    let log = Log::default();
    let seen = log.clone();
    signalled(async move |bus: Bus, ready| {
        let mut consumers = ConsumerFactory::new(&bus);
        let ready = std::sync::Mutex::new(Some((ready, bus.clone())));
        consumers.state(log.clone()).state(ready).route("drained", slow);
        bus.queue("drained").send(&order(2)).await?;
        ConsumerRunner::new(consumers).run().await?;
        tokio::task::yield_now().await;
        log.add("returned");
        Ok(())
    })
    .await;
    assert_eq!(seen.entries(), ["begun", "ended", "returned"]);
}

type Ready = std::sync::Mutex<Option<(oneshot::Sender<Bus>, Bus)>>;

async fn slow(_: Order, ready: State<Ready>, log: State<Log>) {
    log.add("begun");
    if let Some((ready, bus)) = ready.lock().expect("not poisoned").take() {
        drop(ready.send(bus));
    }
    // The drain has begun long before this ends.
    tokio::time::sleep(Duration::from_millis(500)).await;
    log.add("ended");
}
