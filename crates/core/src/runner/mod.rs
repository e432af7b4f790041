//! Running handlers: fetching, calling, settling, pausing and stopping.

mod control;
mod env;
mod events;
#[cfg(feature = "ops")]
mod ops;
mod running;
mod start;
mod step;
mod stop;
mod tried;
mod work;
mod worker;

pub(crate) use self::{
    control::Control,
    env::Env,
    events::Callbacks,
    running::Signals,
    stop::Stop,
    tried::Tried,
    work::{DONE, Work},
    worker::Worker,
};
pub use self::{
    control::RouteStats,
    events::{Handled, HandlerError},
    running::Running,
    start::ConsumerRunner,
    step::Stepper,
};
