use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
};

use super::{channel::Channel, config::Limits};
use crate::Address;

/// Locks, also after a panic elsewhere: every change under these locks is complete before anything can panic.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What would be the broker: the channels of one name space.
#[derive(Debug, Default)]
pub(super) struct Space {
    channels: Mutex<HashMap<Address, Arc<Channel>>>,
}

impl Space {
    /// The space of this name, the same for the whole process.
    pub(super) fn named(name: &str) -> Arc<Self> {
        static SPACES: LazyLock<Mutex<HashMap<String, Arc<Space>>>> = LazyLock::new(Mutex::default);
        Arc::clone(lock(&SPACES).entry(name.to_owned()).or_default())
    }

    /// The channel, if it exists.
    pub(super) fn find(&self, address: &Address) -> Option<Arc<Channel>> {
        lock(&self.channels).get(address).filter(|channel| channel.exists()).cloned()
    }

    /// The channel, made when it does not exist.
    pub(super) fn declare(&self, address: &Address, limits: Limits) -> Arc<Channel> {
        let mut channels = lock(&self.channels);
        let channel = channels.entry(address.clone()).or_insert_with(|| Arc::new(Channel::new(address.clone())));
        channel.declare(limits);
        Arc::clone(channel)
    }

    /// Every channel that exists.
    pub(super) fn all(&self) -> Vec<Arc<Channel>> {
        lock(&self.channels).values().filter(|channel| channel.exists()).cloned().collect()
    }

    /// Deletes the channel and what it holds.
    pub(super) fn delete(&self, address: &Address) {
        let mut channels = lock(&self.channels);
        let Some(channel) = channels.get(address).cloned() else { return };
        // Producers that hold the channel send again when it is declared again; nobody else needs it.
        channels.retain(|_, known| known.address() != address && (known.exists() || Arc::strong_count(known) > 1));
        if Arc::strong_count(&channel) > 1 {
            channels.insert(address.clone(), Arc::clone(&channel));
        }
        let others: Vec<_> = channels.values().cloned().collect();
        let after = channel.delete();
        drop(channels);
        after.run();
        // As everywhere, a queue that is made again is bound to nothing.
        others.iter().for_each(|other| other.unbind(address));
    }
}
