//! What clients and operators see of the broker.
//! One program, so that it is built and linked once.

#![allow(missing_docs, unreachable_pub)]

mod access;
mod channels;
#[path = "../common/mod.rs"]
mod common;
mod drain;
mod http;
mod patterns;
mod queues;
mod readers;
mod refusals;
mod tls;
mod transactions;
mod under_way;
