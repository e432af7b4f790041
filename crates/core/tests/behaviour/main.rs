//! What a service sees of the contract, on the memory backend.
//! One program, so that it is built and linked once.

#![allow(missing_docs, unreachable_pub)]

mod admin;
mod attaching;
#[path = "../common/mod.rs"]
mod common;
mod deadlines;
mod dispatch;
mod far;
mod flow;
mod in_place;
mod layers;
mod limits;
mod memory_backend;
mod outcomes;
mod pairs;
mod rules;
mod sending;
mod sends;
mod settling;
mod stopping;
mod unanswered;
mod watch;
