#![doc = include_str!("../README.md")]

mod admin;
mod backend;
mod client;
mod config;
mod connect;
mod connection;
mod consumer;
mod convert;
mod dial;
mod error;
mod group;
mod held;
mod link;
mod listener;
mod names;
mod outbox;
mod position;
mod producer;
mod settle;
mod shared;
mod topology;
mod transport;

pub use crate::{
    backend::KubeMqBackend,
    client::{
        Accepted, Answered, Ask, Asked, Corrupted, Events, KubeMq, Policy, Poll, Reply, RequestKind, Responder,
        StartAt, Transaction,
    },
    config::{Declare, KEYS, KubeMqConfig, Topics},
    connection::{KubeMqConnection, ServerInfo},
    topology::{ChannelInfo, ChannelTraffic, Pattern},
    transport::InProcess,
};

/// The name of this backend.
pub const NAME: &str = "kubemq";

polymq_core::register_backend!(KubeMqBackend);
