use std::{
    sync::mpsc::{Receiver, Sender, channel},
    task::{Context, Poll, Wake, Waker},
};

use super::*;
use crate::store::MOST_CHANNELS;

fn queues() -> Arc<Queues> {
    let limits = Limits::default();
    let store = Store::in_memory(&limits).unwrap();
    let numbers = Numbers::after(&[]);
    Arc::new(Queues::open(store, limits, numbers, Vec::new()).unwrap())
}

#[tokio::test]
async fn a_queue_has_its_name_until_its_removal_is_stored() {
    let queues = queues();
    let queue = queues.get("orders").unwrap();
    // The store stores, and tells nobody before it may go on.
    let (goes, waits) = std::sync::mpsc::channel::<()>();
    queues.store.commit(Vec::new(), None, move |_| _ = waits.recv());
    let mut removal = std::pin::pin!(queues.remove("orders"));
    assert!(futures_util::poll!(removal.as_mut()).is_pending());
    assert!(Arc::ptr_eq(&queues.get("orders").unwrap(), &queue), "one that is made now could not be stored");
    drop(goes);
    assert!(removal.await.unwrap());

    let made = queues.get("orders").unwrap();
    assert_ne!(made.id, queue.id);
    queues.store.store(Vec::new()).await.unwrap();
    let stored: Vec<_> = queues.store.channels().unwrap().iter().map(|channel| channel.id).collect();
    assert_eq!(stored, [made.id]);
}

#[tokio::test]
async fn a_large_queue_is_removed_in_steps() {
    let queues = queues();
    let (large, other) = (queues.get("large").unwrap(), queues.get("other").unwrap());
    large.put(vec![QueueMessage::default(); 10_000], Vec::new(), None, drop);
    queues.store.store(Vec::new()).await.unwrap();
    // The store stores nothing for now, so that the removal comes no further than its first step.
    let (free, waits) = channel::<()>();
    queues.store.commit(Vec::new(), None, move |_| _ = waits.recv());
    let mut removal = std::pin::pin!(queues.remove("large"));
    assert!(futures_util::poll!(removal.as_mut()).is_pending());
    drop(free);
    // Handed over after the removal began, and stored before that is done.
    other.put(vec![QueueMessage::default()], Vec::new(), None, drop);
    queues.store.store(Vec::new()).await.unwrap();
    let count = |name: &str| {
        let stored = queues.store.channels().unwrap();
        stored.iter().find(|channel| channel.name == name).map(|channel| channel.count)
    };
    assert_eq!((count("large"), count("other")), (Some(10_000 - 4096), Some(1)));
    assert!(removal.await.unwrap());
    assert_eq!((count("large"), count("other")), (None, Some(1)));
    assert!(queues.store.sizes(large.id, 1, 10).unwrap().is_empty());
}

#[tokio::test]
async fn what_is_delayed_comes_although_its_sender_went_away() {
    let queues = queues();
    let clock = tokio::spawn(Arc::clone(&queues).keep_time());
    // The clock has seen that nothing is delayed.
    tokio::task::yield_now().await;
    let policy = QueueMessagePolicy { delay_seconds: 1, ..QueueMessagePolicy::default() };
    let message = QueueMessage {
        client_id: "test".into(),
        channel: "orders".into(),
        body: "x".into(),
        policy: Some(policy),
        ..QueueMessage::default()
    };
    drop(queues.enter(vec![message], |_| Ok(())).await);
    let queue = queues.get("orders").unwrap();
    let taken = queue.take(1, tokio::time::Instant::now() + Duration::from_secs(600)).await.unwrap();
    assert_eq!(taken.messages.len(), 1);
    clock.abort();
}

#[tokio::test]
async fn a_clock_that_was_set_forward_is_noticed() {
    let queues = queues();
    let queue = queues.get("orders").unwrap();
    let value = QueueMessage { body: "x".into(), ..QueueMessage::default() }.encode_to_vec();
    let hours = now() + nanoseconds(Duration::from_secs(7200));
    let late = Change::Delay { id: 1, channel: queue.id, due: hours, value };
    queues.store.store(vec![late]).await.unwrap();
    let clock = tokio::spawn(Arc::clone(&queues).keep_time());
    // The clock of delays waits for that one.
    tokio::task::yield_now().await;
    // Due without a word to it, as what the time has jumped over is.
    queues.store.store(vec![due(2, &queue)]).await.unwrap();
    let taken = queue.take(1, tokio::time::Instant::now() + Duration::from_secs(60)).await.unwrap();
    assert_eq!(taken.messages.len(), 1);
    clock.abort();
}

/// A message that is due.
fn due(id: u64, queue: &Queue) -> Change {
    let message = QueueMessage { body: "x".into(), ..QueueMessage::default() };
    Change::Delay { id, channel: queue.id, due: 1, value: message.encode_to_vec() }
}

/// Holds up the store's thread while that wakes somebody: tells so, and waits.
struct Held(Sender<()>, Mutex<Receiver<()>>);

impl Wake for Held {
    fn wake(self: Arc<Self>) {
        let _ = self.0.send(());
        let _ = self.1.lock().unwrap().recv();
    }
}

