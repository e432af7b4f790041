//! Running handlers: fetching, calling, settling, pausing and stopping.

mod control;
mod decide;
mod env;
mod events;
#[cfg(feature = "ops")]
mod ops;
mod running;
mod settlement;
mod signals;
mod start;
mod step;
mod stop;
mod supervise;
mod tried;
mod work;
mod worker;

pub(crate) use self::{
    control::Control,
    env::Env,
    events::Callbacks,
    running::CANCEL_GRACE,
    signals::{Signals, nobody_listens, somebody_listens},
    start::Unheld,
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
