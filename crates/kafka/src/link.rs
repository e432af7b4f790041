//! Whether there is a connection: watched by a thread that probes it and hears what the clients complain about.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use polymq_core::{Error, ErrorKind, HealthReporter, HealthWatch};
use rdkafka::{error::KafkaError, types::RDKafkaErrorCode as Code};
use tokio::sync::watch;

use crate::{NAME, error};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state of a connection, shared by its clients.
#[derive(Debug)]
pub(crate) struct Link {
    health: HealthReporter,
    state: Mutex<State>,
    woken: Condvar,
    status: watch::Sender<Status>,
}

/// What everybody may know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Status {
    /// Being made for the first time, or again.
    Down(Arc<str>),
    /// The login was refused.
    Refused(Arc<str>),
    Up,
    /// For good.
    Closed(ErrorKind, Arc<str>),
}

#[derive(Debug, Default)]
struct State {
    /// A client has complained; the probe finds out.
    suspected: bool,
    /// A client has no broker left.
    lost: bool,
    /// The client that sends cannot go on.
    fatal: bool,
    /// The last complaint.
    reason: Option<Arc<str>>,
}

/// Why the watching thread wakes up.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wake {
    /// Time to probe.
    Probe,
    /// A connection was lost; a broker that is there still answers at once.
    Suspected,
    /// No broker is left.
    Lost,
    /// The client that sends cannot go on.
    Fatal,
    Closed,
}

impl Link {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            health: HealthReporter::new(),
            state: Mutex::default(),
            woken: Condvar::new(),
            status: watch::Sender::new(Status::Down("not connected yet".into())),
        })
    }

    pub(crate) fn health(&self) -> HealthWatch {
        self.health.watch()
    }

    pub(crate) fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Whether what is left can still reach the broker.
    pub(crate) fn is_up_or_closing(&self) -> bool {
        matches!(&*self.status.borrow(), Status::Up | Status::Closed(ErrorKind::Closed, _))
    }

    /// The error of those who use a connection that is closed.
    pub(crate) fn closed_error(&self, operation: &'static str) -> Option<Error> {
        match &*self.status.borrow() {
            Status::Closed(kind, reason) => {
                Some(Error::new(*kind, reason.to_string()).with_backend(NAME).with_operation(operation))
            }
            _ => None,
        }
    }

    /// The error of those who need a connection now.
    pub(crate) fn down_error(&self, operation: &'static str) -> Option<Error> {
        match &*self.status.borrow() {
            Status::Down(reason) | Status::Refused(reason) => Some(error::disconnected(operation, reason)),
            Status::Closed(kind, reason) => {
                Some(Error::new(*kind, reason.to_string()).with_backend(NAME).with_operation(operation))
            }
            Status::Up => None,
        }
    }

    /// What a client tells outside of any operation.
    pub(crate) fn observe(&self, error: &KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
        let mut state = lock(&self.state);
        match error::code(error) {
            Some(Code::AllBrokersDown) => state.lost = true,
            Some(Code::Authentication | Code::SaslAuthenticationFailed) => {
                state.reason = Some(reason.into());
                state.lost = true;
                self.status.send_if_modified(|status| {
                    let open = matches!(status, Status::Down(_));
                    if open {
                        *status = Status::Refused(reason.into());
                    }
                    open
                });
            }
            Some(Code::Fatal) => {
                state.reason = Some(reason.into());
                state.fatal = true;
            }
            Some(Code::BrokerTransportFailure | Code::Resolve | Code::SSL | Code::OperationTimedOut) => {
                state.reason = Some(reason.into());
                state.suspected = true;
            }
            _ => return,
        }
        self.woken.notify_all();
    }

    /// Waits until it is time to probe, `every` at the latest.
    pub(crate) fn wait(&self, every: Duration) -> Wake {
        let deadline = Instant::now() + every;
        let mut state = lock(&self.state);
        loop {
            if matches!(self.status(), Status::Closed(..)) {
                return Wake::Closed;
            }
            let wake = if std::mem::take(&mut state.fatal) {
                Some(Wake::Fatal)
            } else if std::mem::take(&mut state.lost) {
                Some(Wake::Lost)
            } else if std::mem::take(&mut state.suspected) {
                Some(Wake::Suspected)
            } else {
                None
            };
            let left = deadline.saturating_duration_since(Instant::now());
            match wake {
                Some(wake) => return wake,
                None if left.is_zero() => return Wake::Probe,
                None => state = self.woken.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            }
        }
    }

    /// Waits, unless the connection is closed meanwhile: `false`.
    pub(crate) fn sleep(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut state = lock(&self.state);
        loop {
            if matches!(self.status(), Status::Closed(..)) {
                return false;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            state = self.woken.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The last complaint, or `otherwise`.
    pub(crate) fn reason(&self, otherwise: &str) -> Arc<str> {
        lock(&self.state).reason.clone().unwrap_or_else(|| otherwise.into())
    }

    pub(crate) fn up(&self) {
        // Complaints of before are answered.
        let mut state = lock(&self.state);
        (state.suspected, state.lost, state.reason) = (false, false, None);
        if self.set(Status::Up) {
            self.health.up();
        }
    }

    pub(crate) fn down(&self, reason: &Arc<str>) {
        if self.set(Status::Down(Arc::clone(reason))) {
            self.health.down(reason);
        }
    }

    pub(crate) fn close(&self, kind: ErrorKind, reason: &str) {
        if self.set(Status::Closed(kind, reason.into())) {
            self.health.closed(reason);
        }
        drop(lock(&self.state));
        self.woken.notify_all();
    }

    fn set(&self, new: Status) -> bool {
        self.status.send_if_modified(|status| {
            let changes = !matches!(status, Status::Closed(..)) && *status != new;
            if changes {
                *status = new;
            }
            changes
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was wrong before it was up is not what is wrong now.
    #[test]
    fn a_complaint_is_over_when_the_connection_is_up() {
        let link = Link::new();
        let refused = KafkaError::Global(Code::BrokerTransportFailure);
        link.observe(&refused, "connection refused");
        assert_eq!(&*link.reason("unknown"), "connection refused");
        link.up();
        assert_eq!(&*link.reason("no broker is connected"), "no broker is connected");
    }
}
