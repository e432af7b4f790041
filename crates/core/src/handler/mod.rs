//! Handlers: ordinary async functions whose arguments extract themselves and whose result settles the message.

mod batch;
mod extract;
mod failure;
mod function;
mod layered;
mod outcome;
mod sends;
mod service;

pub use self::{
    batch::{Batch, BatchHandler, BatchOutcome, IntoBatchOutcome},
    extract::{Attempt, Body, Context, FromDelivery, Json, State, View},
    failure::Failure,
    function::{Blocking, Handler, blocking},
    outcome::{IntoOutcome, Outcome},
    sends::Sends,
};
pub(crate) use self::{
    extract::States,
    layered::layered,
    service::{BatchService, FunctionService, Service, Several},
};
