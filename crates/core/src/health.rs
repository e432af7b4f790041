//! What a connection is doing, told truthfully.

use std::{fmt, sync::Arc};

use serde::Serialize;
use tokio::{sync::watch, time::Instant};

/// State of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthState {
    /// Connected.
    Up,
    /// Connected again, for less than half a minute.
    Degraded,
    /// Not connected; the backend keeps trying.
    Down,
    /// Closed by us, or given up after the configured number of attempts. Final.
    Closed,
}

/// State, reason and history of a connection.
#[derive(Debug, Clone)]
pub struct Health {
    /// The state; [`HealthWatch::now`] turns `Up` into `Degraded` while it is recent after a loss.
    pub state: HealthState,
    /// Why it is not up, or why it was lost last.
    pub reason: Option<Arc<str>>,
    /// Since when.
    pub since: Instant,
    /// How often the connection was lost and made again.
    pub reconnects: u64,
    connected_before: bool,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            HealthState::Up => "up",
            HealthState::Degraded => "degraded",
            HealthState::Down => "down",
            HealthState::Closed => "closed",
        };
        match &self.reason {
            Some(reason) if self.state != HealthState::Up => write!(f, "{state}: {reason}"),
            _ => f.write_str(state),
        }
    }
}

/// How long a connection counts as degraded after it was made again.
pub const DEGRADED_FOR: std::time::Duration = std::time::Duration::from_secs(30);

/// The reading end: ask for the present state or wait for changes.
#[derive(Debug, Clone)]
pub struct HealthWatch(watch::Receiver<Health>);

impl HealthWatch {
    /// The present state.
    #[must_use]
    pub fn now(&self) -> Health {
        let mut health = self.0.borrow().clone();
        if health.state == HealthState::Up && health.reconnects > 0 && health.since.elapsed() < DEGRADED_FOR {
            health.state = HealthState::Degraded;
        }
        health
    }

    /// Waits for the next change; `None` when the connection is gone for good.
    pub async fn changed(&mut self) -> Option<Health> {
        self.0.changed().await.ok()?;
        Some(self.now())
    }
}

/// The backend's end.
#[derive(Debug)]
pub struct HealthReporter(watch::Sender<Health>);

impl HealthReporter {
    /// A connection that is down until told otherwise.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(Health {
            state: HealthState::Down,
            reason: Some("not connected yet".into()),
            since: Instant::now(),
            reconnects: 0,
            connected_before: false,
        }))
    }

    /// A reading end.
    #[must_use]
    pub fn watch(&self) -> HealthWatch {
        HealthWatch(self.0.subscribe())
    }

    /// The connection is up. Counts a reconnect when it was lost before.
    pub fn up(&self) {
        self.0.send_if_modified(|health| {
            if matches!(health.state, HealthState::Up | HealthState::Closed) {
                return false;
            }
            health.state = HealthState::Up;
            health.since = Instant::now();
            if health.connected_before {
                health.reconnects += 1
            } else {
                health.reason = None
            }
            health.connected_before = true;
            true
        });
    }

    /// The connection was lost, or an attempt to make it failed. Reasons never hold secrets.
    pub fn down(&self, reason: impl fmt::Display) {
        self.0.send_if_modified(|health| {
            if health.state == HealthState::Closed {
                return false;
            }
            if health.state != HealthState::Down {
                health.since = Instant::now();
            }
            health.state = HealthState::Down;
            health.reason = Some(reason.to_string().into());
            true
        });
    }

    /// Closed for good.
    pub fn closed(&self, reason: impl fmt::Display) {
        self.0.send_if_modified(|health| {
            if health.state == HealthState::Closed {
                return false;
            }
            health.state = HealthState::Closed;
            health.since = Instant::now();
            health.reason = Some(reason.to_string().into());
            true
        });
    }
}

impl Default for HealthReporter {
    fn default() -> Self {
        Self::new()
    }
}
