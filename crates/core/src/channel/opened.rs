//! The channels that have something to flush.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{Channel, Inner};

/// The channels of a bus that have opened a producer, for as long as somebody has a handle of them: those that the bus itself
/// knows by name, those with options of their own, and those of runners.
#[derive(Debug, Default)]
pub(crate) struct Opened(Mutex<Vec<Weak<Inner>>>);

impl Opened {
    pub(super) fn add(&self, channel: &Channel) {
        let mut opened = self.lock();
        if opened.len() == opened.capacity() {
            opened.retain(|channel| channel.strong_count() > 0);
        }
        opened.push(Arc::downgrade(&channel.0));
    }

    pub(crate) fn all(&self) -> Vec<Channel> {
        self.lock().iter().filter_map(Weak::upgrade).map(Channel).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Inner>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
