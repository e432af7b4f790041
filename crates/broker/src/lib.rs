#![doc = include_str!("../README.md")]

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
mod numbers;
mod queue;
mod queues;
mod readers;
mod refusal;
mod requests;
mod retention;
mod room;
mod row;
mod rules;
mod service;
mod store;
mod tls;
mod tokens;
mod under_way;

pub use broker::{Broker, Builder, InProcess};
pub use error::{BrokerError, Result};
pub use limits::Limits;
pub use store::StoreError;
pub use tokens::TokenAlgorithm;

/// The snippets of the broker's page are compiled with the doc tests.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/broker.md")]
struct Page;
