use std::sync::Arc;

use bytes::Bytes;
use tokio::{sync::oneshot, time::Instant};

use super::*;
use crate::{numbers::Numbers, queues::QUEUES, store::Store};

fn queue() -> Arc<Queue> {
    let store = Store::in_memory(&Limits::default()).unwrap();
    let (row, channel) = Row::make(&store, Numbers::after(&[]).next().unwrap(), QUEUES, "orders");
    Arc::new(Queue::new(store, row, 1 << 20, channel))
}

fn message(body: &Bytes) -> QueueMessage {
    QueueMessage { body: body.clone(), ..QueueMessage::default() }
}

async fn put(queue: &Arc<Queue>, messages: Vec<QueueMessage>) {
    let (done, waits) = oneshot::channel();
    queue.put(messages, Vec::new(), None, |result| drop(done.send(result)));
    waits.await.unwrap().unwrap();
}

#[tokio::test]
async fn nothing_is_kept_in_memory_for_nobody() {
    let queue = queue();
    let frame = Bytes::from(vec![b'x'; 1000]);
    put(&queue, vec![message(&frame.slice(0..1)); 100]).await;
    assert_eq!(queue.lock().ahead.len(), 0);
    assert!(frame.is_unique(), "nor the request that they came with");
    let taken = queue.take(1000, Instant::now()).await.unwrap();
    assert_eq!(taken.messages.len(), 100, "they are on disk");
}

#[tokio::test]
async fn what_is_kept_for_who_waits_is_what_it_takes_and_no_request() {
    let queue = queue();
    let taking = tokio::spawn({
        let queue = Arc::clone(&queue);
        async move { queue.take(3, Instant::now() + Duration::from_secs(30)).await.unwrap() }
    });
    while queue.wanted.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    let frame = Bytes::from(vec![b'x'; 1000]);
    let (done, waits) = std::sync::mpsc::channel();
    queue.put(vec![message(&frame.slice(0..1)); 100], Vec::new(), None, move |result| done.send(result).unwrap());
    // The thread of this test is the one that would take them.
    waits.recv().unwrap().unwrap();
    assert_eq!(queue.lock().ahead.len(), 3);
    assert!(frame.is_unique());
    let taken = taking.await.unwrap();
    assert_eq!((taken.messages.len(), queue.wanted.load(Ordering::Relaxed)), (3, 0));
    assert_eq!(&*taken.messages[2].message().body, b"x");
    assert_eq!(queue.take(1000, Instant::now()).await.unwrap().messages.len(), 97);
}

#[tokio::test]
async fn what_is_written_and_not_synced_is_not_given() {
    let queue = queue();
    let body = Bytes::from_static(b"x");
    put(&queue, vec![message(&body)]).await;
    // As it is between the transaction and its sync.
    let value = message(&body).encode_to_vec();
    queue.store.store(vec![Change::Put(Key::new(queue.id, 2), value)]).await.unwrap();
    let taken = queue.take_now(10).unwrap();
    assert_eq!(taken.messages.iter().map(Lent::sequence).collect::<Vec<_>>(), [1]);
    assert!(queue.take_now(10).unwrap().messages.is_empty());
}

fn expired(size: usize) -> QueueMessage {
    let attributes = QueueMessageAttributes { expiration_at: 1, ..QueueMessageAttributes::default() };
    QueueMessage { attributes: Some(attributes), ..message(&vec![b'x'; size].into()) }
}

#[tokio::test]
async fn what_has_expired_is_removed_in_steps() {
    let queue = queue();
    put(&queue, vec![expired(1); 3000]).await;
    put(&queue, vec![message(&Bytes::from_static(b"x"))]).await;
    // Whose time is over is answered after one step; who has time left goes on.
    let first = queue.take(1, Instant::now()).await.unwrap();
    assert_eq!((first.messages.len(), first.expired), (0, 1024));
    let taken = queue.take(1, Instant::now() + Duration::from_secs(600)).await.unwrap();
    assert_eq!((taken.messages.len(), taken.expired), (1, 1976));
    queue.store.written().await.unwrap();
    assert_eq!(queue.store.sizes(queue.id, 1, 10).unwrap().len(), 1);
    assert_eq!(queue.stats().messages, 1);
}

