#![doc = include_str!("../README.md")]

mod backend;
mod config;
mod connection;
mod consumer;
mod convert;
mod error;
mod inflight;
mod link;
mod pool;
mod producer;
mod publisher;
mod settle;
mod topology;
mod transport;
mod window;

pub use crate::{
    backend::AmqpBackend,
    config::{AmqpConfig, Declare, KEYS, QueueType},
    connection::AmqpConnection,
};
/// The client library, for [`AmqpConnection::native`].
pub use lapin;

/// The name of this backend.
pub const NAME: &str = "amqp";

polymq_core::register_backend!(AmqpBackend);
