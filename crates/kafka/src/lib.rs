#![doc = include_str!("../README.md")]

mod backend;
mod client;
mod config;
mod connection;
mod consumer;
mod convert;
mod error;
mod hub;
mod link;
mod partition;
mod poller;
mod position;
mod producer;
mod publisher;
mod settle;
mod tally;
mod topology;
mod transactions;

pub use crate::{
    backend::KafkaBackend,
    config::{Compression, Declare, KEYS, KafkaConfig, Mechanism},
    connection::KafkaConnection,
};
/// The client library, for [`KafkaConnection::native_config`].
pub use rdkafka;

/// The name of this backend.
pub const NAME: &str = "kafka";

polymq_core::register_backend!(KafkaBackend);
