#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod answer;
mod backend;
mod body;
mod client;
mod config;
mod connect;
mod connection;
mod consumer;
mod convert;
mod error;
mod lanes;
mod listener;
mod place;
mod producer;
mod recovery;
mod server;
mod settle;
mod target;
#[cfg(feature = "tls")]
mod tls;
mod token;
mod written;

pub use crate::{
    backend::HttpBackend,
    config::{Http2, HttpConfig, KEYS, TlsVersion},
    connect::{Client, Connector},
    connection::HttpConnection,
    error::Refusal,
};
/// The client libraries, for [`HttpConnection::native`].
pub use {http, http_body_util, hyper_util};

/// The name of this backend.
pub const NAME: &str = "http";

polymq_core::register_backend!(HttpBackend);
