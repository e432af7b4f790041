#![doc = include_str!("../README.md")]

mod admin;
mod backend;
mod clients;
mod config;
mod connection;
mod consumer;
mod convert;
mod error;
mod link;
mod names;
mod options;
mod outbox;
mod place;
mod policy;
mod poll;
mod producer;
mod requests;
mod sends;
mod settle;
mod shared;
mod topology;
mod wrapped;

pub use crate::{
    backend::SqsBackend,
    config::{Declare, KEYS, SqsConfig},
    connection::SqsConnection,
};
/// The client libraries, for [`SqsConnection::native`] and [`SqsConnection::native_sns`].
pub use {aws_sdk_sns, aws_sdk_sqs};

/// The name of this backend.
pub const NAME: &str = "sqs";

polymq_core::register_backend!(SqsBackend);
