//! What is kept of stored events: by age, number and bytes. The oldest go first, sequences go on.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedMutexGuard, oneshot};

use crate::{
    limits::Limits,
    log::Log,
    queue::now,
    store::{Change, Key, StoreError, StoredChannel},
};

/// How often is looked.
pub(crate) const EVERY: Duration = Duration::from_secs(1);
/// Events that go in one step, so that nobody who writes waits long.
const STEP: usize = 2048;
/// Bytes of them, where everything goes; one event may have more.
const BYTES: u64 = 8 << 20;

/// What a log holds, as far as retention wants to know it.
#[derive(Debug)]
pub(crate) struct Kept(Mutex<State>);

#[derive(Debug, Clone, Copy)]
struct State {
    /// The first sequence that may still be there.
    first: u64,
    count: u64,
    bytes: u64,
    /// When the first event was stored; `None` until somebody has looked.
    oldest: Option<i64>,
}

impl Kept {
    pub(crate) fn new(stored: &StoredChannel) -> Self {
        let first = stored.first.unwrap_or(stored.next);
        Self(Mutex::new(State { first, count: stored.count, bytes: stored.bytes, oldest: None }))
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// An event was stored.
    pub(crate) fn add(&self, size: usize) {
        self.with(|state| {
            state.count += 1;
            state.bytes += size as u64;
        });
    }

    /// Number and bytes of what is there.
    pub(crate) fn size(&self) -> (u64, u64) {
        self.with(|state| (state.count, state.bytes))
    }
}

/// Removes what is beyond the limits from one log.
pub(crate) async fn trim(log: &Arc<Log>, limits: &Limits) -> Result<(), StoreError> {
    loop {
        let one = Arc::clone(&log.steps).lock_owned().await;
        let Some(stretch) = beyond(log, limits)? else { return Ok(()) };
        tracing::debug!(channel = log.name, ?stretch, "stored events have had their time");
        remove(log, stretch, one).await?;
    }
}

/// Before a log is deleted: removes what it holds where that is more than a step, so that nobody who stores waits for all of it.
/// What is no more goes with the log or stays with it.
pub(crate) async fn remove_much(log: &Arc<Log>) -> Result<(), StoreError> {
    let (count, bytes) = log.kept.size();
    if count <= STEP as u64 && bytes <= BYTES {
        return Ok(());
    }
    let end = log.count() + 1;
    loop {
        let one = Arc::clone(&log.steps).lock_owned().await;
        let from = log.kept.with(|state| state.first);
        let (mut to, mut count, mut bytes) = (from, 0, 0);
        for (sequence, size) in log.store().sizes(log.id, from, STEP)? {
            if sequence >= end || bytes >= BYTES {
                break;
            }
            (to, count, bytes) = (sequence + 1, count + 1, bytes + size);
        }
        if count == 0 {
            return Ok(());
        }
        remove(log, Stretch { from, to, count, bytes }, one).await?;
    }
}

/// What one step removes.
#[derive(Debug)]
struct Stretch {
    from: u64,
    to: u64,
    count: u64,
    bytes: u64,
}

/// Whoever waits for it may go away: what is removed is counted when it is, and the next step begins after that.
async fn remove(
    log: &Arc<Log>,
    Stretch { from, to, count, bytes }: Stretch,
    one: OwnedMutexGuard<()>,
) -> Result<(), StoreError> {
    let range = Change::RemoveRange { from: Key::new(log.id, from), to: Key::new(log.id, to) };
    let (done, waits) = oneshot::channel();
    let removed = Arc::clone(log);
    log.store().commit(vec![range], None, move |result| {
        if result.is_ok() {
            removed.kept.with(|state| {
                state.first = to;
                state.count = state.count.saturating_sub(count);
                state.bytes = state.bytes.saturating_sub(bytes);
                state.oldest = None;
            });
        }
        drop(one);
        let _ = done.send(result);
    });
    waits.await.unwrap_or(Err(StoreError::Closed))
}

/// The next step of who holds [`Log::steps`].
fn beyond(log: &Log, limits: &Limits) -> Result<Option<Stretch>, StoreError> {
    let state = log.kept.with(|state| *state);
    if state.count == 0 {
        return Ok(None);
    }
    let (most, most_bytes) = (limits.event_count.unwrap_or(u64::MAX), limits.event_bytes.unwrap_or(u64::MAX));
    let mut young = state.first;
    if let Some(age) = limits.event_age {
        let since = now().saturating_sub(i64::try_from(age.as_nanos()).unwrap_or(i64::MAX));
        let oldest = match state.oldest {
            Some(oldest) => oldest,
            None => log.events(state.first, 1)?.first().map_or(i64::MAX, |event| event.timestamp),
        };
        log.kept.with(|state| state.oldest = Some(oldest));
        if oldest < since {
            young = log.at(state.first, since)?;
        }
    }
    if young == state.first && state.count <= most && state.bytes <= most_bytes {
        return Ok(None);
    }
    let (mut to, mut count, mut bytes) = (state.first, 0, 0);
    for (sequence, size) in log.store().sizes(log.id, state.first, STEP)? {
        let fits = state.count - count <= most && state.bytes.saturating_sub(bytes) <= most_bytes;
        if (sequence >= young && fits) || count == state.count {
            break;
        }
        (to, count, bytes) = (sequence + 1, count + 1, bytes + size);
    }
    Ok((count > 0).then_some(Stretch { from: state.first, to, count, bytes }))
}
