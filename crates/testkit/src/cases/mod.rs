//! The cases, one function each. The name of a case begins with its number in the contract's list.

pub mod admin;
pub mod attempts;
pub mod bodies;
pub mod closing;
pub mod connecting;
pub mod context;
pub mod counters;
pub mod dead_letters;
pub mod faults;
pub mod flow;
pub mod handling;
pub mod headers;
pub mod health;
pub mod late_settlement;
pub mod lifecycle;
pub mod many;
pub mod names;
pub mod order;
pub mod requests;
pub mod retry;
pub mod secrets;
pub mod settlement;
pub mod signing;
pub mod stopping;
pub mod topics;

use crate::Case;

const ALL: &[&[Case]] = &[
    bodies::CASES,
    headers::CASES,
    many::CASES,
    names::CASES,
    topics::CASES,
    admin::CASES,
    requests::CASES,
    connecting::CASES,
    settlement::CASES,
    late_settlement::CASES,
    attempts::CASES,
    handling::CASES,
    retry::CASES,
    dead_letters::CASES,
    order::CASES,
    flow::CASES,
    stopping::CASES,
    lifecycle::CASES,
    closing::CASES,
    health::CASES,
    context::CASES,
    counters::CASES,
    secrets::CASES,
    signing::CASES,
    faults::backoff::CASES,
    faults::restart::CASES,
    faults::network::CASES,
    faults::away::CASES,
    faults::acks::CASES,
    faults::channels::CASES,
    faults::credentials::CASES,
    faults::pressure::CASES,
    faults::killed::CASES,
    faults::paths::CASES,
    faults::clock::CASES,
    faults::poison::CASES,
];

/// Every case, in the order of the list.
pub fn all() -> impl Iterator<Item = &'static Case> {
    ALL.iter().copied().flatten()
}

/// The case of this name.
#[must_use]
pub fn find(id: &str) -> Option<&'static Case> {
    all().find(|case| case.id == id)
}
