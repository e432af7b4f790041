//! What clients and servers see.
//! One program, so that it is built and linked once.

#![allow(missing_docs, unreachable_pub)]

mod client;
mod closing;
#[path = "../peer/mod.rs"]
mod peer;
mod requests;
mod tls;
