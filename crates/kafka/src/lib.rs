#![doc = include_str!("../README.md")]

mod admin;
mod backend;
mod bodies;
mod brokers;
mod client;
mod config;
mod connection;
mod consumer;
mod context;
mod convert;
mod endpoint;
mod error;
mod hub;
mod joining;
mod link;
mod partition;
mod poller;
mod position;
mod producer;
mod publisher;
mod record;
mod settle;
mod stats;
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
