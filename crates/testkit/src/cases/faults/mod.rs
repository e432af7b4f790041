//! F1 to F19, and R9 where something is killed: the broker and the network fail while messages are on their way.
//!
//! Each case is a `Scenario`: numbered messages, something that breaks, and the same checks afterwards. What was accepted
//! is handled, duplicates are counted, health went down and came up again, nothing leaks, and the figures are in the
//! summary.

mod accepted;
pub mod acks;
pub mod away;
pub mod backoff;
pub mod channels;
pub mod clock;
pub mod credentials;
pub mod killed;
mod member;
pub mod network;
pub mod paths;
mod plan;
pub mod poison;
pub mod pressure;
pub mod restart;
mod scenario;
mod states;
