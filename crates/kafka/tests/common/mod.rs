//! What the tests of this crate have in common: Kafka behind a proxy, and a client that knows nothing of polymq.

#![allow(dead_code, unreachable_pub, missing_docs)] // not every test needs all of it

pub mod bare;
pub mod relay;
