//! Readers of stored events that read for themselves.

use std::time::Duration;

use polymq_kubemq_proto::EventReceive;
use tonic::Streaming;

use super::{Model, PATIENCE, Start};
use crate::manage;

#[derive(Default)]
pub(super) struct Reader {
    /// The next sequence that must come; none before the first subscription.
    next: Option<u64>,
    /// Up to here events may be passed over: those that may have been sent when it left count as delivered.
    sent: u64,
    stream: Option<Streaming<EventReceive>>,
}

impl Reader {
    pub(super) fn cut(&mut self, stored: u64) {
        if self.stream.take().is_some() {
            self.sent = stored;
        }
    }
}

impl Model {
    pub(super) async fn subscribe(&mut self, reader: usize, start: Start) {
        let reading = self.readers[reader].stream.is_some();
        let asked = self.start(start).await;
        let began = tokio::time::Instant::now();
        let (stream, begin) = loop {
            match self.read_from(&asked, format!("{}-{reader}", self.name), String::new()).await {
                Ok(found) => break found,
                // One that has just left may not be known to have.
                Err(status) if status.message().contains("already registered") && !reading => {
                    assert!(began.elapsed() < PATIENCE, "{status}");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Err(status) => {
                    match asked.error {
                        Some(error) => assert!(status.message().contains(error), "{start:?}: {status}"),
                        None => assert!(reading, "{start:?}: {status}"),
                    }
                    return;
                }
            }
        };
        assert!(asked.error.is_none(), "a wrong start is refused: {start:?}");
        assert!(!reading, "two with one name");
        let reader = &mut self.readers[reader];
        if reader.next.is_none() {
            (reader.next, reader.sent) = (Some(*begin.start()), begin.end() - 1);
        }
        reader.stream = Some(stream);
    }

    /// Leaves, and waits until the broker knows: until then it may send what is stored.
    pub(super) async fn leave(&mut self, reader: usize) {
        if self.readers[reader].stream.is_none() {
            return;
        }
        self.readers[reader].cut(self.stored);
        self.left("client", &format!("{}-{reader}", self.name)).await;
    }

    /// Waits until the broker knows that a reader has left.
    pub(super) async fn left(&mut self, kind: &str, reader: &str) {
        let left = format!("\"{kind}\":\"{reader}\",\"isActive\":false");
        let began = tokio::time::Instant::now();
        let name = self.name.clone();
        loop {
            let readers = manage(&mut self.client, "list-readers", "events_store", &name).await.expect("a channel");
            let readers = String::from_utf8(readers).expect("JSON");
            if readers.contains(&left) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{readers}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub(super) async fn read(&mut self, reader: usize, most: u64) {
        let Reader { next, sent, stream } = &self.readers[reader];
        if stream.is_some() && next.is_some_and(|next| next <= *sent) {
            // So that something comes in any case.
            self.store(1).await;
        }
        let stored = self.stored;
        let Reader { next: Some(next), sent, stream: Some(stream) } = &mut self.readers[reader] else { return };
        for _ in 0..most {
            if *next > stored {
                return;
            }
            let event = tokio::time::timeout(PATIENCE, stream.message()).await.expect("in time");
            let event = event.unwrap().expect("the stream goes on");
            assert!(event.sequence <= (*next).max(*sent + 1), "{} came, {next} was skipped", event.sequence);
            assert!(event.sequence >= *next, "{} came again, {next} is next", event.sequence);
            assert_eq!(*event.body, event.sequence.to_be_bytes(), "the event of its number");
            (*next, *sent) = (event.sequence + 1, 0);
        }
    }
}
