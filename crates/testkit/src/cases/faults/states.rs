//! The states that a connection goes through.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq_core::{Bus, BusBuilder, HealthState};
use tokio::time::Instant;

use crate::{Cx, cx::lock, eventually, try_eventually};

/// What the health callback was told, in order.
#[derive(Debug, Clone, Default)]
pub(super) struct States(Arc<Mutex<Vec<(HealthState, Instant)>>>);

impl States {
    pub(super) fn watched(&self, builder: BusBuilder) -> BusBuilder {
        let states = Arc::clone(&self.0);
        builder.on_health(move |health| lock(&states).push((health.state, Instant::now())))
    }

    pub(super) fn all(&self) -> Vec<HealthState> {
        lock(&self.0).iter().map(|(state, _)| *state).collect()
    }

    /// When it went down after so many times.
    pub(super) fn went_down(&self, before: usize) -> Option<Instant> {
        lock(&self.0).iter().filter(|(state, _)| *state == HealthState::Down).nth(before).map(|(_, at)| *at)
    }

    pub(super) fn downs(&self) -> usize {
        self.all().iter().filter(|state| **state == HealthState::Down).count()
    }

    /// It has been down, and is not any more.
    pub(super) async fn recovered(&self, cx: &Cx, bus: &Bus) {
        eventually(cx.harness().recovery(), || async {
            if self.downs() > 0 { is_up(bus) } else { Err(format!("never down: {self}")) }
        })
        .await;
    }

    pub(super) async fn goes_down(&self, within: Duration, before: usize) {
        let told = self.has_told(within, before).await;
        told.unwrap_or_else(|states| panic!("health did not notice within {within:?}: {states}"));
    }

    /// Whether it went down once more.
    pub(super) async fn has_told(&self, within: Duration, before: usize) -> Result<(), String> {
        try_eventually(within, || async { if self.downs() > before { Ok(()) } else { Err(self.to_string()) } }).await
    }
}

pub(super) fn is_up(bus: &Bus) -> Result<(), String> {
    let now = bus.health();
    if matches!(now.state, HealthState::Up | HealthState::Degraded) { Ok(()) } else { Err(now.to_string()) }
}

/// `up, down, degraded`; what repeats itself is counted.
impl std::fmt::Display for States {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut rest = &self.all()[..];
        let mut separator = "";
        while let Some(first) = rest.first() {
            let count = rest.iter().take_while(|state| *state == first).count();
            write!(f, "{separator}{}", format!("{first:?}").to_lowercase())?;
            if count > 1 {
                write!(f, " x{count}")?;
            }
            (rest, separator) = (&rest[count..], ", ");
        }
        Ok(())
    }
}
