#![doc = include_str!("../README.md")]

mod brokers;
mod captured;
mod case;
pub mod cases;
#[cfg(feature = "certificates")]
mod certificates;
mod child;
mod cx;
mod drive;
pub mod faulty;
mod figures;
mod harness;
mod ledger;
pub mod mutant;
mod ports;
mod probe;
mod proxy;
mod recorder;
mod service;
mod suite;
#[cfg(feature = "certificates")]
mod tls_front;
mod tools;
pub mod twist;

use std::time::{Duration, SystemTime};

use polymq_core::Message;

pub use crate::{
    brokers::{Broker, DIRECTORY_VARIABLE, SCRIPT_VARIABLE},
    case::{Case, Run},
    child::run_if_child,
    cx::{Cx, LOAD_VARIABLE, PATIENCE, QUIET},
    drive::closes,
    figures::{FIGURES_VARIABLE, Figures},
    harness::{BareClient, BareMessage, BareReceiver, BrokerControl, Clock, Denied, Harness, Heartbeat},
    ledger::Ledger,
    ports::free_port,
    probe::{eventually, try_eventually},
    proxy::{Direction, Proxy, ProxyStats},
    recorder::{Recorder, Sent, TestBus},
    service::TestService,
    suite::{Outcome, Suite, Use, run_case},
    tools::{Deletion, Passwords, Switch, Tool},
};
#[cfg(feature = "certificates")]
pub use crate::{
    certificates::{Certificates, TlsServer},
    tls_front::TlsFront,
};

/// The message whose form on the wire every backend writes down in its harness.
#[must_use]
pub fn golden_message() -> Message {
    Message::new("{\"id\": 7}")
        .with_id("0190a0a0-0000-7000-8000-000000000007")
        .with_time(SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123))
        .with_content_type("application/json")
        .with_kind("order.created")
        .with_version(2)
        .with_key("customer-7")
        .with_correlation_id("saga-1")
        .with_reply_to("replies")
        .with_header("tenant", "acme é")
}
