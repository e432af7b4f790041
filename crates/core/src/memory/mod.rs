//! The memory backend: queues and topics inside this process, always compiled in.
//!
//! It is the reference of the contract. It refuses what a server refuses, counts and redelivers like one, and
//! is what a service runs on before it has a broker.
//!
//! # URL
//!
//! `memory://` is the one space that the whole process shares; `memory://name` is a space of its own, shared by
//! every connection of this process that names it. A space lives until the process ends: what was sent over
//! one connection is received over the next, and is gone after a restart.
//!
//! | setting | default | meaning |
//! |---|---|---|
//! | `capacity` | 100000 | messages that a queue holds before senders wait |
//! | `capacity_bytes` | 268435456 | bytes that a queue holds before senders wait |
//! | `max_payload` | 16777216 | the largest body in bytes |
//!
//! A queue keeps the capacity of the connection that made it.
//!
//! # Mapping
//!
//! | contract | here |
//! |---|---|
//! | queue | one bounded queue; its consumers compete |
//! | topic | one bounded queue for each group; without a group, a queue that ends with its consumer |
//! | send | done when every queue of the channel holds the message; waits, in the order of calls, while one is full |
//! | topic without any group or consumer | the message is dropped and the send is `Ok` |
//! | deleted channel | `Unroutable` for senders, `NotFound` for consumers, until it is declared again |
//! | release | back to its old place, before what waits; counts no attempt |
//! | retry | behind what waits, now or when it is due |
//! | retry later, delayed send | kept aside by the queue until it is due, then the same |
//! | attempt | kept by the queue, as the last retry gave it |
//! | expiry | handed out; the failure policy decides |
//! | order | of one consumer; `ordered_by_key` holds within a consumer, not among several |
//!
//! # Watch
//!
//! Nobody else holds a delivery that was handed out: it comes back when it is released or dropped, not when its
//! connection is closed.

mod after;
mod backend;
mod channel;
mod config;
mod connection;
mod consumer;
mod producer;
mod queue;
mod settle;
mod space;
mod state;

pub use backend::MemoryBackend;

crate::register_backend!(MemoryBackend);

/// The backend's name.
const NAME: &str = "memory";
