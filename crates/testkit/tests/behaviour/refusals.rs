//! A backend that declares that it cannot return messages, delay them or count attempts gets the other form of each case.

use std::{net::SocketAddr, sync::Arc};

use polymq_core::{Backend, Capabilities, Delay, DeliveryCount, Order, Support, memory::MemoryBackend};
use polymq_testkit::{
    Clock, Harness, cases, run_case,
    twist::{Twist, Twisted},
};

#[derive(Debug)]
struct CanDoLittle;

impl Twist for CanDoLittle {
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        Capabilities {
            topics: false,
            groups: false,
            requeue: Support::None,
            delayed_retry: Delay::default(),
            delivery_count: DeliveryCount::None,
            order: Order::None,
            detects_unroutable: false,
            ..own
        }
    }
}

#[derive(Debug)]
struct Poor;

impl Harness for Poor {
    fn backend(&self) -> Arc<dyn Backend> {
        Twisted::around(Arc::new(MemoryBackend), Arc::new(CanDoLittle))
    }

    fn url(&self, _: Option<SocketAddr>) -> String {
        "memory://poor".into()
    }

    fn clock(&self) -> Clock {
        Clock::Paused
    }
}

/// The memory backend without a word that there is no broker.
#[derive(Debug)]
struct NoBroker;

impl Harness for NoBroker {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(MemoryBackend)
    }

    fn url(&self, _: Option<SocketAddr>) -> String {
        "memory://no-broker".into()
    }
}

#[test]
fn i6_a_case_without_its_broker_fails_and_says_so() {
    let harness: Arc<dyn Harness> = Arc::new(NoBroker);
    for case in cases::all().filter(|case| case.needs_broker()) {
        let outcome = run_case(case, &harness);
        // What is decided by "not persistent" needs no broker.
        if outcome.decided.is_some() {
            continue;
        }
        let why = outcome.result.expect_err("it cannot pass without a broker");
        assert_eq!(why, "this case needs a broker; the harness has none", "{case:?}");
    }
}

#[test]
fn a_declared_no_is_tested_as_a_refusal() {
    let harness: Arc<dyn Harness> = Arc::new(Poor);
    let capabilities = harness.backend().capabilities();
    let mut decided = Vec::new();
    // These need a delivery to be returned once to show that nothing is counted.
    let counted = ["S8_attempts_count", "S8_attempts_survive_restart"];
    for case in cases::all().filter(|case| !case.needs_broker() && !counted.contains(&case.id)) {
        let Some(capability) = case.decided_by(&capabilities) else { continue };
        let outcome = run_case(case, &harness);
        assert_eq!(outcome.result, Ok(()), "{case:?} without {capability}");
        assert_eq!(outcome.decided, Some(capability));
        decided.push(case.id);
    }
    for id in [
        "S1_requeue",
        "S1_delayed_nack",
        "R1_schedule",
        "R9_restart_in_backoff",
        "O1_per_key_order",
        "B8_unroutable_is_an_error",
    ] {
        assert!(decided.contains(&id), "{id} is not among {decided:?}");
    }
}
