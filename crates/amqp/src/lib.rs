#![doc = include_str!("../README.md")]

mod admin;
mod backend;
mod config;
mod connect;
mod connection;
mod consumer;
mod convert;
mod error;
mod health;
mod inflight;
mod link;
mod login;
mod options;
mod pool;
mod producer;
mod publisher;
mod refused;
mod session;
mod settle;
mod socket;
#[cfg(feature = "tls")]
mod tls;
mod topology;
mod transport;
mod window;

pub use crate::{
    backend::AmqpBackend,
    config::{AmqpConfig, Declare, KEYS, QueueType, TlsVersion},
    connection::AmqpConnection,
};
/// The client library, for [`AmqpConnection::native`].
pub use lapin;

/// The name of this backend.
pub const NAME: &str = "amqp";

polymq_core::register_backend!(AmqpBackend);
