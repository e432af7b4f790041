//! A channel that is bounded by the bytes of what waits in it, besides its number, so that who reads slowly costs
//! little memory however large messages are.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

#[derive(Debug)]
pub(crate) struct Sender<T> {
    items: mpsc::Sender<(T, OwnedSemaphorePermit)>,
    room: Arc<Semaphore>,
    bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Receiver<T>(mpsc::Receiver<(T, OwnedSemaphorePermit)>);

/// Room for so many items of so many bytes together; an item that has more bytes fits in when nothing else waits.
pub(crate) fn channel<T>(most: usize, bytes: usize) -> (Sender<T>, Receiver<T>) {
    let bytes = bytes.clamp(1, u32::MAX as usize >> 3);
    let (items, receiver) = mpsc::channel(most);
    (Sender { items, room: Arc::new(Semaphore::new(bytes)), bytes }, Receiver(receiver))
}

impl<T> Sender<T> {
    /// `false` when there is no room.
    pub(crate) fn try_send(&self, item: T, size: usize) -> bool {
        let size = u32::try_from(size.clamp(1, self.bytes)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.room).try_acquire_many_owned(size);
        permit.is_ok_and(|permit| self.items.try_send((item, permit)).is_ok())
    }
}

impl<T> Receiver<T> {
    pub(crate) async fn recv(&mut self) -> Option<T> {
        self.0.recv().await.map(|(item, _)| item)
    }
}
