//! An embeddable, durable message broker that speaks KubeMQ's gRPC protocol.
//!
//! A send is answered when it is on disk. Queues keep order, redeliver what was not acknowledged, and keep dead
//! letters; delays, expirations and counts survive a restart, also one that nobody planned.

mod access;
mod bounded;
mod broker;
mod check;
mod connections;
mod counts;
mod error;
mod events;
mod folder;
mod http;
mod limits;
mod log;
mod names;
mod queue;
mod queues;
mod refusal;
mod requests;
mod retention;
mod room;
mod rules;
mod service;
mod store;
mod tls;
mod tokens;

pub use broker::{Broker, Builder};
pub use error::{BrokerError, Result};
pub use limits::Limits;
pub use store::StoreError;
pub use tokens::TokenAlgorithm;

/// The snippets of the broker's page are compiled with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/broker.md")]
struct Page;
