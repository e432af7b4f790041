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
    let first = queue.take_now(1).unwrap();
    assert_eq!((first.messages.len(), first.expired), (0, 1024));
    let mut passed = 0;
    // Whose time is over goes on for some seconds all the same.
    let taken = loop {
        let taken = queue.take(1, Instant::now()).await.unwrap();
        passed += taken.expired;
        if !taken.messages.is_empty() {
            break taken;
        }
    };
    assert_eq!((taken.messages.len(), passed), (1, 1976));
    queue.store.written().await.unwrap();
    assert_eq!(queue.store.sizes(queue.id, 1, 10).unwrap().len(), 1);
    assert_eq!(queue.stats().messages, 1);
}

#[tokio::test]
async fn large_messages_that_have_expired_are_removed_in_smaller_steps() {
    let queue = queue();
    put(&queue, vec![expired(1 << 20); 20]).await;
    assert_eq!([(); 3].map(|()| queue.take_now(1).unwrap().expired), [8, 8, 4]);
}
