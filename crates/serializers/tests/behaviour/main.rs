//! What callers see of the serializers.
//! One program, so that it is built and linked once.

#![allow(missing_docs, unreachable_pub)]

mod accept;
mod binding;
#[path = "../common/mod.rs"]
mod common;
mod errors;
mod hostile;
mod registry;
mod round_trip;
