//! Events: handed to who listens now, and the subscriptions that listen.
//!
//! Among the subscribers that match an event, those of one group share it; who has no group gets everything. A
//! subscriber that does not keep up loses events, and only its own: events are at most once.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{bounded, counts::Count, names};

/// Messages that wait for one subscriber; then it loses what is new.
const WAITING: usize = 4096;

/// Who listens to what, for messages of one pattern of the protocol.
#[derive(Debug)]
pub(crate) struct Listeners<T>(Arc<Inner<T>>);

#[derive(Debug)]
struct Inner<T> {
    listeners: Mutex<HashMap<u64, Listener<T>>>,
    next: AtomicU64,
    /// Bytes that wait for one subscriber.
    bytes: usize,
    lost: Count,
}

#[derive(Debug)]
struct Listener<T> {
    pattern: String,
    group: String,
    sender: bounded::Sender<T>,
}

/// A place in the list of listeners; it ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Listening<T> {
    inner: Arc<Inner<T>>,
    number: u64,
    receiver: bounded::Receiver<T>,
}

impl<T> Listeners<T> {
    /// Nobody yet; so many bytes may wait for each subscriber.
    pub(crate) fn new(bytes: usize, lost: Count) -> Self {
        Self(Arc::new(Inner { listeners: Mutex::default(), next: AtomicU64::new(0), bytes, lost }))
    }
}

impl<T> Inner<T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Listener<T>>> {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone> Listeners<T> {
    /// Listens from now on.
    pub(crate) fn listen(&self, pattern: &str, group: &str) -> Listening<T> {
        let (sender, receiver) = bounded::channel(WAITING, self.0.bytes);
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let listener = Listener { pattern: pattern.to_owned(), group: group.to_owned(), sender };
        self.0.lock().insert(number, listener);
        Listening { inner: Arc::clone(&self.0), number, receiver }
    }

    /// Hands a message to one of each group and to everybody without one; tells to how many.
    pub(crate) fn tell(&self, name: &str, message: &T, size: usize) -> usize {
        let listeners = self.0.lock();
        let mut groups: HashMap<&str, Vec<&Listener<T>>> = HashMap::new();
        let mut told = 0;
        for listener in listeners.values().filter(|listener| names::matches(&listener.pattern, name)) {
            if listener.group.is_empty() {
                told += usize::from(self.count(name, listener.sender.try_send(message.clone(), size)));
            } else {
                groups.entry(&listener.group).or_default().push(listener);
            }
        }
        for mut members in groups.into_values() {
            // Any of them, and another one when that one does not keep up.
            fastrand::shuffle(&mut members);
            let taken = members.iter().any(|member| member.sender.try_send(message.clone(), size));
            told += usize::from(self.count(name, taken));
        }
        told
    }

    fn count(&self, name: &str, taken: bool) -> bool {
        if !taken {
            self.0.lost.add();
            tracing::debug!(channel = name, "lost for a subscriber that does not keep up");
        }
        taken
    }

    /// Names and patterns that are listened to.
    pub(crate) fn patterns(&self) -> Vec<String> {
        self.0.lock().values().map(|listener| listener.pattern.clone()).collect()
    }
}

impl<T> Listening<T> {
    /// The next message.
    pub(crate) async fn next(&mut self) -> Option<T> {
        self.receiver.recv().await
    }
}

impl<T> Drop for Listening<T> {
    fn drop(&mut self) {
        self.inner.lock().remove(&self.number);
    }
}