#[tokio::test]
async fn what_is_due_is_moved_once_although_another_one_of_its_batch_fails() {
    let queues = queues();
    let (goes, stays) = (queues.get("goes").unwrap(), queues.get("stays").unwrap());
    queues.store.store(vec![due(1, &goes), due(2, &stays)]).await.unwrap();
    let ((holds, is_held), (free, waits)) = (channel(), channel::<()>());
    queues.store.commit(Vec::new(), None, move |_| {
        let _ = holds.send(());
        let _ = waits.recv();
    });
    // Its group is over: nothing of what follows is written before the store's thread is let go.
    is_held.recv().unwrap();
    // The first group that is written ends with the message of the queue that goes; the other message is in the next one.
    let mut removal = std::pin::pin!(queues.remove("goes"));
    assert!(futures_util::poll!(removal.as_mut()).is_pending());
    let nothing = || Change::Seen { channel: 0, reader: String::new(), seen: 0 };
    queues.store.commit((0..4094).map(|_| nothing()).collect(), None, drop);
    let ((woken, is_woken), (goes_on, held)) = (channel(), channel());
    let held = Waker::from(Arc::new(Held(woken, Mutex::new(held))));
    let mut release = std::pin::pin!(queues.release());
    assert!(release.as_mut().poll(&mut Context::from_waker(&held)).is_pending());
    drop(free);
    is_woken.recv().unwrap();
    let early = release.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    drop(goes_on);
    assert!(matches!(early, Poll::Pending), "the other one is on its way: {early:?}");
    assert!(matches!(release.await, Err(StoreError::Gone)));
    assert!(removal.await.unwrap());
    assert!(queues.release().await.unwrap().is_none());
    assert_eq!(stays.stats().messages, 1);
}

#[tokio::test]
async fn what_is_delayed_leaves_its_delay_once() {
    let queues = queues();
    let queue = queues.get("orders").unwrap();
    queues.store.store(vec![due(1, &queue)]).await.unwrap();
    assert!(queues.release().await.unwrap().is_none());
    let (done, waits) = oneshot::channel();
    queue.put(vec![QueueMessage::default()], vec![Change::Undelay(1)], None, |result| drop(done.send(result)));
    assert!(matches!(waits.await.unwrap(), Err(StoreError::Gone)));
    assert_eq!(queue.stats().messages, 1);
}

#[tokio::test]
async fn large_messages_that_are_due_together_leave_their_delay_in_steps() {
    let queues = queues();
    let queue = queues.get("orders").unwrap();
    for id in 1..=4 {
        let body = vec![b'x'; if id == 3 { 1 } else { DUE.1 }].into();
        let value = QueueMessage { body, ..QueueMessage::default() }.encode_to_vec();
        queues.store.store(vec![Change::Delay { id, channel: queue.id, due: 1, value }]).await.unwrap();
    }
    assert_eq!(queues.store.due(now(), DUE.0, DUE.1).unwrap().len(), 1, "no more of them are read at once");
    assert!(queues.release().await.unwrap().is_none());
    assert_eq!(queue.stats().messages, 4);
}

#[tokio::test]
async fn a_number_is_another_channels_when_nobody_has_its_channel_any_more() {
    let stored =
        |id| StoredChannel { id, kind: 0, name: String::new(), next: 1, count: 0, bytes: 0, delayed: 0, first: None };
    let numbers = Numbers::after(&(2..=MOST_CHANNELS).map(stored).collect::<Vec<_>>());
    let limits = Limits::default();
    let store = Store::in_memory(&limits).unwrap();
    let queues = Arc::new(Queues::open(store, limits, numbers, Vec::new()).unwrap());
    let queue = queues.get("orders").unwrap();
    queue.put(vec![QueueMessage::default()], Vec::new(), None, drop);
    queues.store.store(Vec::new()).await.unwrap();
    let mut held = queue.take(1, tokio::time::Instant::now()).await.unwrap().messages;
    assert!(queues.remove("orders").await.unwrap());
    drop(queue);
    queues.store.store(Vec::new()).await.unwrap();
    let refused = queues.get("other").unwrap_err().to_string();
    assert!(refused.starts_with("there are 524287 channels, the most this broker allows"), "{refused}");
    held.pop().unwrap().remove().await.unwrap();
    queues.store.store(Vec::new()).await.unwrap();
    assert_eq!(queues.get("other").unwrap().id, 1);
}

#[tokio::test]
async fn expired_messages_of_before_the_start_are_looked_for() {
    let limits = Limits::default();
    let store = Store::in_memory(&limits).unwrap();
    let mut message = QueueMessage { body: "x".into(), ..QueueMessage::default() };
    message.attributes.get_or_insert_default().expiration_at = 1;
    let channel = Change::Channel { id: 1, kind: QUEUES, name: "orders".into() };
    let put = Change::Put(crate::store::Key::new(1, 1), message.encode_to_vec());
    store.store(vec![channel, put, Change::Next { channel: 1, sequence: 2 }]).await.unwrap();
    let stored = store.channels().unwrap();
    let numbers = Numbers::after(&stored);
    let queues = Arc::new(Queues::open(store, limits, numbers, stored).unwrap());
    let sweep = tokio::spawn(Arc::clone(&queues).sweep());
    let gone = async {
        while queues.get("orders").unwrap().stats().messages > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("it goes");
    sweep.abort();
}
