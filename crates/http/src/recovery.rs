//! Looks whether a place that did not answer answers again.
//!
//! HTTP keeps no connection that would tell. A service that sends only when it is asked would stay down after one failed send
//! for good, where whoever shares the work out asks only those that are ready. So the place is asked for its options (RFC 9110,
//! section 9.3.7), which changes nothing there, until it answers or another request has been answered.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http::Method;
use polymq_core::HealthState;
use tokio::time::sleep;

use crate::{client::Link, place::Place};

/// The first wait; each is twice as long as the one before.
const FIRST: Duration = Duration::from_secs(1);
const LAST: Duration = Duration::from_secs(30);

/// Begins, unless somebody looks already.
pub(crate) fn look(link: &Arc<Link>, place: Arc<Place>) {
    if link.looks.swap(true, Ordering::AcqRel) {
        return;
    }
    // It keeps no connection alive that nobody else has.
    let (link_there, mut ended) = (Arc::downgrade(link), link.ended.subscribe());
    link.runtime.spawn(async move {
        let looking = async {
            let mut wait = FIRST;
            loop {
                sleep(wait).await;
                let Some(link) = link_there.upgrade() else { return };
                let is_down = || link.health.watch().now().state == HealthState::Down;
                if is_down()
                    && let Ok(asked) = place.request(&link, Method::OPTIONS, link.config.connect_timeout)
                {
                    // Health hears of what becomes of it, as of any request.
                    let _ = link.exchange(asked).await;
                }
                if !is_down() {
                    link.looks.store(false, Ordering::Release);
                    // Whoever failed meanwhile has seen that somebody looks.
                    if !is_down() || link.looks.swap(true, Ordering::AcqRel) {
                        return;
                    }
                    wait = FIRST;
                    continue;
                }
                wait = wait.saturating_mul(2).min(LAST);
            }
        };
        tokio::select! {
            biased;
            // Also when nobody has it any more.
            _ = ended.wait_for(|ended| *ended) => {}
            () = looking => {}
        }
    });
}
