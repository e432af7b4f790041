//! A backend that lends messages for a time, made of the memory backend: mission row C10, and the cases of the suite
//! that only such a backend runs.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Address, Backend, Batch, Bus, Capabilities, Completion, Connection, ConsumeOptions, Consumer, ConsumerFactory,
    ConsumerRunner, Environment, Error, ErrorKind, Incoming, Message, Registry, Result, Running, State, Token,
    memory::MemoryBackend,
};
use polymq_testkit::{
    Clock, Harness, cases, eventually, run_case,
    twist::{Receiving, Twist, Twisted},
};
use tokio::{sync::mpsc, task::JoinHandle, time::Instant};

/// One loan: the token below, the message, and what ends the loan.
type Loan = (Token, Message, JoinHandle<()>);

/// Loans have tokens of their own, which are never used again.
#[derive(Debug, Default)]
struct Lends {
    lease: Mutex<Duration>,
    lent: AtomicU64,
    loans: Arc<Mutex<HashMap<Token, Loan>>>,
}

impl Lends {
    fn lend(&self, at: &Receiving, loan: Token, below: Token, message: Message, by: Duration) {
        let (loans, settler) = (Arc::clone(&self.loans), Arc::clone(&at.settler));
        let ends = tokio::spawn(async move {
            tokio::time::sleep(by).await;
            if let Some((below, message, _)) = loans.lock().expect("no panic").remove(&loan) {
                settler.release(below, message);
            }
        });
        self.loans.lock().expect("no panic").insert(loan, (below, message, ends));
    }

    /// Ends a loan for its holder; `None` when it is over already.
    fn end(&self, loan: Token) -> Option<(Token, Message)> {
        let (below, message, ends) = self.loans.lock().expect("no panic").remove(&loan)?;
        ends.abort();
        Some((below, message))
    }
}

fn over() -> Completion<()> {
    Completion::ready(Err(Error::new(ErrorKind::Stale, "the loan is over")))
}

#[async_trait]
impl Twist for Lends {
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        Capabilities { leases: true, ..own }
    }

    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        *self.lease.lock().expect("no panic") = options.lease;
        connection.consumer(address, options).await
    }

    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        let lease = *self.lease.lock().expect("no panic");
        for incoming in &mut into[before..] {
            let loan = Token(self.lent.fetch_add(1, Ordering::Relaxed));
            self.lend(at, loan, incoming.token, incoming.message.clone(), lease);
            incoming.token = loan;
        }
        Ok(())
    }

    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        self.end(token).map_or_else(over, |(below, _)| at.settler.ack(below))
    }

    fn release(&self, at: &Receiving, token: Token, message: Message) {
        if let Some((below, _)) = self.end(token) {
            at.settler.release(below, message);
        }
    }

    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        self.end(token).map_or_else(over, |(below, _)| at.settler.retry(below, message, attempt, after))
    }

    fn extend(&self, at: &Receiving, token: Token, by: Duration) -> Completion<()> {
        let Some((below, message)) = self.end(token) else { return over() };
        self.lend(at, token, below, message, by);
        Completion::ready(Ok(()))
    }
}

fn backend() -> Arc<dyn Backend> {
    Twisted::around(Arc::new(MemoryBackend), Arc::new(Lends::default()))
}

#[derive(Debug)]
struct Lending;

impl Harness for Lending {
    fn backend(&self) -> Arc<dyn Backend> {
        backend()
    }

    fn url(&self, _: Option<SocketAddr>) -> String {
        "memory://lending".into()
    }

    fn clock(&self) -> Clock {
        Clock::Paused
    }
}

#[test]
fn s2_cases_of_leases_run_on_a_backend_that_lends() {
    let harness: Arc<dyn Harness> = Arc::new(Lending);
    let ids = [
        "S2_lease_extension",
        "S2_settle_after_lease",
        "S1_ack",
        "S1_requeue",
        "S3_dropped_delivery_returns",
        "O8_long_handler_runs_once",
    ];
    for id in ids {
        let outcome = run_case(cases::find(id).expect("a case"), &harness);
        assert_eq!((outcome.result, outcome.decided), (Ok(()), None), "{id}");
    }
}

const LEASE: Duration = Duration::from_secs(30);

/// A handler that takes three minutes, on messages that are lent for half a minute at a time.
async fn long_handler(space: &str, at_most: Duration) -> (Bus, Running, mpsc::UnboundedReceiver<Instant>) {
    async fn slow(_: Message, called: State<mpsc::UnboundedSender<Instant>>) {
        called.send(Instant::now()).expect("the test listens");
        tokio::time::sleep(LEASE * 6).await;
    }
    let mut registry = Registry::new();
    registry.add(backend()).expect("one");
    let builder = Bus::builder().registry(registry).environment(Environment::default());
    let bus = builder.url(format!("memory://{space}")).connect().await.expect("connect");
    let (sender, called) = mpsc::unbounded_channel();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(sender).route("orders", slow).lease(LEASE, at_most).concurrency(2);
    bus.queue("orders").send(&1).await.expect("sent");
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    (bus, running, called)
}

#[tokio::test(start_paused = true)]
async fn c10_the_loan_is_extended_while_the_handler_runs() {
    let (bus, running, mut called) = long_handler("c10", LEASE * 1000).await;
    called.recv().await.expect("a call");
    eventually(LEASE * 10, || async {
        if running.stats("orders").expect("stats").handled == 1 { Ok(()) } else { Err("not handled") }
    })
    .await;
    tokio::time::sleep(LEASE * 10).await;
    assert!(called.try_recv().is_err(), "it was handled once");
    let stats = bus.queue("orders").stats(None).await.expect("stats");
    assert_eq!((stats.ready, stats.unsettled), (0, Some(0)));
    running.stop().await.expect("stop");
}

/// Messages of a batch are lent on while it is handled, each of them.
#[tokio::test(start_paused = true)]
async fn c10_the_loans_of_a_batch_are_extended() {
    let mut registry = Registry::new();
    registry.add(backend()).expect("one");
    let builder = Bus::builder().registry(registry).environment(Environment::default());
    let bus = builder.url("memory://c10-batch").connect().await.expect("connect");
    for n in 0..3 {
        bus.queue("orders").send(&n).await.expect("sent");
    }
    let (called, mut calls) = mpsc::unbounded_channel();
    let slow = move |batch: Batch<u64>| {
        called.send(batch.len()).expect("the test listens");
        async { tokio::time::sleep(LEASE * 6).await }
    };
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route_batch("orders", 3, slow).lease(LEASE, LEASE * 1000).concurrency(2);
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    eventually(LEASE * 20, || async {
        if running.stats("orders").expect("stats").handled == 3 { Ok(()) } else { Err("not handled") }
    })
    .await;
    tokio::time::sleep(LEASE * 10).await;
    running.stop().await.expect("stop");
    let mut sizes = Vec::new();
    while let Ok(size) = calls.try_recv() {
        sizes.push(size);
    }
    assert_eq!(sizes.iter().sum::<usize>(), 3, "each was handled once: {sizes:?}");
}

#[tokio::test(start_paused = true)]
async fn c10_the_loan_ends_at_its_hard_cap() {
    let (_bus, running, mut called) = long_handler("c10-cap", LEASE * 2).await;
    let first = called.recv().await.expect("a call");
    let again = called.recv().await.expect("the message comes again");
    let after = again - first;
    assert!(after >= LEASE * 2 && after < LEASE * 3, "it came again after {after:?}");
    running.force();
    running.stop().await.expect("stop");
}