/// One that has an hour left.
fn expiring() -> QueueMessage {
    let mut message = expired(1);
    message.attributes.as_mut().unwrap().expiration_at = now() + 3_600_000_000_000;
    message
}

/// Sequences on disk.
fn stored(queue: &Queue) -> Vec<u64> {
    queue.store.sizes(queue.id, 1, 10_000).unwrap().into_iter().map(|(sequence, _)| sequence).collect()
}

#[tokio::test]
async fn what_has_expired_goes_although_nobody_takes_it() {
    let queue = queue();
    let lasting = message(&Bytes::from_static(b"x"));
    put(&queue, vec![lasting.clone(), expiring()]).await;
    put(&queue, vec![expired(1); 3000]).await;
    put(&queue, vec![lasting]).await;
    put(&queue, vec![expired(1)]).await;
    queue.sweep().await.unwrap();
    assert_eq!(stored(&queue), [1, 2, 3003]);
    assert_eq!((queue.stats().messages, queue.stats().expired), (3, 3001));
    // The next look is due when the one expires that has time left.
    let next = queue.lock().expires;
    assert!(next > now() && next < i64::MAX && queue.lock().swept.is_none());
    assert_eq!(queue.take_now(10).unwrap().messages.len(), 3);

    // What is given back or read ahead is looked at too.
    put(&queue, vec![expired(1); 3]).await;
    let first = queue.lock().next - 3;
    let waiting = |sequence| Waiting { sequence, size: 10, message: expired(1) };
    {
        let mut state = queue.lock();
        state.back.insert(first, waiting(first));
        state.ahead.push_back(waiting(first + 1));
        state.cursor = first + 2;
    }
    queue.sweep().await.unwrap();
    assert_eq!((stored(&queue), queue.stats().expired), (vec![1, 2, 3003], 3004));
}

#[tokio::test]
async fn who_takes_or_empties_while_expired_messages_go_counts_right() {
    let queue = queue();
    put(&queue, vec![expired(1); 300]).await;
    put(&queue, vec![message(&Bytes::from_static(b"x")); 2]).await;
    // The store stores nothing for now.
    let (goes, waits) = std::sync::mpsc::channel::<()>();
    queue.store.commit(Vec::new(), None, move |_| _ = waits.recv());
    let mut sweep = std::pin::pin!(queue.sweep());
    assert!(futures_util::poll!(sweep.as_mut()).is_pending());
    let taken = queue.take_now(1).unwrap();
    assert_eq!((taken.messages.len(), taken.expired), (1, 44), "the rest is on its way out");
    let mut purge = std::pin::pin!(queue.purge());
    assert!(futures_util::poll!(purge.as_mut()).is_pending());
    drop(goes);
    assert_eq!(purge.await.unwrap(), 1);
    sweep.await.unwrap();
    drop(taken);
    assert_eq!((stored(&queue).len(), queue.stats().messages, queue.stats().expired), (1, 1, 300));
}

#[tokio::test]
async fn large_messages_that_have_expired_are_removed_in_smaller_steps() {
    let queue = queue();
    put(&queue, vec![expired(1 << 20); 20]).await;
    assert_eq!([(); 3].map(|()| queue.take_now(1).unwrap().expired), [8, 8, 4]);
}

#[tokio::test]
async fn a_peek_that_is_dropped_while_it_looks_leaves_what_woke_it_to_others() {
    let queue = queue();
    let soon = || Instant::now() + Duration::from_secs(600);
    let mut peek = Box::pin(queue.peek(1, soon()));
    assert!(futures_util::poll!(peek.as_mut()).is_pending());
    let mut take = std::pin::pin!(queue.take(1, soon()));
    assert!(futures_util::poll!(take.as_mut()).is_pending());
    put(&queue, vec![message(&Bytes::from_static(&[b'x'; 10]))]).await;
    // What waits is on disk only, so that the peek has to read.
    {
        let mut state = queue.lock();
        state.ahead.clear();
        state.cursor = 1;
    }
    // It was woken, has read, and lets others go on.
    assert!(futures_util::poll!(peek.as_mut()).is_pending());
    drop(peek);
    let taken = tokio::time::timeout(Duration::from_secs(60), take).await.expect("it is woken").unwrap();
    assert_eq!(taken.messages.len(), 1);
}
